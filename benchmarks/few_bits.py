"""What weights in fewer bits cost in accuracy: losses, likeliest tokens and odds on real records.

    python -m benchmarks.few_bits RECORDS.jsonl... [--weights FOLDER] [--tokens 6000] [--threads 2]

Records have a prompt and a completion, or an input alone. Prompts are rendered with the model's
template; the tokens of completions and inputs count. Every precision serves the same tokens in the
compiled pass, and is compared token by token with the weights in bfloat16. The standard error of
the loss's change is that of the mean of the records' changes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from benchmarks.running import write_result
from benchmarks.training_work import shipped_weights

from outcrop.data.records import Example, Message
from outcrop.data.render import Renderer
from outcrop.evaluate.likelihood import num_loss_tokens
from outcrop.evaluate.parity import compare_backends, served_loss
from outcrop.serve.engine import open_backend
from outcrop.serve.packed import FEW_BITS

MAX_LENGTH = 512


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", type=Path, nargs="+")
    parser.add_argument("--weights", type=Path, help="default: the shipped model")
    parser.add_argument("--tokens", type=int, default=6000, help="of each file, at least")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    folder = shipped_weights(options.weights)
    renderer = Renderer(folder)
    exact = open_backend(folder, threads=options.threads, max_page_bytes=1)
    rows = [
        (
            *("records", "tokens", "weights", "matrices, MB", "loss", "change of the loss"),
            *("perplexity", "same likeliest token", "divergence, nats"),
        )
    ]
    for file in options.records:
        examples = read_examples(renderer, file, options.tokens)
        counts = [num_loss_tokens(example) for example in examples]
        whole = [served_loss(exact, None, example) for example in examples]
        name, tokens = file.stem, f"{sum(counts):,}"
        loss = mean(whole, counts)
        size = f"{exact.base_bytes / 1e6:.0f}"
        rows.append(
            (name, tokens, "bfloat16", size, f"{loss:.4f}", "", f"{math.exp(loss):.3f}", "", "")
        )
        for precision in FEW_BITS:
            other = open_backend(
                folder, threads=options.threads, precision=precision, max_page_bytes=1
            )
            losses = [served_loss(other, None, example) for example in examples]
            agreement = compare_backends(exact, other, None, examples)
            size = f"{other.base_bytes / 1e6:.0f}"
            other.close()
            changes = [(few - one) for few, one in zip(losses, whole, strict=True)]
            error = statistics.stdev(changes) / math.sqrt(len(changes))
            changed = mean(losses, counts)
            rows.append(
                (
                    *(name, tokens, precision, size, f"{changed:.4f}"),
                    *(f"{changed - loss:+.4f} (+-{error:.4f})", f"{math.exp(changed):.3f}"),
                    *(f"{agreement.top1:.2%}", f"{agreement.divergence:.5f}"),
                )
            )
            print(rows[-1], flush=True)
    exact.close()
    write_result(
        "few_bits",
        "Losses in nats a token. The shipped model's weights were 4 bits a number once (Q4_1, 32 "
        "to a group), which 4 bits here find again; another model loses more in 4 bits.",
        rows,
        "One model of 135 million weights. Not measured: answers of many tokens, larger models.",
    )


def read_examples(renderer: Renderer, file: Path, num_tokens: int) -> list[Example]:
    """Return a file's first records of some length, with so many tokens that count."""
    found: list[Example] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "input" in record:
            ids = renderer.tokenizer.encode(record["input"])[:MAX_LENGTH]
            example = Example(ids, [False, *[True] * (len(ids) - 1)])
        else:
            turns = ("user", record["prompt"]), ("assistant", record["completion"])
            example = renderer.render_example([Message(role, text) for role, text in turns])
        if 8 <= len(example.input_ids) <= MAX_LENGTH:
            found.append(example)
        if sum(map(num_loss_tokens, found)) >= num_tokens:
            break
    return found


def mean(losses: list[float], counts: list[int]) -> float:
    """Return the mean over tokens."""
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


if __name__ == "__main__":
    main()
