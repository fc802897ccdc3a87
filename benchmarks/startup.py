"""How long `outcrop serve` takes to be ready, and what it holds while nobody asks anything.

Targets: ready within 15 s at the first start of a data directory and within 3 s later on; gateway,
worker and object store together below 400 MB while idle; torch in none of them.
Linux only: reads /proc.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import boto3
from benchmarks.running import running_service, write_result

NUM_LATER_STARTS = 5
SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Process:
    """One process of the service."""

    name: str
    rss_mb: float
    pss_mb: float
    """As RSS, but shared pages are divided among those that share them."""
    has_torch: bool


def main() -> None:
    """Measure and write the result."""
    with tempfile.TemporaryDirectory(prefix="outcrop-startup-") as name:
        data_dir = Path(name) / "data"
        with running_service(data_dir) as first:
            first_ready = first.seconds_to_ready
            started = time.perf_counter()
            runtime = boto3.client("bedrock-runtime", **first.credentials())
            body = {"inputText": "Hi", "textGenerationConfig": {"maxTokenCount": 1}}
            runtime.invoke_model(modelId="amazon.titan-text-lite-v1", body=json.dumps(body))
            first_answer = time.perf_counter() - started
        later = []
        for _ in range(NUM_LATER_STARTS):
            with running_service(data_dir) as again:
                later.append(again.seconds_to_ready)
        with running_service(data_dir) as idle:
            time.sleep(SETTLE_SECONDS)
            processes = list(tree(idle.pid))
    total = [process for process in processes if process.name != "serve"]
    rows = [
        ("what", "measured", "target"),
        ("first start to `ready`", f"{first_ready:.2f} s", "15 s"),
        ("from there to the first answer of a model", f"{first_answer:.2f} s", ""),
        ("later starts to `ready`, median", f"{statistics.median(later):.2f} s", "3 s"),
        ("later starts to `ready`, slowest", f"{max(later):.2f} s", ""),
        ("gateway, worker and store, RSS", f"{sum(p.rss_mb for p in total):.0f} MB", "400 MB"),
        ("gateway, worker and store, PSS", f"{sum(p.pss_mb for p in total):.0f} MB", ""),
        *(
            (
                f"idle {process.name}: RSS / PSS",
                f"{process.rss_mb:.0f} / {process.pss_mb:.0f} MB",
                "torch loaded" if process.has_torch else "no torch",
            )
            for process in processes
        ),
    ]
    write_result(
        "startup",
        f"One first start in a new directory, then {NUM_LATER_STARTS} starts in the same. Time "
        "from the start of the process to its line `ready URL`, the interpreter's start "
        f"included. Memory {SETTLE_SECONDS:.0f} s after `ready`, nothing asked in between; 1 MB "
        "is 10^6 bytes.",
        rows,
        "The files of Python and of the object store were in the page cache, but for the first "
        "start on a machine. The first answer includes the conversion of the base weights.",
    )


def tree(pid: int) -> list[Process]:
    """Return the service's processes, the supervisor first."""
    found, waiting = [], [pid]
    while waiting:
        current = waiting.pop(0)
        found.append(read_process(current))
        children = Path(f"/proc/{current}/task/{current}/children").read_text(encoding="utf-8")
        waiting += [int(child) for child in children.split()]
    return found


def read_process(pid: int) -> Process:
    """Read one process from /proc."""
    folder = Path(f"/proc/{pid}")
    words = (folder / "cmdline").read_text(encoding="utf-8").split("\0")
    name = words[words.index("outcrop") + 1] if "outcrop" in words else "object store"
    sizes = {}
    for line in (folder / "smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]:
        key, _, rest = line.partition(":")
        sizes[key] = int(rest.split()[0]) * 1024 / 1e6
    maps = (folder / "maps").read_text(encoding="utf-8")
    return Process(name, sizes["Rss"], sizes["Pss"], "libtorch" in maps)


if __name__ == "__main__":
    main()
