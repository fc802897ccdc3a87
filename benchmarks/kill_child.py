"""The process that `kill_matrix.py` kills: trains, publishes, and says what it is about to do.

    python -m benchmarks.kill_child PAGE.json FOLDER ATTEMPT DESCRIPTOR

It calls `train(...)` as an attempt of a job does. Functions of the loop are wrapped so that the
name of a phase goes into the descriptor when it begins; what they do is not changed. Checkpoints
may take all of the time here, so that one is written after every step.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.outcrop_training import BASE_MODEL
from benchmarks.training_work import read_examples

from outcrop.models.catalog import shipped_models
from outcrop.store.files import sync, sync_tree
from outcrop.train import checkpoint
from outcrop.train.loop import train
from outcrop.train.metrics import StepRow, ValidationRow, step_csv, validation_csv
from outcrop.train.plan import TrainPlan, make_plan

WRAPPED = (
    ("outcrop.train.run", "Run.step", "step"),
    ("outcrop.train.loop", "evaluate_likelihood", "validation"),
    ("outcrop.train.checkpoint", "save_checkpoint", "checkpoint"),
    ("outcrop.train.methods", "Trainable.save", "publication"),
)
"""Module, what of it, and the phase that it is."""
ELSEWHERE = "elsewhere"
BATCH_SIZE = 4


def main() -> None:
    """Do what the page says, from wherever the attempts before came to."""
    page = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder, attempt, descriptor = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

    def say(phase: str) -> None:
        os.write(descriptor, f"{phase}\n".encode("ascii"))

    for module, name, phase in WRAPPED:
        announce(module, name, phase, say)
    checkpoint.LARGEST_SHARE = 1e9
    steps: list[StepRow] = []
    validations: list[ValidationRow] = []

    def resume(earlier_steps: Sequence[StepRow], earlier: Sequence[ValidationRow]) -> None:
        steps.extend(earlier_steps)
        validations.extend(earlier)

    work = folder / "work"
    mine = work / str(attempt) / "checkpoints"
    result = train(
        make_child_plan(page),
        Path(page["weights"]),
        read_examples(Path(page["examples"])),
        read_examples(Path(page["validation"])),
        work / str(attempt),
        on_step=steps.append,
        on_validation=validations.append,
        on_resume=resume,
        threads=page["threads"],
        checkpoints=mine,
        checkpoint_seconds=0.0,
        earlier=[other for other in work.glob("*/checkpoints") if other != mine],
    )
    say("publication")
    publish(folder, result.artifact, result.digest, step_csv(steps), validation_csv(validations))


def announce(module: str, name: str, phase: str, say: Callable[[str], None]) -> None:
    """Have a function say its phase when it begins, and that it is over when it ends."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function = getattr(owner, last)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        say(phase)
        try:
            return function(*arguments, **keywords)
        finally:
            say(ELSEWHERE)

    setattr(owner, last, wrapped)


def make_child_plan(page: dict[str, Any]) -> TrainPlan:
    """Return the plan of the small run."""
    base = next(model for model in shipped_models() if model.model_id == BASE_MODEL)
    plan = make_plan(base, "FINE_TUNING", {}, has_validation=True)
    return replace(plan, method=page["method"], num_epochs=page["epochs"], batch_size=BATCH_SIZE)


def publish(
    folder: Path, artifact: Path, digest: str, step_file: bytes, validation_file: bytes
) -> None:
    """Move the artifact to its place and say so in one write, as a job does in its row."""
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    sync_tree(artifact)
    artifact.rename(place)
    page = {
        "artifact": digest,
        "step_wise_training_metrics.csv": hashlib.sha256(step_file).hexdigest(),
        "validation_metrics.csv": hashlib.sha256(validation_file).hexdigest(),
    }
    unfinished = folder / ".published.json"
    unfinished.write_text(json.dumps(page), encoding="utf-8")
    sync(unfinished)
    unfinished.rename(folder / "published.json")


if __name__ == "__main__":
    main()
