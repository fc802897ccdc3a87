"""Keep several child processes running: in order, ready, restarted, and ended in time.

One thread, no signals of its own, no callbacks from other threads: the owner calls `run` or
`tick`, and everything happens inside those calls. A child that ends is started again at once, then
with growing pauses; one that keeps ending is reported, not hidden. Knows nothing of what the
children do.
"""

from __future__ import annotations

import enum
import logging
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from outcrop.errors import OutcropError
from outcrop.processes.launch import EXIT_CANNOT_RUN
from outcrop.processes.spawn import READY_LINE, Child, ChildSpec, log_tail, spawn

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
"""Pause before the second start in a row; the first one is at once. It doubles each time."""
LONGEST_PAUSE_SECONDS = 30.0
STEADY_SECONDS = 30.0
"""A child that was ready for so long has recovered: its failures are forgotten."""
CRASH_LOOP_FAILURES = 4
"""Failures in a row from which on a child is reported as failing."""

_BUSY_SECONDS = 0.02
_IDLE_SECONDS = 0.1


class ChildError(OutcropError):
    """A child process could not be made ready; the message has the end of its log."""


class ChildState(enum.Enum):
    """Where one child stands."""

    WAITING = "waiting"
    """It waits for those it comes after, or for its pause to be over."""
    STARTING = "starting"
    """It runs and is not ready yet."""
    READY = "ready"
    STOPPING = "stopping"
    """It was told to end."""
    ENDED = "ended"
    """It has ended and is not started again."""


@dataclass(frozen=True)
class ChildStatus:
    """What `Supervisor.status` tells of one child."""

    name: str
    state: ChildState
    pid: int | None
    """None while no process runs."""
    exit_code: int | None
    """Of its last process; None before the first has ended."""
    num_failures: int
    """In a row: starts that ended or were not ready in time since it was last steady."""
    ready_line: str
    """What it announced itself with; "" where it does not."""

    @property
    def failing(self) -> bool:
        """Whether it is in a crash loop."""
        return self.num_failures >= CRASH_LOOP_FAILURES


@dataclass
class _Entry:
    spec: ChildSpec
    state: ChildState = ChildState.WAITING
    child: Child | None = None
    exit_code: int | None = None
    num_failures: int = 0
    ready_line: str = ""
    start_at: float = 0.0
    ready_at: float = 0.0
    kill_at: float = 0.0
    remove: bool = False
    refresh: Callable[[ChildSpec], ChildSpec] | None = None


