"""Kill -9 at seeded random instants: does a run end in the same bytes as an uninterrupted one?

    python -m benchmarks.kill_matrix [--runs 10] [--kills 3] [--seed 0]
    python -m benchmarks.kill_matrix --through service [--runs 9]

`train` (the default) runs the loop in a process of its own, on real weights and records, with a
checkpoint after every step. The process says what it is about to do; the kills are aimed at each of
those phases in turn, at a random moment inside it. The next process goes on until the next kill or
the end. `service` kills attempts, workers and the whole of `outcrop serve` at random moments of a
job (see `kill_service.py`). Compared are the digest of the published artifact and the bytes of both
CSV files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.running import write_result
from benchmarks.training_work import CACHE, ROOT, shipped_weights, write_examples

from outcrop.data.records import Example
from outcrop.data.render import Renderer
from outcrop.train.threads import training_environment

PHASES = ("loading", "step", "validation", "checkpoint", "publication")
"""What kills are aimed at, in turn. A kill in the code between them counts as `elsewhere`."""
CHILD = "benchmarks.kill_child"
LONGEST_SECONDS = 1200
"""A process that takes longer than this hangs."""


@dataclass(frozen=True)
class Event:
    """The process began or ended a phase, or `elsewhere`."""

    phase: str
    at: float
    """Seconds since its start."""


@dataclass
class Outcome:
    """What became of one run."""

    published: dict[str, str]
    """Digest of the artifact and of each CSV file."""
    killed_in: list[str] = field(default_factory=list)
    """The phase that each kill really hit."""
    missed: int = 0
    """Kills that came after the end."""


def main() -> None:
    """Kill, compare, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--through", choices=("train", "service"), default="train")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--kills", type=int, default=3, help="of one run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="the base; default: the shipped model")
    parser.add_argument("--records", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--method", choices=("adapter", "full"), default="adapter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=CACHE / "kill_matrix")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    if options.through == "service":
        from benchmarks.kill_service import kill_jobs

        kill_jobs(options)
        return
    page = write_page(options)
    whole, events = run_whole(page, options.work / "whole")
    again, _ = run_whole(page, options.work / "again")
    if again.published != whole.published:
        raise SystemExit("two uninterrupted runs differ: nothing can be compared with them")
    print(f"uninterrupted: {whole.published}", flush=True)
    chance = random.Random(options.seed)
    aims = [PHASES[place % len(PHASES)] for place in range(options.runs * options.kills)]
    chance.shuffle(aims)
    outcomes = []
    for number in range(options.runs):
        mine = aims[number * options.kills : (number + 1) * options.kills]
        mine.sort(key=lambda phase: phase == "publication")  # after it little is left to kill
        outcome = run_killed(page, options.work / f"run-{number}", mine, events, chance)
        same = outcome.published == whole.published
        print(f"run {number}: killed in {outcome.killed_in}, same bytes: {same}", flush=True)
        outcomes.append(outcome)
        if same:
            shutil.rmtree(options.work / f"run-{number}")
    report(options, whole, outcomes)


def write_page(options: argparse.Namespace) -> Path:
    """Write what each process is to do, and return the file."""
    from benchmarks.aws_operations import operation_examples

    weights = shipped_weights(options.weights)
    examples: list[Example] = operation_examples(Renderer(weights), options.records + 8)
    page = {
        "weights": str(weights),
        "examples": str(write_examples(options.work / "examples.json", examples[:-8])),
        "validation": str(write_examples(options.work / "validation.json", examples[-8:])),
        "epochs": options.epochs,
        "method": options.method,
        "threads": options.threads,
    }
    file: Path = options.work / "page.json"
    file.write_text(json.dumps(page), encoding="utf-8")
    return file


def run_whole(page: Path, folder: Path) -> tuple[Outcome, list[Event]]:
    """Run without a kill; returns what it published and its phases."""
    events, code = run_process(page, folder, 0, None)
    if code != 0:
        raise SystemExit(f"the run failed with code {code}; see {folder / 'log.txt'}")
    return Outcome(read_published(folder)), events


