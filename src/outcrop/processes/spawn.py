"""Start one child process that ends with its parent.

A child leads a session of its own, so that a Ctrl-C at the terminal reaches only the parent and a
signal can reach the child's whole process group. Its output goes to a log file of bounded size.
It ends when the parent ends, even by SIGKILL: see `launch`.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from outcrop.processes import launch
from outcrop.processes.ready import READY_VARIABLE

READY_LINE = "line"
"""`ChildSpec.ready` of a child that calls `announce_ready`."""

_POLL_SECONDS = 0.01
# What children write (data, models, sockets) is for the owner of the service alone.
_UMASK = 0o077
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class ChildSpec:
    """How to start a process, to know that it is ready, and to end it."""

    name: str
    """What logs and messages call it."""
    command: tuple[str, ...]
    """Program and arguments. Nothing secret: every user of the machine can read it."""
    log_file: Path
    """Gets standard output and error, appended; its folder is made. Mode 600."""
    environment: Mapping[str, str] | None = None
    """The whole environment of the child; None means a copy of the parent's."""
    working_directory: Path | None = None
    ready: str | Callable[[], bool] | None = None
    """READY_LINE: the child announces itself. A callable: asked again and again, must answer
    within a fraction of a second. None: ready as soon as it runs."""
    ready_seconds: float = 60.0
    """A child that is not ready after so long is ended and counted as failed."""
    restart: bool = True
    """Whether a supervisor starts it again when it ends."""
    after: tuple[str, ...] = ()
    """Names of children that must be ready before this one starts; it is stopped before them."""
    stop_signal: int = signal.SIGTERM
    stop_seconds: float = 5.0
    """How long the stop signal may take before SIGKILL follows."""
    nice: int = 0
    """Added to the niceness; a positive number leaves the cores to others."""
    keep_log_bytes: int = 10_000_000
    """Size at which the log becomes `<log_file>.1` and begins anew."""


class Child:
    """A running or ended process; made by `spawn` only. For one thread at a time."""

    def __init__(
        self, spec: ChildSpec, process: subprocess.Popen[bytes], ready_pipe: int | None
    ) -> None:
        self.spec = spec
        self.started_at = time.monotonic()
        """When it was started, on the monotonic clock."""
        self._process = process
        self._ready_pipe = ready_pipe
        self._ready_bytes = b""

    @property
    def pid(self) -> int:
        """The process id; also the id of its session and process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; a signal's number is negative.

        Also keeps the log within its bound, so call it now and then. When the process has ended,
        whatever is left of its process group is killed.
        """
        running = self._process.returncode is None
        code = self._process.poll()
        if code is None:
            bound_log(self.spec.log_file, self.spec.keep_log_bytes)
        elif running:
            # The id is not reused in the instant between the reaping and this line: the kernel
            # hands ids out in turn.
            self._signal_group(signal.SIGKILL)
            self._close_ready_pipe()
        return code

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the exit code, or None if it still runs after `timeout` seconds (None: no end)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_SECONDS)
        return code

    def signal(self, number: int) -> None:
        """Send a signal to the whole process group; nothing happens when it has ended."""
        if self._process.returncode is None:
            self._signal_group(number)

    def terminate(self, stop_seconds: float | None = None) -> int:
        """End the process group: the stop signal, then SIGKILL. Returns the exit code.

        Args:
            stop_seconds: time between the two; None means the spec's.
        """
        self.signal(self.spec.stop_signal)
        code = self.wait(self.spec.stop_seconds if stop_seconds is None else stop_seconds)
        return self.kill() if code is None else code

    def kill(self) -> int:
        """Send SIGKILL to the process group and wait for the end. Returns the exit code."""
        self.signal(signal.SIGKILL)
        code = self.wait()
        assert code is not None
        return code

    def read_ready(self, timeout: float = 0.0) -> str | None:
        """Return the line the child announced itself with, once; None where none came.

        Args:
            timeout: seconds to wait for it. The wait ends early when the child has closed the
                pipe without a line, as it does by ending.
        """
        deadline = time.monotonic() + timeout
        while self._ready_pipe is not None:
            left = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._ready_pipe], [], [], left)
            if not readable:
                return None
            read = os.read(self._ready_pipe, 4096)
            self._ready_bytes += read
            if b"\n" in self._ready_bytes:
                self._close_ready_pipe()
                return self._ready_bytes.split(b"\n", 1)[0].decode(errors="replace")
            if not read:
                self._close_ready_pipe()
        return None

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _close_ready_pipe(self) -> None:
        if self._ready_pipe is not None:
            os.close(self._ready_pipe)
            self._ready_pipe = None


