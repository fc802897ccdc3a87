"""How fast this machine multiplies matrices of a model's shapes: what a trainer could reach.

    python -m benchmarks.matrix_rate CONFIG.json [--threads 2] [--dtype bfloat16]

For each linear layer of one block, with 1,024 tokens: the product with the weights, and the one
that takes a gradient back to the inputs. Prints one line of JSON with operations a second: `median`
and `best` over the whole block, from the median and the best time of each product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from benchmarks.training_work import linear_shapes

TOKENS = 1024
REPEATS = 31
WEIGHTS = 4
"""Copies of each weight that take turns, so that none stays in the innermost cache."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[arguments.dtype]
    operations = median = best = 0.0
    for inputs, outputs in linear_shapes(config):
        for width, height in ((inputs, outputs), (outputs, inputs)):
            times = product_seconds(width, height, dtype)
            operations += 2.0 * TOKENS * width * height
            median += statistics.median(times)
            best += min(times)
    print(json.dumps({"median": operations / median, "best": operations / best}))


def product_seconds(width: int, height: int, dtype: torch.dtype) -> list[float]:
    """Return how long products of (tokens, width) with (width, height) took."""
    x = torch.randn(TOKENS, width).to(dtype)
    weights = [torch.randn(height, width).to(dtype) for _ in range(WEIGHTS)]
    times = []
    with torch.inference_mode():
        for number in range(REPEATS + WEIGHTS):
            started = time.perf_counter()
            torch.nn.functional.linear(x, weights[number % WEIGHTS])
            times.append(time.perf_counter() - started)
    return times[WEIGHTS:]


if __name__ == "__main__":
    main()