class Supervisor:
    """Children by name. Everything is done by the thread that calls, which must be the main one.

    Callbacks run inside `tick`; they may add and remove children.
    """

    def __init__(
        self,
        *,
        on_ready: Callable[[ChildStatus], None] | None = None,
        on_exit: Callable[[ChildStatus], None] | None = None,
    ) -> None:
        """
        Args:
            on_ready: called each time a child has become ready.
            on_exit: called each time a child's process has ended, asked for or not.
        """
        self._entries: dict[str, _Entry] = {}
        self._on_ready = on_ready
        self._on_exit = on_exit

    def add(
        self, spec: ChildSpec, *, refresh: Callable[[ChildSpec], ChildSpec] | None = None
    ) -> None:
        """Take a child on; `tick` starts it as soon as those it comes after are ready.

        Args:
            refresh: called before every start with the spec, returns the one to start: for what
                must be new each time, such as free ports. It keeps the name.
        Raises:
            ValueError: the name is taken, or `after` names a child that is not here.
        """
        if spec.name in self._entries:
            raise ValueError(f"There is already a child named {spec.name}.")
        unknown = [name for name in spec.after if name not in self._entries]
        if unknown:
            raise ValueError(f"{spec.name} comes after {unknown[0]}, which is not here.")
        self._entries[spec.name] = _Entry(spec, refresh=refresh)

    def remove(self, name: str) -> None:
        """Tell a child to end and forget it once it has; does not wait. Unknown: nothing."""
        entry = self._entries.get(name)
        if entry is None:
            return
        if entry.child is None:
            del self._entries[name]
            return
        entry.remove = True
        self._tell_to_end(entry)

    def restart(self, name: str) -> None:
        """End a child's process; it is started again as after any other end.

        Raises:
            KeyError: there is no such child.
        """
        entry = self._entries[name]
        if entry.child is not None and entry.state is not ChildState.STOPPING:
            self._tell_to_end(entry)

    def status(self, name: str) -> ChildStatus | None:
        """Return where a child stands, or None where there is none of that name."""
        entry = self._entries.get(name)
        return None if entry is None else _status(entry)

    def statuses(self) -> list[ChildStatus]:
        """Return where all children stand, in the order they were added."""
        return [_status(entry) for entry in self._entries.values()]

    def tick(self) -> None:
        """Do what is due now: reap, start, ask for readiness, kill. Takes milliseconds."""
        for name, entry in list(self._entries.items()):
            if self._entries.get(name) is not entry:
                continue  # a callback of an earlier one removed it
            if entry.child is None:
                self._start_if_due(entry)
            elif (code := entry.child.poll()) is not None:
                self._ended(entry, code)
            elif entry.state is ChildState.STARTING:
                self._check_ready(entry)
            elif entry.state is ChildState.STOPPING and time.monotonic() >= entry.kill_at:
                entry.child.kill()
            elif (
                entry.num_failures
                and entry.state is ChildState.READY
                and time.monotonic() >= entry.ready_at + STEADY_SECONDS
            ):
                entry.num_failures = 0

    def run(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Tick until the condition holds; returns whether it did before `timeout` seconds.

        The condition is asked after every tick, at least ten times a second.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.tick()
            if until():
                return True
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                return False
            pause = self._pause()
            time.sleep(pause if deadline is None else min(pause, deadline - now))

    def wait_ready(
        self,
        names: Iterable[str] | None = None,
        timeout: float = 60.0,
        *,
        give_up: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Tick until these children are ready (None: all of them); returns whether they are.

        Args:
            give_up: asked after every tick; the wait ends, and False is returned, where it holds.
        Raises:
            ChildError: one ended for good, is in a crash loop, or was not ready in time.
        """
        wanted = list(self._entries) if names is None else list(names)
        failed: list[str] = []
        given_up = False

        def settled() -> bool:
            nonlocal given_up
            given_up = give_up()
            failed[:] = [name for name in wanted if self._cannot_become_ready(name)]
            return (
                given_up
                or bool(failed)
                or all(self._entries[name].state is ChildState.READY for name in wanted)
            )

        in_time = self.run(settled, timeout)
        if given_up:
            return False
        if failed:
            raise ChildError(self._explain(failed[0], "cannot be started"))
        if not in_time:
            late = next(
                name for name in wanted if self._entries[name].state is not ChildState.READY
            )
            raise ChildError(self._explain(late, f"was not ready within {timeout:g} s"))
        return True

    def stop_all(self, seconds: float = 10.0) -> None:
        """End all children and forget them; those that come after others end before them.

        Takes at most `seconds` in total: what has not ended by its share of them is killed.
        """
        began = time.monotonic()
        ranks = self._ranks()
        groups = [
            [entry for name, entry in self._entries.items() if ranks[name] == rank]
            for rank in sorted(set(ranks.values()), reverse=True)
        ]
        # Killing and reaping take a moment too, even on a busy machine.
        left_for_stops = seconds * 0.9
        for position, group in enumerate(groups):
            needs = [max((e.spec.stop_seconds for e in g), default=0.0) for g in groups[position:]]
            left = max(0.0, began + left_for_stops - time.monotonic())
            scale = min(1.0, left / sum(needs)) if sum(needs) > 0 else 1.0
            for entry in group:
                entry.remove = True
                if entry.child is not None:
                    self._tell_to_end(entry, entry.spec.stop_seconds * scale)
            while any(entry.child is not None for entry in group):
                for entry in group:
                    if entry.child is None:
                        continue
                    if (code := entry.child.poll()) is not None:
                        self._ended(entry, code)
                    elif time.monotonic() >= entry.kill_at:
                        entry.child.kill()
                time.sleep(_BUSY_SECONDS)
        self._entries.clear()

    def _start_if_due(self, entry: _Entry) -> None:
        if entry.state is not ChildState.WAITING or time.monotonic() < entry.start_at:
            return
        for name in entry.spec.after:
            before = self._entries.get(name)
            if before is None or before.state is not ChildState.READY:
                return
        entry.ready_line = ""
        try:
            if entry.refresh is not None:
                entry.spec = entry.refresh(entry.spec)
            entry.child = spawn(entry.spec)
        except (OSError, OutcropError) as error:
            # A full disk, or no memory for a fork: that must not end all the others.
            log.error("%s cannot be started: %s", entry.spec.name, error)
            self._ended(entry, EXIT_CANNOT_RUN)
            return
        entry.state = ChildState.STARTING
        log.info("%s started, pid %d", entry.spec.name, entry.child.pid)
        self._check_ready(entry)

    def _check_ready(self, entry: _Entry) -> None:
        child = entry.child
        assert child is not None
        ready = entry.spec.ready
        if ready is None:
            is_ready = True
        elif ready == READY_LINE:
            line = child.read_ready()
            is_ready = line is not None
            entry.ready_line = line or ""
        else:
            assert callable(ready)
            is_ready = ready()
        if is_ready:
            entry.state = ChildState.READY
            entry.ready_at = time.monotonic()
            log.info("%s is ready after %.2f s", entry.spec.name, entry.ready_at - child.started_at)
            if self._on_ready is not None:
                self._on_ready(_status(entry))
        elif time.monotonic() >= child.started_at + entry.spec.ready_seconds:
            log.error(
                "%s was not ready within %g s and is ended",
                entry.spec.name,
                entry.spec.ready_seconds,
            )
            child.kill()

    def _ended(self, entry: _Entry, code: int) -> None:
        name, asked = entry.spec.name, entry.state is ChildState.STOPPING
        was_steady = (
            entry.state is ChildState.READY and time.monotonic() >= entry.ready_at + STEADY_SECONDS
        )
        entry.child = None
        entry.exit_code = code
        is_done = code == 0 and not entry.spec.restart
        if asked or is_done:
            log.info("%s ended (%s)", name, describe_exit(code))
        else:
            entry.num_failures = 1 if was_steady else entry.num_failures + 1
            log.warning("%s ended (%s) without being asked", name, describe_exit(code))
        if entry.remove:
            entry.state = ChildState.ENDED
            self._entries.pop(name, None)
        elif entry.spec.restart:
            entry.state = ChildState.WAITING
            pause = 0.0 if asked else _pause_after(entry.num_failures)
            entry.start_at = time.monotonic() + pause
            if pause:
                log.warning("%s starts again in %g s", name, pause)
        else:
            entry.state = ChildState.ENDED
        if self._on_exit is not None:
            self._on_exit(_status(entry))
        if not asked and entry.spec.restart and entry.num_failures == CRASH_LOOP_FAILURES:
            log.error(
                "%s keeps ending; the end of its log:\n%s", name, log_tail(entry.spec.log_file)
            )

    def _tell_to_end(self, entry: _Entry, stop_seconds: float | None = None) -> None:
        assert entry.child is not None
        seconds = entry.spec.stop_seconds if stop_seconds is None else stop_seconds
        kill_at = time.monotonic() + seconds
        if entry.state is ChildState.STOPPING:
            entry.kill_at = min(entry.kill_at, kill_at)
            return
        entry.state = ChildState.STOPPING
        entry.kill_at = kill_at
        entry.child.signal(entry.spec.stop_signal)

    def _cannot_become_ready(self, name: str) -> bool:
        entry = self._entries.get(name)
        if entry is None:
            raise KeyError(f"There is no child named {name}.")
        if entry.state is ChildState.ENDED:
            return True
        return entry.child is None and _status(entry).failing

    def _explain(self, name: str, what: str) -> str:
        entry = self._entries[name]
        message = f"{name} {what}"
        if entry.exit_code is not None:
            message += f" ({describe_exit(entry.exit_code)})"
        tail = log_tail(entry.spec.log_file) or "(nothing)"
        return f"{message}. The end of {entry.spec.log_file}:\n{tail}"

    def _ranks(self) -> dict[str, int]:
        """How many children must be ready, one after the other, before each one."""
        ranks: dict[str, int] = {}
        for name, entry in self._entries.items():
            # `after` names only what was added earlier, so it has its rank already; what was
            # removed since counts no more.
            ranks[name] = 1 + max(
                (ranks.get(before, -1) for before in entry.spec.after), default=-1
            )
        return ranks

    def _pause(self) -> float:
        moving = (ChildState.STARTING, ChildState.STOPPING, ChildState.WAITING)
        return (
            _BUSY_SECONDS
            if any(entry.state in moving for entry in self._entries.values())
            else _IDLE_SECONDS
        )


def describe_exit(code: int) -> str:
    """Say how a process ended, in words: `exit code 3`, `signal SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def _pause_after(num_failures: int) -> float:
    if num_failures <= 1:
        return 0.0
    return min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** (num_failures - 2))


def _status(entry: _Entry) -> ChildStatus:
    return ChildStatus(
        name=entry.spec.name,
        state=entry.state,
        pid=None if entry.child is None else entry.child.pid,
        exit_code=entry.exit_code,
        num_failures=entry.num_failures,
        ready_line=entry.ready_line,
    )
