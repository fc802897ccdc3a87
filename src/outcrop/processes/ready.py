"""Tell the parent that this process can serve now.

The descriptor of the pipe comes in the environment variable READY_FD, as `spawn` sets it. Without
a parent that asked, nothing happens.
"""

from __future__ import annotations

import contextlib
import os

READY_VARIABLE = "READY_FD"


def announce_ready(line: str = "ready") -> None:
    """Write one line to the parent and close the pipe; later calls do nothing.

    Args:
        line: what the parent is to know, such as an address; without a line end.
    """
    descriptor = os.environ.pop(READY_VARIABLE, None)
    if descriptor is None:
        return
    # A parent that no longer listens is not this process's trouble.
    with contextlib.suppress(OSError), os.fdopen(int(descriptor), "wb") as pipe:
        pipe.write(line.encode() + b"\n")
