"""Write a file whole or not at all: under a temporary name, synced, then renamed.

A file that is there has all of its content, whatever was killed and when.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from outcrop.errors import DataError

_COMPRESSION = 6


@dataclass
class Output:
    """A file that is being written, and what is known of its content."""

    stream: BinaryIO
    num_bytes: int = 0
    """Before packing."""
    num_lines: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def write(self, content: bytes) -> None:
        """Write whole lines."""
        self.stream.write(content)
        self.digest.update(content)
        self.num_bytes += len(content)
        self.num_lines += content.count(b"\n")


def check_target(path: Path, sources: Sequence[Path] = (), *, force: bool = False) -> None:
    """Make sure that a file may be written.

    Args:
        sources: the files that are read, which it must not be.
        force: whether it may replace a file that is there.
    Raises:
        DataError: it is a source, or is there, or cannot be made there.
    """
    for source in sources:
        if _is_same(path, source):
            raise _refused(path, f"it is the file that is read, {source}. Name another output")
    if path.is_dir() and not path.is_symlink():
        raise _refused(path, "it is a directory. Name a file")
    if os.path.lexists(path) and not force:
        what = "a link" if path.is_symlink() else "a file"
        raise _refused(path, f"{what} is there already. Name another output, or use --force")
    if not path.parent.is_dir():
        raise _refused(path, f"there is no directory {path.parent}. Make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _refused(path, f"the directory {path.parent} cannot be written to")


@contextmanager
def write_whole(path: Path, *, packed: bool = False) -> Iterator[Output]:
    """Open a file for writing; it appears under its name when the block ends without an error.

    A link of that name is replaced, not followed.

    Args:
        packed: whether it is packed with gzip; the same content gives the same bytes.
    Raises:
        DataError: it cannot be written, such as for want of space.
    """
    being_made = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with being_made.open("xb") as file:
            if packed:
                with gzip.GzipFile(
                    filename="", mode="wb", compresslevel=_COMPRESSION, fileobj=file, mtime=0
                ) as packing:
                    yield Output(cast(BinaryIO, packing))
            else:
                yield Output(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        being_made.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _refused(path, "the disk is full. Nothing was left behind") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _refused(path, f"{(error.strerror or '').lower()}") from error
        raise
    finally:
        being_made.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


def _refused(path: Path, reason: str) -> DataError:
    return DataError(f"{path} cannot be written: {reason}.", code="cannot_write", file=str(path))