def run_killed(
    page: Path,
    folder: Path,
    aims: Sequence[str],
    usual: Sequence[Event],
    chance: random.Random,
) -> Outcome:
    """Run with one kill for each phase aimed at, then until it has ended."""
    outcome = Outcome({})
    for attempt, phase in enumerate(aims):
        seconds, count = durations(usual, phase)
        # Among the first, so that the kills after it find some left: a run goes on, not anew.
        which = chance.randint(1, max(1, min(3, count // (len(aims) + 1))))
        aim = (phase, which, chance.random() * seconds)
        events, code = run_process(page, folder, attempt, aim)
        if code == 0:
            outcome.missed += 1
            break
        if code != -9:
            raise SystemExit(f"the run failed with code {code}; see {folder / 'log.txt'}")
        outcome.killed_in.append(events[-1].phase)
    else:
        _, code = run_process(page, folder, len(aims), None)
        if code != 0:
            raise SystemExit(f"the run failed with code {code}; see {folder / 'log.txt'}")
    outcome.published = read_published(folder)
    return outcome


def run_process(
    page: Path, folder: Path, attempt: int, aim: tuple[str, int, float] | None
) -> tuple[list[Event], int]:
    """Run one process until it ends or is killed.

    Args:
        aim: (phase, which time it begins, seconds after that): when to kill; None: never.
    Returns:
        Its phases up to its end, and its exit code; -9 when it was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = int(json.loads(page.read_text(encoding="utf-8"))["threads"])
    reading, writing = os.pipe()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", CHILD, str(page), str(folder), str(attempt), str(writing)],
            cwd=ROOT,
            env={**os.environ, **training_environment(threads)},
            pass_fds=(writing,),
            stdout=log,
            stderr=log,
        )
    os.close(writing)
    started = time.monotonic()
    events = [Event("loading", 0.0)]
    begun = Counter({"loading": 1})
    kill_at = started + aim[2] if aim is not None and aim[:2] == ("loading", 1) else None
    rest = b""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            now = time.monotonic()
            if now > started + LONGEST_SECONDS:
                process.kill()
                raise SystemExit(f"the run hangs; see {folder / 'log.txt'}")
            if kill_at is not None and now >= kill_at:
                process.kill()
                kill_at = None
            pause = 1.0 if kill_at is None else max(0.0, kill_at - now)
            if not select.select([pipe], [], [], min(pause, 1.0))[0]:
                continue
            chunk = pipe.read(4096)
            if not chunk:
                break
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                phase = line.decode("ascii")
                events.append(Event(phase, time.monotonic() - started))
                begun[phase] += 1
                if aim is not None and (phase, begun[phase]) == aim[:2]:
                    kill_at = time.monotonic() + aim[2]
    return events, process.wait()


def durations(events: Sequence[Event], phase: str) -> tuple[float, int]:
    """Return the median seconds of a phase in the uninterrupted run, and how often it came."""
    found = [later.at - event.at for event, later in pairwise(events) if event.phase == phase]
    if not found:
        raise SystemExit(f"the uninterrupted run never was in the phase {phase}")
    return statistics.median(found), len(found)


def read_published(folder: Path) -> dict[str, str]:
    """Return the digests that the last process wrote down."""
    published: dict[str, Any] = json.loads((folder / "published.json").read_text(encoding="utf-8"))
    return published


def report(options: argparse.Namespace, whole: Outcome, outcomes: Sequence[Outcome]) -> None:
    """Write the table: for each phase, how often a kill hit it, and how those runs ended."""
    rows: list[tuple[str, ...]] = [
        ("killed during", "kills", "runs with such a kill", "ended in the same bytes")
    ]
    phases = [*PHASES, *sorted({name for one in outcomes for name in one.killed_in} - {*PHASES})]
    for phase in phases:
        hit = [one for one in outcomes if phase in one.killed_in]
        same = sum(one.published == whole.published for one in hit)
        kills = sum(one.killed_in.count(phase) for one in outcomes)
        rows.append((phase, str(kills), str(len(hit)), f"{same} of {len(hit)}"))
    same = sum(one.published == whole.published for one in outcomes)
    kills = sum(len(one.killed_in) for one in outcomes)
    rows.append(("all", str(kills), str(len(outcomes)), f"{same} of {len(outcomes)}"))
    write_result(
        "kill_matrix" + ("_full" if options.method == "full" else ""),
        f"{options.records} records, {options.epochs} epochs of batches of 4, 8 validation "
        f"records, SmolLM2-135M-Instruct, method {options.method}, a checkpoint after every step. "
        f"{options.runs} runs with up to {options.kills} kills each (SIGKILL), seed "
        f"{options.seed}; a kill is aimed at a phase and comes at a random moment after it began, "
        "at most its usual length later. The table says what the process was in when it died. Two "
        "uninterrupted runs had the same bytes.",
        rows,
        f"- Compared: {', '.join(whole.published)}.\n"
        f"- {sum(one.missed for one in outcomes)} kills came after the end and count as none.\n"
        "- `loading` goes from the start of the process to the first other phase, checkpoints read "
        "included; `publication` from the writing of the artifact to the end of the process, the "
        "CSV files and the renaming included.\n"
        "- Not here: power cuts, and kills of the other processes (see kill_matrix_service).",
    )


if __name__ == "__main__":
    main()
