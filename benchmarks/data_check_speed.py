"""How fast is a data file checked, in what memory, and next to datasets with datasketch?

Files of generated prompt/completion records of about 1 KB, one in 50 of them an exact duplicate,
one in 50 a near duplicate, are checked with every rule, their tokens counted by the shipped model's
tokenizer: 10,000, 100,000 and 1,000,000 records, each in a fresh process. The peer (see
`data_check_peer.py`) checks the same 100,000.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.running import write_result
from tests.assets.planted import WORDS
from tests.assets.smollm2 import smollm2_folder

BASE = "huggingfacetb.smollm2-135m-instruct-v1:0"
PEER = "datasets + datasketch"
REPEATED = 50
NUM_WORDS = 30_000
ROOT = Path(__file__).parents[1]


def write_file(path: Path, count: int, seed: int) -> None:
    """Write pairs whose words are drawn as rarely as those of a language (Zipf's law)."""
    draw = random.Random(seed)
    syllables = sorted({word[:3] for word in WORDS} | {word[-3:] for word in WORDS})
    made = {"".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(2 * NUM_WORDS)}
    words = [*WORDS, *sorted(made)[: NUM_WORDS - len(WORDS)]]
    weights = list(itertools.accumulate(1 / (place + 1) for place in range(len(words))))

    def text(low: int, high: int) -> str:
        drawn = draw.choices(words, cum_weights=weights, k=draw.randint(low, high))
        drawn[::9] = [f"{word}," for word in drawn[::9]]
        return " ".join(drawn).capitalize() + "."

    previous: dict[str, str] = {}
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            record = {
                "prompt": f"Summarize the following text.\n\n{text(40, 160)}\n\nSummary:",
                "completion": f" {text(10, 36)}",
            }
            if number % REPEATED == REPEATED - 1:
                record = previous
            elif number % REPEATED == REPEATED // 2 - 1:
                near = previous["prompt"].replace("Summary:", "In short, the summary:")
                record = {**previous, "prompt": near}
            previous = record
            stream.write(json.dumps(record) + "\n")


def check_one(file: Path, tokenizer: Path) -> None:
    """Check one file here, and print what it took as JSON."""
    from outcrop.data.check import check_files
    from outcrop.data.render import Renderer
    from outcrop.data.sources import local_file
    from outcrop.models.catalog import shipped_models

    base = next(model for model in shipped_models() if model.model_id == BASE)
    check = check_files(
        [local_file(file)],
        base=base,
        renderer=Renderer(tokenizer),
        max_training_records=10**9,
    )
    assert check.tokens is not None
    print(
        json.dumps(
            {
                "records": check.files[0].num_records,
                "tokens": check.tokens.epoch_tokens,
                "exact": check.num_exact_duplicates,
                "near": check.num_near_duplicates,
                "check_seconds": check.seconds,
            }
        )
    )


def run(command: list[str], **environment: str) -> dict[str, float]:
    """Run a program; return what it printed, its time, processor time and peak memory.

    Memory is the sum of the resident sets of the process and all below it, read every 0.1 s.
    """
    began = time.perf_counter()
    before = os.times()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, **environment}, cwd=ROOT
    )
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    after = os.times()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return {
        **json.loads(output.splitlines()[-1]),
        "wall": time.perf_counter() - began,
        "cpu": after.children_user
        + after.children_system
        - before.children_user
        - before.children_system,
        "megabytes": peak / 1e6,
    }


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and of all that it started."""
    children: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pages = int((folder / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(folder.name))
        sizes[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE")
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        total += sizes.get(one, 0)
        waiting += children.get(one, [])
    return total


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--peer-python", help="of an environment with requirements-data.txt")
    parser.add_argument("--name", default="data_check_speed", help="of the page")
    parser.add_argument("--peer-records", type=int, default=100_000)
    parser.add_argument(
        "--check",
        type=Path,
        nargs=2,
        metavar=("FILE", "FOLDER"),
        help="check one file with the tokenizer of a folder, and print one line",
    )
    arguments = parser.parse_args()
    if arguments.check:
        check_one(*arguments.check)
        return
    table = [
        [
            "who",
            "records",
            "file, MB",
            "seconds",
            "processor seconds",
            "memory, MB",
            "tokens",
            "exact, near duplicates",
        ]
    ]
    took: dict[tuple[str, int], float] = {}
    model = smollm2_folder()
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(
            {*arguments.records, *([arguments.peer_records] if arguments.peer_python else [])}
        ):
            file = Path(folder) / f"{count}.jsonl"
            write_file(file, count, seed=count)
            ours = (sys.executable, "-m", "benchmarks.data_check_speed", "--check")
            peers = (arguments.peer_python, "-m", "benchmarks.data_check_peer")
            programs = []
            if count in arguments.records:
                programs.append(("Outcrop", [*ours, str(file), str(model)]))
            if arguments.peer_python and count == arguments.peer_records:
                programs.append((PEER, [*peers, str(file), str(model / "tokenizer.json")]))
            for who, command in programs:
                found = run(command, PYTHONPATH=str(ROOT / "src"))
                took[who, count] = found["wall"]
                row = [
                    who,
                    f"{count:,}",
                    f"{file.stat().st_size / 1e6:.0f}",
                    f"{found['wall']:.1f}",
                    f"{found['cpu']:.1f}",
                    f"{found['megabytes']:.0f}",
                    f"{found['tokens']:,}",
                    f"{found['exact']:,}, {found['near']:,}",
                ]
                table.append(row)
                print(" | ".join(row), flush=True)
            file.unlink()
    notes = (
        "Wall time of a whole program, the interpreter's start and the tokenizer's loading "
        "included. Both count tokens of prompt and completion; Outcrop adds the template's. "
        "Outcrop also looks for contradictions, labels, languages and outliers, which the peer "
        "does not."
    )
    peer = took.get((PEER, arguments.peer_records))
    own = took.get(("Outcrop", arguments.peer_records))
    if peer and own:
        notes = f"Outcrop is {peer / own:.1f} times as fast here. {notes}"
    write_result(
        arguments.name,
        "Generated prompt/completion records, every rule, tokens counted, exact and near "
        "duplicates found. Each row is a fresh program; memory is the sum over its processes, read "
        "every 0.1 s.",
        table,
        notes,
    )


if __name__ == "__main__":
    main()
