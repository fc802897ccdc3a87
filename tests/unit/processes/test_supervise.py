"""Promises of the supervisor, kept by real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outcrop.processes.spawn import READY_LINE, ChildSpec
from outcrop.processes.supervise import (
    CRASH_LOOP_FAILURES,
    ChildError,
    ChildState,
    ChildStatus,
    Supervisor,
    describe_exit,
)

SLEEPS = "import time; time.sleep(60)"
IGNORES_TERM = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "os.write(int(os.environ['READY_FD']), b'deaf\\n')\n"
    "time.sleep(60)"
)
ENDS = "import sys; print('it broke', flush=True); sys.exit(7)"


class Watched:
    """A supervisor that notes what it reports."""

    def __init__(self) -> None:
        self.ready: list[ChildStatus] = []
        self.exits: list[ChildStatus] = []
        self.supervisor = Supervisor(
            on_ready=self.ready.append,
            on_exit=self.exits.append,
        )

    def pid(self, name: str) -> int:
        status = self.supervisor.status(name)
        assert status is not None
        assert status.pid is not None
        return status.pid


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    yield watched
    watched.supervisor.stop_all(1)


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., ChildSpec]:
    def make(name: str, program: str = SLEEPS, **fields: object) -> ChildSpec:
        return ChildSpec(
            name=name,
            command=(sys.executable, "-I", "-S", "-c", program),
            log_file=tmp_path / f"{name}.log",
            **fields,  # type: ignore[arg-type]
        )

    return make


Spec = Callable[..., ChildSpec]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_children_start_after_those_they_come_after(watched: Watched, spec: Spec) -> None:
    announces = "import os, time; os.write(int(os.environ['READY_FD']), b'up\\n'); time.sleep(60)"
    watched.supervisor.add(spec("store", announces, ready=READY_LINE))
    watched.supervisor.add(spec("gateway", announces, ready=READY_LINE, after=("store",)))

    watched.supervisor.wait_ready(timeout=20)

    assert [status.name for status in watched.ready] == ["store", "gateway"]
    assert watched.ready[0].ready_line == "up"
    assert [status.state for status in watched.supervisor.statuses()] == [ChildState.READY] * 2


def test_a_probe_decides_readiness(watched: Watched, spec: Spec, tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    watched.supervisor.add(spec("store", f"open({str(sign)!r}, 'w'); " + SLEEPS, ready=sign.exists))

    watched.supervisor.wait_ready(timeout=20)
    assert sign.exists()


def test_killed_child_is_started_again_at_once(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("worker"))
    watched.supervisor.wait_ready()
    first = watched.pid("worker")
    began = time.monotonic()

    os.kill(first, signal.SIGKILL)

    assert watched.supervisor.run(lambda: len(watched.ready) == 2, timeout=20)
    assert time.monotonic() - began < 5
    assert watched.pid("worker") != first
    assert watched.exits[0].exit_code == -signal.SIGKILL
    assert watched.exits[0].num_failures == 1


def test_crash_loop_is_slowed_and_reported_once(
    watched: Watched, spec: Spec, caplog: pytest.LogCaptureFixture
) -> None:
    watched.supervisor.add(spec("worker", ENDS))
    began = time.monotonic()

    assert watched.supervisor.run(lambda: len(watched.exits) == CRASH_LOOP_FAILURES, timeout=30)

    # The first start again is at once, the next two after 0.5 s and 1 s.
    assert time.monotonic() - began >= 1.5
    assert [status.failing for status in watched.exits] == [False, False, False, True]
    assert watched.exits[-1].exit_code == 7
    told = [line for line in caplog.messages if line.startswith("worker keeps ending")]
    assert len(told) == 1
    assert "it broke" in told[0]


def test_wait_for_a_crash_loop_ends_with_its_reason(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("worker", ENDS, ready=READY_LINE))

    with pytest.raises(ChildError, match=r"worker cannot be started \(exit code 7\)(.|\n)*broke"):
        watched.supervisor.wait_ready(timeout=30)


def test_child_that_may_not_restart_ends_the_wait_at_once(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("server", ENDS, ready=READY_LINE, restart=False))

    with pytest.raises(ChildError, match="server cannot be started"):
        watched.supervisor.wait_ready(timeout=30)
    status = watched.supervisor.status("server")
    assert status is not None
    assert status.state is ChildState.ENDED


def test_wait_that_is_given_up_ends_at_once(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("gateway", ready=READY_LINE))
    asked = iter([False, True])

    assert not watched.supervisor.wait_ready(timeout=30, give_up=lambda: next(asked))


def test_wait_ends_when_a_child_is_late(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("gateway", ready=READY_LINE))

    with pytest.raises(ChildError, match=r"gateway was not ready within 0\.2 s"):
        watched.supervisor.wait_ready(timeout=0.2)


def test_child_that_never_gets_ready_is_ended_and_counts_as_failed(
    watched: Watched, spec: Spec
) -> None:
    watched.supervisor.add(spec("gateway", ready=READY_LINE, ready_seconds=0.1))

    assert watched.supervisor.run(lambda: bool(watched.exits), timeout=20)
    assert watched.exits[0].exit_code == -signal.SIGKILL
    assert watched.exits[0].num_failures == 1
    assert not watched.ready


def test_child_whose_program_is_missing_is_reported(
    watched: Watched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = ChildSpec("store", ("no-such-program",), tmp_path / "log", restart=False)
    watched.supervisor.add(spec)

    with pytest.raises(ChildError, match=r"store cannot be started \(exit code 127\)"):
        watched.supervisor.wait_ready(timeout=5)
    assert "no-such-program" in caplog.text


def test_children_come_and_go_at_run_time(watched: Watched, spec: Spec) -> None:
    supervisor = watched.supervisor
    supervisor.add(spec("worker"))
    supervisor.wait_ready()
    supervisor.add(spec("server:a"))
    supervisor.wait_ready()
    server, worker = watched.pid("server:a"), watched.pid("worker")

    supervisor.remove("server:a")
    supervisor.remove("server:unknown")

    assert supervisor.run(lambda: supervisor.status("server:a") is None, timeout=20)
    assert is_gone(server)
    assert watched.pid("worker") == worker
    assert [status.name for status in watched.exits] == ["server:a"]
    assert watched.exits[0].num_failures == 0


def test_restart_is_no_failure(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("gateway"))
    watched.supervisor.wait_ready()
    first = watched.pid("gateway")

    watched.supervisor.restart("gateway")

    assert watched.supervisor.run(lambda: len(watched.ready) == 2, timeout=20)
    assert watched.pid("gateway") != first
    assert watched.exits[0].num_failures == 0


def test_callback_may_remove_the_child_that_ended(spec: Spec) -> None:
    supervisor = Supervisor(on_exit=lambda status: supervisor.remove(status.name))
    supervisor.add(spec("server", ENDS, restart=False))

    assert supervisor.run(lambda: not supervisor.statuses(), timeout=20)


def test_refresh_changes_what_is_started(watched: Watched, spec: Spec, tmp_path: Path) -> None:
    specs = [spec("store", "pass", nice=1), spec("store")]

    watched.supervisor.add(specs[0], refresh=lambda old: specs.pop(0))

    # The first one ends by itself, the second stays.
    assert watched.supervisor.run(lambda: len(watched.ready) == 2, timeout=20)
    assert specs == []


def test_names_are_unique_and_known(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("worker"))

    with pytest.raises(ValueError, match="already a child named worker"):
        watched.supervisor.add(spec("worker"))
    with pytest.raises(ValueError, match="gateway comes after store, which is not here"):
        watched.supervisor.add(spec("gateway", after=("store",)))


def test_stop_all_ends_deaf_children_within_its_time(watched: Watched, spec: Spec) -> None:
    supervisor = watched.supervisor
    supervisor.add(spec("store", IGNORES_TERM, ready=READY_LINE))
    supervisor.add(spec("gateway", IGNORES_TERM, ready=READY_LINE, after=("store",)))
    supervisor.add(spec("worker", IGNORES_TERM, ready=READY_LINE))
    supervisor.wait_ready(timeout=20)
    pids = [watched.pid(name) for name in ("store", "gateway", "worker")]
    began = time.monotonic()

    supervisor.stop_all(2)

    assert time.monotonic() - began < 2.5
    assert all(is_gone(pid) for pid in pids)
    assert supervisor.statuses() == []


def test_stop_all_ends_those_that_come_after_first(watched: Watched, spec: Spec) -> None:
    supervisor = watched.supervisor
    supervisor.add(spec("store"))
    supervisor.add(spec("gateway", after=("store",)))
    supervisor.add(spec("console", after=("gateway",)))
    supervisor.wait_ready(timeout=20)
    began = time.monotonic()

    supervisor.stop_all(10)

    assert [status.name for status in watched.exits] == ["console", "gateway", "store"]
    assert all(status.exit_code == -signal.SIGTERM for status in watched.exits)
    assert time.monotonic() - began < 5


def test_nothing_is_started_again_while_all_is_stopped(watched: Watched, spec: Spec) -> None:
    watched.supervisor.add(spec("worker"))
    watched.supervisor.wait_ready()

    watched.supervisor.stop_all(10)
    watched.supervisor.tick()

    assert len(watched.ready) == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (-9, "signal SIGKILL"), (-99, "signal 99")],
)
def test_exit_codes_are_said_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words
