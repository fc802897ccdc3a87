"""How much memory training takes, next to what was foretold.

    python -m benchmarks.training_memory [--weights FOLDER] [--methods adapter full]

Each cell is a process of its own that takes real steps on the shipped model: two micro-batches a
step, of so many tokens each, of which so many carry loss. Its peak is what the kernel counted
(getrusage); beside it stands the most it could write to at a time, which is what the bound of a
training process is held against. It trains on random tokens: memory does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.running import write_result

from outcrop.data.records import Example
from outcrop.models.catalog import load_catalog
from outcrop.models.load import compute_dtype
from outcrop.models.weights import SHIPPED_KEY, ensure_weights
from outcrop.settings import Settings
from outcrop.train.memory import bounded_memory, held_bytes, peak_memory_bytes
from outcrop.train.plan import TrainPlan, make_plan
from outcrop.train.portions import Portions
from outcrop.train.prediction import (
    MEMORY_TOLERANCE,
    ModelShape,
    computing_bytes,
    predict_memory,
)
from outcrop.train.threads import num_primitives, training_environment

METHODS = ("adapter", "full")
TOKENS = (256, 1024, 2048, 4096)
LOSS_SHARES = (0.1, 1.0)
RECORD_TOKENS = (128, 0)
"""How long the records of a micro-batch are; 0 means one record as long as all of it."""
STEPS = 2
MICRO_BATCHES = 2
"""In a step: from the second on, gradients are held beside the activations."""
LANES = 2
SAMPLE_SECONDS = 0.01
BASE = "amazon.titan-text-express-v1"


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    tokens: int
    loss_share: float
    record_tokens: int


@dataclass(frozen=True)
class Measured:
    """What one process saw of itself."""

    peak: int
    """Bytes resident at most."""
    held: int
    """Bytes it could write to at most, less those that it had after its imports."""
    before: int
    """Bytes resident at most after its imports."""


def main() -> None:
    """Measure all cells, or the one that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of another model than the shipped")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--one", help="measure this cell in this process (JSON)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        weights = arguments.weights or ensure_weights(Settings(), SHIPPED_KEY)
        if arguments.one:
            cell = Cell(**json.loads(arguments.one))
            sys.stdout.write(json.dumps(vars(_measure(weights, cell, Path(scratch)))) + "\n")
            return
        _measure_all(weights, arguments.methods, arguments.tokens)


def _measure_all(weights: Path, methods: Sequence[str], tokens: Sequence[int]) -> None:
    shape = ModelShape.read(weights)
    table = [
        ("method", "tokens", "tokens a record", "with loss", "foretold", "peak", "error", "held")
    ]
    errors = []
    for cell in _grid(methods, tokens):
        measured = _in_a_process(weights, cell)
        foretold = _foretold(shape, cell)
        error = foretold / measured.peak - 1
        errors.append(abs(error))
        row = (
            cell.method,
            f"{cell.tokens:,}",
            f"{cell.record_tokens or cell.tokens:,}",
            f"{cell.loss_share:.0%}",
            f"{foretold / 2**20:,.0f} MiB",
            f"{measured.peak / 2**20:,.0f} MiB",
            f"{error:+.1%}",
            f"{measured.held / 2**20:,.0f} MiB",
        )
        sys.stderr.write(" ".join(row) + f" before {measured.before / 2**20:,.0f}\n")
        table.append(row)
    write_result(
        "training_memory",
        f"{STEPS} steps of {MICRO_BATCHES} micro-batches each, in a process of its own a row; "
        f"numbers of {computing_bytes()} bytes. `peak` is the most that was resident (getrusage), "
        "`held` the most that could be written to, less what could be after the imports: what the "
        "bound of a training process counts. `foretold` is `predict_memory`.",
        table,
        f"The largest error is {max(errors):.1%}; {MEMORY_TOLERANCE:.0%} are promised. Not "
        "measured: other models than the one named in the command, a GPU, macOS.",
    )


def _grid(methods: Sequence[str], tokens: Sequence[int]) -> list[Cell]:
    return [
        Cell(method, count, share, record)
        for method in methods
        for count in tokens
        for record in RECORD_TOKENS
        for share in LOSS_SHARES
        # Micro-batches are longer than their bound only where one record is.
        if not (record and count > Portions().tokens)
    ]


def _foretold(shape: ModelShape, cell: Cell) -> int:
    portions = Portions()
    return predict_memory(
        shape,
        cell.method,
        cell.tokens,
        round(cell.tokens * cell.loss_share),
        is_recomputed=cell.tokens > portions.kept_tokens,
        record_tokens=cell.record_tokens or cell.tokens,
    )


def _in_a_process(weights: Path, cell: Cell) -> Measured:
    command = [sys.executable, "-m", "benchmarks.training_memory"]
    command += ["--weights", str(weights), "--one", json.dumps(vars(cell))]
    environment = {**os.environ, **training_environment(LANES)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{cell}: {done.stderr[-2000:]}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _measure(weights: Path, cell: Cell, scratch: Path) -> Measured:
    import torch

    from outcrop.train.loop import train
    from outcrop.train.tuning import ThreadPlan

    examples = _examples(cell, ModelShape.read(weights).vocabulary)
    plan = _plan(cell, len(examples) // STEPS)
    peaks = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            peaks.append(held_bytes())

    with bounded_memory(1 << 40, threads=LANES):
        import transformers.models.llama.modeling_llama  # noqa: F401

        before, resident = held_bytes(), peak_memory_bytes()
        _meet_shapes()
        watcher = threading.Thread(target=sample, daemon=True)
        watcher.start()
        # A given use of the cores, so that no time goes into measuring the best one.
        cores = ThreadPlan(lanes=LANES, row_threads=LANES, speedup=1.6)
        bound = min(cell.tokens, Portions().tokens)
        train(
            *(plan, weights, examples, [], scratch),
            threads=LANES,
            thread_plan=cores,
            device=torch.device("cpu"),
            micro_batch_tokens=bound,
        )
    is_over.set()
    watcher.join()
    return Measured(peak_memory_bytes(), max(peaks) - before, resident)


def _meet_shapes() -> None:
    """Have oneDNN prepare products of as many shapes as it keeps, as a long run of records of ever
    other lengths does in its first dozen steps."""
    import torch

    weight = torch.ones(576, 576, dtype=compute_dtype())
    for rows in range(1, num_primitives(LANES) + 1):
        torch.mm(torch.ones(rows, 576, dtype=compute_dtype()), weight)


def _examples(cell: Cell, vocabulary: int) -> list[Example]:
    draw = random.Random(0)
    length = cell.record_tokens or cell.tokens
    with_loss = round(length * cell.loss_share)
    mask = [place >= length - with_loss for place in range(length)]
    return [
        Example([draw.randrange(vocabulary) for _ in range(length)], mask)
        for _ in range(STEPS * MICRO_BATCHES * (cell.tokens // length))
    ]


def _plan(cell: Cell, batch_size: int) -> TrainPlan:
    base = load_catalog(Settings()).resolve(BASE)
    assert base is not None
    plan = make_plan(base, "FINE_TUNING", {}, has_validation=False)
    changes: dict[str, Any] = {"method": cell.method, "num_epochs": 1, "batch_size": batch_size}
    return TrainPlan(**{**vars(plan), **changes})


if __name__ == "__main__":
    main()
