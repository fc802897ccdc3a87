"""Start a command that cannot outlive the process which asked for it.

Run by `spawn` as a script of its own (`python -I -S launch.py ...`): it becomes the command by
exec, so the process id and the session stay the same. It uses the standard library only.

On Linux the kernel ends the child: PR_SET_PDEATHSIG, kept over exec. Elsewhere a watcher process
waits for the end of a pipe that only the parent holds open, and then kills the process group.
This is not a `preexec_fn` of subprocess, because that runs Python between fork and exec of a
process that has threads, which can deadlock; this costs about 15 ms and cannot.
Source: prctl(2), section PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import os
import select
import signal
import sys

KERNEL = "kernel"
"""The kernel sends SIGKILL when the parent's thread that started the child ends."""
PIPE = "pipe"
"""A watcher sends SIGKILL to the group when the pipe from the parent closes."""

_PR_SET_PDEATHSIG = 1
# How soon the watcher notices that the child it watches has ended by itself.
_WATCH_SECONDS = 1.0
EXIT_CANNOT_RUN = 127
"""As shells have it."""


def main(arguments: list[str]) -> None:
    """Become the command.

    Args:
        arguments: KERNEL or PIPE, the parent's process id, the pipe's descriptor (-1 with KERNEL),
            the niceness to add, then the command itself.
    """
    way, parent, pipe, niceness, *command = arguments
    if way == KERNEL:
        _die_with_thread()
    else:
        _start_watcher(int(pipe))
    if os.getppid() != int(parent):  # it ended before the line above could take hold
        os._exit(EXIT_CANNOT_RUN)
    if int(niceness):
        _be_nice(int(niceness))
    # Python ignores SIGPIPE, and what is ignored stays so over exec; so does a signal mask.
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be run: {error.strerror}\n".encode())
        os._exit(EXIT_CANNOT_RUN)


def _be_nice(niceness: int) -> None:
    """Leave the cores to others, also where the kernel shares them out by session.

    With autogroups (the default of desktop kernels) niceness counts only among the processes of
    one session, and this process leads a session of its own: the group must be nice as a whole.
    Source: sched(7), section "The autogroup feature".
    """
    os.nice(niceness)
    try:
        group = os.open("/proc/self/autogroup", os.O_WRONLY)
        os.write(group, str(niceness).encode())
        os.close(group)
    except OSError:
        pass  # no autogroups here, or another system


def _die_with_thread() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        os.write(2, b"prctl(PR_SET_PDEATHSIG) failed; the process is not started\n")
        os._exit(EXIT_CANNOT_RUN)


def _start_watcher(pipe: int) -> None:
    """Fork twice, so that the command does not find a child it never started."""
    leader = os.getpid()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            _watch(pipe, leader)
        os._exit(0)
    os.waitpid(middle, 0)
    os.close(pipe)


def _watch(pipe: int, leader: int) -> None:
    # It stays in the group it kills, so it can never be left behind; only the polite signals of
    # `Child.terminate` must not end it.
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    # The log and the readiness pipe belong to the command: held open here, their end is not seen.
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(3, pipe)
    os.closerange(pipe + 1, 256)
    while True:
        closed, _, _ = select.select([pipe], [], [], _WATCH_SECONDS)
        if closed:
            os.killpg(leader, signal.SIGKILL)
        try:
            os.kill(leader, 0)
        except ProcessLookupError:
            os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
