"""Files of this machine, as a check takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from outcrop.data.facts import TRAINING, DataFile
from outcrop.errors import DataError


def local_file(path: Path, role: str = TRAINING, *, name: str | None = None) -> DataFile:
    """Return a file of this machine.

    Opening it raises DataError where it cannot be read, and closing it where it changed meanwhile.

    Args:
        name: what messages call it; None takes the path.
    """
    called = name or str(path)
    try:
        size = path.stat().st_size
    except OSError:
        size = None
    return DataFile(called, role, partial(_reading, path, called), size)


@contextmanager
def _reading(path: Path, name: str) -> Iterator[BinaryIO]:
    try:
        if path.is_dir():
            raise DataError(
                f"{name} is a directory. Name a file.", code="unreadable_file", file=name
            )
        stream = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}.", code="unreadable_file", file=name
        ) from error
    with stream:
        before = _state(path)
        yield stream
        position = stream.tell()
    now = _state(path)
    if now != before or position > before[1]:
        raise DataError(
            f"{name} changed while it was read: it had {before[1]:,} bytes and has "
            f"{f'{now[1]:,}' if now[1] >= 0 else 'none: it is gone'}. Check it again when nothing "
            "writes to it.",
            code="changed_while_read",
            file=name,
        )


def _state(path: Path) -> tuple[int, int, int]:
    """Return (inode, bytes, time of the last change); bytes are -1 where the file is gone."""
    try:
        found = path.stat()
    except OSError:
        return 0, -1, 0
    return found.st_ino, found.st_size, found.st_mtime_ns
