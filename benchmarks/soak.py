"""The randomized and the fault suites, much longer than `make test` runs them.

Property tests are run with fixed seeds and many examples, then the suites that kill processes and
run the real service are repeated. Every round is a run of pytest of its own; a failure does not end
the campaign, but it is in the result and in the exit code.

    python -m benchmarks.soak [--seeds 5] [--repeats 3]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.running import write_result

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "1800")
FAULT_SUITES = ("tests/jobs", "tests/unit/processes", "tests/unit/objects", "tests/e2e")


@dataclass(frozen=True)
class Round:
    """One run of pytest."""

    name: str
    summary: str
    """Its closing line, such as `12 passed in 3.45s`."""
    seconds: float
    passed: bool


def main() -> int:
    """Run the campaign, write its result, and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of the property tests")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each fault suite")
    options = parser.parse_args()
    rounds = []
    for seed in range(options.seeds):
        arguments = ("-p", "benchmarks.soak_profile", "-m", "hypothesis")
        rounds.append(run(f"properties, seed {seed}", *arguments, f"--hypothesis-seed={seed}"))
    for repeat in range(options.repeats):
        for suite in FAULT_SUITES:
            if Path(suite).is_dir():
                rounds.append(run(f"{suite}, round {repeat + 1}", suite))
    rows = [("round", "result", "time")]
    rows += [(item.name, item.summary, f"{item.seconds:.0f} s") for item in rounds]
    write_result(
        "soak",
        "Property tests with 2000 examples where the test sets no number itself, and a fixed seed "
        "a round; then the suites that kill processes and run the real service. The result is "
        "pytest's closing line.",
        rows,
        "Not covered: several machines, GPUs, days of running.",
    )
    return 0 if all(item.passed for item in rounds) else 1


def run(name: str, *arguments: str) -> Round:
    """Run pytest once; what it prints is shown only where something failed."""
    print(f"{name} ...", flush=True)
    started = time.monotonic()
    done = subprocess.run((*PYTEST, *arguments), capture_output=True, text=True, check=False)
    closing = [line for line in done.stdout.splitlines() if re.search(r" in [\d.]+s", line)]
    summary = closing[-1].strip("= ") if closing else f"pytest ended with {done.returncode}"
    if done.returncode:
        print(done.stdout + done.stderr)
    print(f"  {summary}", flush=True)
    return Round(name, summary, time.monotonic() - started, done.returncode == 0)


if __name__ == "__main__":
    sys.exit(main())
