"""Outcrop and TRL with Liger train Llama-shaped random models on a GPU, in turn.

    python -m benchmarks.training_gpu [--shapes 1b 8b] [--method adapter] [--trl-python PYTHON]
    python -m benchmarks.training_gpu --smoke       a tiny model on the CPU, to try the program

It needs nothing from outside: weights are random, records are drawn. Each contender is a process
of its own, with the same records in the same batches. TRL is measured where trl, peft, datasets
and liger-kernel are installed beside this Python or the given one, with and without checkpointing
of activations and in parts, and its best counts; else its column says what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu_work import (
    LINEARS,
    REAL_LIKE,
    SHAPES,
    SHORT,
    Clock,
    batches,
    make_model,
    make_records,
    matrix_rate,
    peak_bytes,
    step_operations,
)
from benchmarks.running import table_lines, write_result

ROOT = Path(__file__).parents[1]
RANK, ALPHA = 16, 32.0
WARM_UP_STEPS = 3
RATE_SIZE = 8192
TRL_PARTS = 4
TRL_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "activations kept": {"gradient_checkpointing": False},
    f"activations kept, {TRL_PARTS} parts a step": {
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": TRL_PARTS,
    },
    "activations computed twice": {"gradient_checkpointing": True},
}
"""What is tried with TRL, besides what `trl_training_gpu.py` always sets; the fastest counts."""


@dataclass(frozen=True)
class Result:
    """What a contender took for one shape."""

    name: str
    seconds: Sequence[float]
    """Of each step after the warm-up."""
    peak: int
    note: str = ""

    def rate(self, tokens: Sequence[int]) -> float:
        """Return tokens a second: the median over the steps."""
        return statistics.median(
            count / seconds for count, seconds in zip(tokens, self.seconds, strict=True)
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=("1b", "8b"), default=["1b", "8b"])
    parser.add_argument("--method", choices=("adapter", "full"), default="adapter")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trl-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        page, answer = arguments.work
        given = json.loads(page.read_text(encoding="utf-8"))
        answer.write_text(json.dumps(run_outcrop(given)), encoding="utf-8")
        return
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --smoke tries the program on the CPU")
    device = torch.device("cpu" if arguments.smoke else "cuda")
    # The CPU of a small machine may only emulate bfloat16.
    dtype = "float32" if arguments.smoke else "bfloat16"
    shapes = ["tiny"] if arguments.smoke else arguments.shapes
    batch_size = 4 if arguments.smoke else arguments.batch_size
    steps = 3 if arguments.smoke else arguments.steps
    rate = matrix_rate(device, getattr(torch, dtype), 256 if arguments.smoke else RATE_SIZE)
    table = [["Model", "Trainer", "tokens/s", "step, s", "peak memory", "of the card's rate"]]
    for shape in shapes:
        lengths = SHORT if arguments.smoke else REAL_LIKE
        count = batch_size * (steps + WARM_UP_STEPS)
        work: dict[str, Any] = {
            "shape": shape,
            "records": make_records(count, SHAPES[shape]["vocab_size"], lengths),
            "method": arguments.method,
            "rank": RANK,
            "alpha": ALPHA,
            "batch_size": batch_size,
            "device": str(device),
            "dtype": dtype,
        }
        results = [child(work, "Outcrop", None), *trl_results(work, arguments.trl_python)]
        table += rows(shape, work, results, rate)
    how = (
        f"{device_line(device)}; products of square matrices in {dtype}: {rate / 1e12:.3g} "
        f"TFLOP/s. {arguments.method.capitalize()}, batches of {batch_size} records, median of "
        f"{steps} steps after {WARM_UP_STEPS}. Tokens are real ones; no padding. The share is that "
        "of the useful operations of linear layers and head. Memory is what tensors took."
    )
    notes = (
        "Random weights, drawn records with log-normal lengths; attention, and what a trainer "
        "computes twice, count as nothing. TRL: padding-free, bfloat16, Liger's kernels."
    )
    if arguments.smoke:
        # Says nothing about speed, so no page is written.
        print("\n".join([how, "", *table_lines(table), "", notes]))
        return
    write_result(f"training_gpu_{arguments.method}", how, table, notes)


def trl_results(work: dict[str, Any], python: Path) -> list[Result]:
    """Return TRL's best result, or one that says why there is none."""
    # Liger's kernels are Triton's, for a GPU.
    has_liger = work["device"] != "cpu"
    trainer = "TRL with Liger" if has_liger else "TRL without Liger"
    found = [
        child({**work, "liger": has_liger, "options": dict(options)}, name, python)
        for name, options in TRL_SETTINGS.items()
    ]
    measured = [result for result in found if result.seconds]
    if not measured:
        return [Result(trainer, (), 0, "; ".join(sorted({one.note for one in found})))]
    best = min(measured, key=lambda result: statistics.median(result.seconds))
    return [Result(f"{trainer}, {best.name}", best.seconds, best.peak, best.note)]