def spawn(spec: ChildSpec, *, way: str | None = None) -> Child:
    """Start a child that cannot outlive this process.

    Call it from the main thread: on Linux the kernel ends the child when the *thread* that started
    it ends, so a child started by a short-lived thread would die with that thread.

    Args:
        spec: what to start.
        way: `launch.KERNEL` or `launch.PIPE`; None takes KERNEL on Linux, else PIPE.
    Raises:
        RuntimeError: not called from the main thread.
        FileNotFoundError: the program does not exist.
    Source: prctl(2): "the 'parent' in this case is considered to be the thread that created this
        process".
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            f"{spec.name} must be started from the main thread: it ends with the thread that "
            "starts it."
        )
    way = way or (launch.KERNEL if sys.platform == "linux" else launch.PIPE)
    environment = dict(os.environ if spec.environment is None else spec.environment)
    program = shutil.which(spec.command[0], path=environment.get("PATH"))
    if program is None:
        raise FileNotFoundError(f"{spec.name}: there is no program {spec.command[0]}.")

    environment.pop(READY_VARIABLE, None)
    inherited: list[int] = []
    ready_read: int | None = None
    ready_write: int | None = None
    pipe = -1
    log = _open_log(spec)
    try:
        if spec.ready == READY_LINE:
            ready_read, ready_write = os.pipe()
            environment[READY_VARIABLE] = str(ready_write)
            inherited.append(ready_write)
        if way == launch.PIPE:
            pipe = _lifeline()
            inherited.append(pipe)
        process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", launch.__file__),
                *(way, str(os.getpid()), str(pipe), str(spec.nice)),
                *(program, *spec.command[1:]),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=spec.working_directory,
            umask=_UMASK,
            pass_fds=inherited,
            start_new_session=True,
        )
    except BaseException:
        if ready_read is not None:
            os.close(ready_read)
        raise
    finally:
        os.close(log)
        if ready_write is not None:
            os.close(ready_write)
    return Child(spec, process, ready_read)


_lifeline_pipe: tuple[int, int] | None = None


def _lifeline() -> int:
    """Return the end for children of a pipe that closes when this process ends.

    The other end is never closed: its life is the process's own.
    """
    global _lifeline_pipe
    if _lifeline_pipe is None:
        _lifeline_pipe = os.pipe()
    return _lifeline_pipe[0]


def _open_log(spec: ChildSpec) -> int:
    spec.log_file.parent.mkdir(parents=True, exist_ok=True)
    bound_log(spec.log_file, spec.keep_log_bytes)
    return os.open(spec.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def bound_log(file: Path, keep_bytes: int) -> None:
    """Move a log that is larger than `keep_bytes` to `<file>.1`, at most that many bytes of it.

    The file is copied and emptied, not renamed: a running process goes on writing to it (it was
    opened to append, so it writes at the new end). Lines written between the copy and the emptying
    are lost. Together the two files hold at most `2 * keep_bytes` and what is written between two
    calls.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return
    if size <= keep_bytes:
        return
    old = file.with_name(file.name + ".1")
    with file.open("rb") as source, open(old, "wb", opener=_private) as target:
        source.seek(size - keep_bytes)
        left = keep_bytes
        while left > 0 and (block := source.read(min(left, _COPY_BYTES))):
            target.write(block)
            left -= len(block)
    os.truncate(file, 0)


def log_tail(file: Path, num_bytes: int = 2000) -> str:
    """Return the end of a log, for messages about a child that failed; "" where there is none."""
    try:
        with file.open("rb") as source:
            source.seek(0, os.SEEK_END)
            source.seek(max(0, source.tell() - num_bytes))
            return source.read(num_bytes).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
