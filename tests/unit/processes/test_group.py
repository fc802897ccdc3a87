"""What a process has started ends with it, also when it is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

SECONDS = 30.0
LEADER = """
import subprocess, sys, time
from outcrop.processes.group import end_group_with_this_process
assert end_group_with_this_process()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie, which somebody else has to reap."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_killed_process_takes_what_it_started_with_it() -> None:
    command = [sys.executable, "-c", LEADER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout is not None
        child = int(leader.stdout.readline())
        assert is_running(child)
        leader.send_signal(signal.SIGKILL)
        leader.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while is_running(child):
        assert time.monotonic() < deadline, "the child has outlived its parent"
        time.sleep(0.02)


def test_a_process_in_the_group_of_others_kills_nobody() -> None:
    code = "import outcrop.processes.group as g; print(g.end_group_with_this_process())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=SECONDS
    )
    assert found.stdout.strip() == b"False"
