"""Promises of spawning, kept by real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from outcrop.processes import launch
from outcrop.processes.spawn import READY_LINE, Child, ChildSpec, bound_log, log_tail, spawn

WAYS = [launch.PIPE]
if sys.platform == "linux":
    WAYS.append(launch.KERNEL)

Start = Callable[..., Child]


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def tail(child: Child) -> str:
    return log_tail(child.spec.log_file)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie that nobody reaps."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc/self").exists()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Spawns Python programs and ends what a test left running."""
    children: list[Child] = []

    def start_program(program: str, *, way: str | None = None, **fields: object) -> Child:
        spec = ChildSpec(
            name="child",
            command=(sys.executable, "-I", "-S", "-c", program),
            log_file=tmp_path / "logs" / "child.log",
            **fields,  # type: ignore[arg-type]
        )
        child = spawn(spec, way=way)
        children.append(child)
        return child

    yield start_program
    for child in children:
        child.kill()


IGNORES_TERM = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ignoring", flush=True)
time.sleep(60)
"""
GRANDCHILD = """
import os, time
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""


def test_exit_code_and_output_are_kept(start: Start, way: str) -> None:
    child = start(
        "import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)", way=way
    )

    assert child.wait(15) == 3
    assert child.poll() == 3
    log = child.spec.log_file
    assert set(log.read_text().split("\n")) == {"to out", "to err", ""}
    assert log.stat().st_mode & 0o777 == 0o600


def test_child_leads_its_own_session(start: Start, way: str) -> None:
    child = start("import os; print(os.getsid(0), os.getpgrp(), os.getpid())", way=way)

    assert child.wait(15) == 0
    assert tail(child) == f"{child.pid} {child.pid} {child.pid}"


def test_child_has_no_blocked_signals_and_its_niceness(start: Start) -> None:
    own = os.nice(0)
    program = "import os, signal; print(os.nice(0), signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        child = start(program, nice=3)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])

    assert child.wait(15) == 0
    assert tail(child) == f"{own + 3} set()"


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="this kernel does not group by session"
)
def test_a_nice_child_is_nice_to_other_sessions_too(start: Start) -> None:
    child = start("print(open('/proc/self/autogroup').read())", nice=7)
    assert child.wait(15) == 0
    assert tail(child).endswith("nice 7")


def test_terminate_ends_a_polite_child_at_once(start: Start, way: str) -> None:
    child = start("import time; print('up', flush=True); time.sleep(60)", way=way)
    until(lambda: tail(child))
    began = time.monotonic()

    assert child.terminate(30) == -signal.SIGTERM
    assert time.monotonic() - began < 10
    assert not is_running(child.pid)


