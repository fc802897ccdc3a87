"""What the benchmarks share: a service of their own, and the dated page that a result becomes."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from outcrop import __version__

RESULTS = Path(__file__).parent / "results"
OUTCROP = (sys.executable, "-m", "outcrop")
STOP_SECONDS = 15


@dataclass(frozen=True)
class Running:
    """A service that was started for a measurement."""

    url: str
    pid: int
    seconds_to_ready: float
    """From the start of the process to its line `ready URL`."""
    variables: dict[str, str | None]
    """What `outcrop env` prints."""

    def credentials(self) -> dict[str, str]:
        """Return the arguments with which boto3 makes a client of this service."""
        names = {
            "endpoint_url": "AWS_ENDPOINT_URL",
            "aws_access_key_id": "AWS_ACCESS_KEY_ID",
            "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "region_name": "AWS_REGION",
        }
        return {argument: self.variables[name] or "" for argument, name in names.items()}


@contextmanager
def running_service(data_dir: Path, settings: Mapping[str, str] | None = None) -> Iterator[Running]:
    """Run `outcrop serve` on a free port; its messages go to `serve.log` beside the directory.

    Args:
        settings: environment variables beside this process's own.
    """
    with (data_dir.parent / "serve.log").open("ab") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            (*OUTCROP, "serve", "--port", "0", "--data-dir", str(data_dir)),
            env={**os.environ, **(settings or {})},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            word, _, url = process.stdout.readline().strip().partition(" ")
            seconds = time.perf_counter() - started
            if word != "ready":
                sys.exit(f"the service did not start; see {log.name}")
            printed = subprocess.run(
                (*OUTCROP, "env", "--data-dir", str(data_dir), "--shell", "json"),
                capture_output=True,
                check=True,
            ).stdout
            yield Running(url, process.pid, seconds, json.loads(printed))
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


def write_result(subject: str, how: str, table: Sequence[Sequence[str]], notes: str) -> Path:
    """Write `results/<date>_<hardware>_<subject>.md` and print its table.

    Args:
        how: how the numbers were read, in sentences.
        table: the heading row, then the others.
        notes: what was not measured, and what to bear in mind.
    """
    now = datetime.now(UTC)
    rows = table_lines(table)
    text = "\n".join(
        [
            f"# {subject.replace('_', ' ').capitalize()}, {now:%Y-%m-%d}",
            "",
            f"- Hardware: {hardware()}, {platform.system()} {platform.machine()}",
            f"- Load average at the end: {', '.join(f'{load:.1f}' for load in os.getloadavg())}",
            f"- Versions: Python {platform.python_version()}, outcrop {__version__}"
            f"{revision()}, torch {version('torch')}",
            f"- Command: `{shlex.join(['python', '-m', *module_arguments()])}`",
            "",
            how,
            "",
            *rows,
            "",
            notes,
            "",
        ]
    )
    RESULTS.mkdir(exist_ok=True)
    name = f"{now:%Y-%m-%d}_{os.cpu_count()}-cores-{platform.machine()}_{subject}.md"
    path = RESULTS / name
    path.write_text(text, encoding="utf-8")
    print("\n".join(rows))
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
    return path


def table_lines(table: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as Markdown, its first row as the heading."""
    rows = ["| " + " | ".join(row) + " |" for row in table]
    return [rows[0], "|" + "---|" * len(table[0]), *rows[1:]]


def module_arguments() -> list[str]:
    """Return how this program was called, as `python -m` takes it, without this machine's paths."""
    given = ["PATH" if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    return [f"benchmarks.{Path(sys.argv[0]).stem}", *given]


def hardware() -> str:
    """Return the processor's name, the number of cores and the memory, as Linux tells them."""
    name = platform.processor() or "unknown processor"
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    memory = ""
    if meminfo.exists():
        kib = int(meminfo.read_text(encoding="utf-8").split("MemTotal:")[1].split()[0])
        memory = f", {kib / 2**20:.0f} GiB"
    return f"{name}, {os.cpu_count()} cores{memory}"


def revision() -> str:
    """Return the checkout's revision in brackets, or nothing where there is none."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return f" ({answer.stdout.strip()})" if answer.returncode == 0 else ""


def busy_seconds() -> float:
    """Return how long the machine's cores have worked since it started, all processes together."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def child_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
