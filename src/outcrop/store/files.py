"""Files that must be there after a power cut: brought to the disk before anything relies on them.

A database's commit is on the disk when it returns; a file that was only written is not, and neither
is its name in its folder. Who records that a file exists syncs both first.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def sync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring a folder with all that is below it to the disk, but not its own name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def write_private(path: Path, content: bytes, *, replace: bool = False) -> bool:
    """Write a file that only its owner can read, whole or not at all, and durably.

    Args:
        replace: whether a file that is there already is replaced.
    Returns:
        False where it was there and was left as it is.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 600
    new = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            new.replace(path)
        else:
            os.link(new, path)
    except FileExistsError:
        return False
    finally:
        new.unlink(missing_ok=True)
    sync(path.parent)
    return True