def test_child_that_ignores_the_stop_signal_is_killed_in_time(start: Start, way: str) -> None:
    child = start(IGNORES_TERM, way=way)
    until(lambda: tail(child))
    began = time.monotonic()

    assert child.terminate(0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - began < 5


def test_terminate_ends_the_whole_process_group(start: Start, way: str) -> None:
    child = start(GRANDCHILD, way=way)
    until(lambda: tail(child))
    grandchild = int(tail(child))

    child.terminate(5)
    until(lambda: not is_running(grandchild))
    assert not is_running(child.pid)


def test_what_a_dead_child_leaves_behind_is_killed(start: Start, way: str) -> None:
    child = start(GRANDCHILD.replace("time.sleep(60)", "if not child: time.sleep(60)"), way=way)

    assert child.wait(15) == 0
    grandchild = int(tail(child))
    until(lambda: not is_running(grandchild))
    assert tail(child) == str(grandchild)


PARENT = """
import sys, time
from pathlib import Path
from outcrop.processes.spawn import ChildSpec, spawn
log, way, program = sys.argv[1:]
child = spawn(ChildSpec("child", (sys.executable, "-c", program), Path(log)), way=way)
print(child.pid, flush=True)
time.sleep(60)
"""


def test_kill_9_of_the_parent_ends_child_and_its_children(
    start: Start, tmp_path: Path, way: str
) -> None:
    """A tree of three: this test, a parent, its child, and with `spawn` again a grandchild."""
    parent_file = tmp_path / "parent.py"
    parent_file.write_text(PARENT)
    arguments = ["", str(tmp_path / "grandchild.log"), way, "import time; time.sleep(60)"]
    nested = f"import sys; sys.argv = {arguments!r}; exec(open({str(parent_file)!r}).read())"
    spec = ChildSpec(
        name="parent",
        command=(sys.executable, str(parent_file), str(tmp_path / "child.log"), way, nested),
        log_file=tmp_path / "parent.log",
    )
    parent = spawn(spec)
    try:
        until(lambda: tail(parent))
        until(lambda: (tmp_path / "child.log").exists() and (tmp_path / "child.log").read_text())
        child = int(tail(parent))
        grandchild = int((tmp_path / "child.log").read_text())
        assert is_running(child)
        assert is_running(grandchild)

        os.kill(parent.pid, signal.SIGKILL)

        until(lambda: not is_running(child))
        until(lambda: not is_running(grandchild))
    finally:
        parent.kill()


def test_child_does_not_start_when_its_parent_is_already_gone(way: str) -> None:
    """The launcher is told of a parent that is not its own: as if that one had just died."""
    no_such_process = "999999999"
    read_end, write_end = os.pipe()
    try:
        result = subprocess.run(
            [
                *(sys.executable, "-I", "-S", launch.__file__),
                *(way, no_such_process, str(read_end), "0"),
                *(sys.executable, "-c", "print('ran')"),
            ],
            pass_fds=[read_end],
            start_new_session=True,
            stdout=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(read_end)
        os.close(write_end)
    assert result.returncode == launch.EXIT_CANNOT_RUN
    assert result.stdout == b""


def test_missing_program_is_named(tmp_path: Path) -> None:
    spec = ChildSpec("store", ("no-such-program",), tmp_path / "log")

    with pytest.raises(FileNotFoundError, match="store: there is no program no-such-program"):
        spawn(spec)


def test_spawn_is_refused_outside_the_main_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def start_in_thread() -> None:
        try:
            spawn(ChildSpec("child", (sys.executable, "-c", ""), tmp_path / "log"))
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=start_in_thread)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


ANNOUNCES = (
    "import sys; sys.path[:0] = {path!r}\n"
    "from outcrop.processes.ready import announce_ready\n"
    "announce_ready('at 127.0.0.1:1')\n"
    "announce_ready('again')\n"
    "import os, time; print(os.environ.get('READY_FD'), flush=True); time.sleep(60)"
)


def test_child_announces_that_it_is_ready(start: Start, way: str) -> None:
    child = start(ANNOUNCES.format(path=sys.path), ready=READY_LINE, way=way)

    assert child.read_ready(15) == "at 127.0.0.1:1"
    assert child.read_ready(0) is None
    until(lambda: tail(child))
    assert tail(child) == "None"


def test_child_that_ends_without_a_word_ends_the_wait(start: Start, way: str) -> None:
    child = start("pass", ready=READY_LINE, way=way)
    began = time.monotonic()

    assert child.read_ready(30) is None
    assert time.monotonic() - began < 10
    assert child.wait(15) == 0


def test_wait_for_readiness_has_an_end(start: Start) -> None:
    child = start("import time; time.sleep(60)", ready=READY_LINE)

    assert child.read_ready(0.05) is None
    assert child.poll() is None


def test_log_of_a_long_lived_child_stays_bounded(start: Start) -> None:
    """The child goes on only while its log is small: it ends if someone keeps it small."""
    program = """
import os, time
for number in range(60):
    while os.fstat(1).st_size > 2000:
        time.sleep(0.001)
    print(f"{number:04} " + "x" * 95, flush=True)
print("end", flush=True)
time.sleep(60)
"""
    child = start(program, keep_log_bytes=1000)
    old = child.spec.log_file.with_name("child.log.1")

    def has_come_to_its_end() -> bool:
        assert child.poll() is None
        return tail(child).endswith("end") or (old.exists() and log_tail(old).endswith("end"))

    until(has_come_to_its_end, 60)
    assert child.spec.log_file.stat().st_size <= 2200
    assert old.stat().st_size == 1000
    assert old.stat().st_mode & 0o777 == 0o600


def test_bounded_log_keeps_the_newest_bytes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"old" * 10 + b"new")

    bound_log(log, 3)
    assert log.read_bytes() == b""
    assert (tmp_path / "log.1").read_bytes() == b"new"

    log.write_bytes(b"abc")
    bound_log(log, 3)
    assert log.read_bytes() == b"abc"


@pytest.mark.parametrize("fails_at", ["log", "program"])
def test_a_start_that_fails_leaves_no_descriptor_open(
    tmp_path: Path, way: str, fails_at: str
) -> None:
    log = tmp_path / "logs" / "child.log"
    spec = ChildSpec("child", (sys.executable,), log, ready=READY_LINE)
    if fails_at == "log":
        log.parent.touch()  # a file, where the folder of the log has to be
    else:
        spec = replace(spec, working_directory=tmp_path / "absent")
    for _ in range(2):  # the second time, what is opened once for all is open
        first_free = os.dup(0)
        os.close(first_free)
        with pytest.raises(OSError, match=r"logs|absent"):
            spawn(spec, way=way)
    found = os.dup(0)
    os.close(found)
    assert found == first_free