def child(work: dict[str, Any], name: str, trl_python: Path | None) -> Result:
    """Have a process do the work; TRL's where its Python is given.

    Its memory is given back to the device when it ends.
    """
    with tempfile.TemporaryDirectory(prefix="training-gpu-") as scratch:
        page, answer = Path(scratch, "work.json"), Path(scratch, "result.json")
        page.write_text(json.dumps(work), encoding="utf-8")
        if trl_python is None:
            command = [sys.executable, "-m", "benchmarks.training_gpu", "--work"]
        else:
            command = [str(trl_python), "-m", "benchmarks.trl_training_gpu"]
        done = subprocess.run(
            [*command, str(page), str(answer)],
            cwd=ROOT,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
            stdout=sys.stderr,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answer.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if trl_python is None:
                raise SystemExit(f"{name} ended with code {done.returncode}:\n{done.stderr}")
            return Result(name, (), 0, f"failed: {last[:200]}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    if result.get("missing"):
        return Result(name, (), 0, f"not installed: {', '.join(result['missing'])}")
    return Result(name, result["seconds"][WARM_UP_STEPS:], result["peak"], result.get("note", ""))


def run_outcrop(work: dict[str, Any]) -> dict[str, Any]:
    """Train with Outcrop's own steps, and return what they took."""
    # Here, because the parent needs none of it.
    from outcrop.data.records import Example
    from outcrop.models.lanes import Lanes
    from outcrop.train.checkpoint import RunState
    from outcrop.train.device import default_portions
    from outcrop.train.gradients import gather_gradients, micro_batches
    from outcrop.train.methods import make_trainable
    from outcrop.train.plan import TrainPlan
    from outcrop.train.portions import Portions
    from outcrop.train.prediction import ModelShape
    from outcrop.train.run import Run

    device = torch.device(work["device"])
    plan = TrainPlan(
        base_model=work["shape"],
        method=work["method"],
        num_epochs=1,
        batch_size=work["batch_size"],
        learning_rate=1e-4,
        warmup_steps=0,
        lora_rank=work["rank"],
        lora_alpha=work["alpha"],
        lora_targets=LINEARS,
        early_stopping=None,
        evaluation_percentage=None,
        hyper_parameters={},
    )
    model = make_model(work["shape"], device, getattr(torch, work["dtype"]), "sdpa")
    model.requires_grad_(False)
    model.eval()
    trainable = make_trainable(model, plan, seed=0)
    lanes = Lanes(1)
    told: list[str] = []

    def gather(batch: Sequence[Example], portions: Portions) -> tuple[float, int]:
        return gather_gradients(trainable, batch, portions, lanes=lanes)

    def lay(records: Sequence[Example], portions: Portions) -> list[list[int]]:
        return micro_batches(trainable, records, portions, lanes)

    records = [Example(ids, [bool(bit) for bit in mask]) for ids, mask in work["records"]]
    parts = batches(records, work["batch_size"])
    state = RunState()
    state.portions = default_portions(
        *(device, ModelShape.of(model.config.to_dict()), plan),
        longest=max(len(example.input_ids) for example in records),
        lanes=1,
    )
    run = Run(
        *(plan, trainable, state, len(parts), gather, lay),
        lambda portions, message: told.append(message),
    )
    clock = Clock(device)
    losses = []
    for batch in parts:
        losses.append(run.step(batch, 0).training_loss)
        clock.tick()
    portions = state.portions
    note = f"{portions.tokens} tokens at a time, activations kept up to {portions.kept_tokens}"
    if told:
        note += "; memory ran out and portions were made smaller"
    return {
        "seconds": clock.seconds,
        "peak": peak_bytes(device),
        "losses": losses,
        "note": note,
    }


def rows(
    shape: str, work: Mapping[str, Any], results: Sequence[Result], rate: float
) -> list[list[str]]:
    """Return the table's rows of one shape."""
    parts = batches(work["records"], work["batch_size"])[WARM_UP_STEPS:]
    tokens = [sum(len(ids) for ids, _ in part) for part in parts]
    with_loss = [sum(sum(mask) for _, mask in part) for part in parts]
    operations = [
        step_operations(SHAPES[shape], work["method"], work["rank"], count, loss)
        for count, loss in zip(tokens, with_loss, strict=True)
    ]
    found = []
    for result in results:
        if not result.seconds:
            found.append([shape, result.name, result.note, "", "", ""])
            continue
        share = statistics.median(
            done / seconds / rate for done, seconds in zip(operations, result.seconds, strict=True)
        )
        name = f"{result.name} ({result.note})" if result.note else result.name
        found.append(
            [
                *(shape, name, f"{result.rate(tokens):,.0f}"),
                f"{statistics.median(result.seconds):.3f}",
                f"{result.peak / 2**30:.1f} GiB" if result.peak else "not counted",
                f"{share:.0%}",
            ]
        )
    return found


def device_line(device: torch.device) -> str:
    """Return the device's name and memory."""
    if device.type != "cuda":
        return "CPU"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


if __name__ == "__main__":
    main()
