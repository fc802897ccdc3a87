"""End what a process has started when the process ends, whatever started it and however it ends.

For processes that a library starts and that nobody tells of their parent's death. A watcher, this
file run as a script of its own, waits until its parent is gone and then kills the process group.
It uses the standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

LOOK_SECONDS = 0.2


def end_group_with_this_process() -> bool:
    """Start the watcher; returns whether there is one.

    Without a process group of its own, as when it was started from a shell, the process has none:
    others would be killed with it.
    """
    if os.getpgrp() != os.getpid():
        return False
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    nothing = subprocess.DEVNULL
    subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    return True


def main(leader: int) -> None:
    """Wait until `leader`, the parent, has ended, and kill its group."""
    for polite in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(polite, signal.SIG_IGN)
    while os.getppid() == leader:
        time.sleep(LOOK_SECONDS)
    os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
