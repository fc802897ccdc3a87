"""A bounded folder of records that wait to be sent on: append-only segments that survive kill -9.

A record is one frame of a segment: four bytes of length, four of CRC-32, the record. What a writer
that was killed, or a disk that lost power, left half-written at a segment's end is found by that
and ignored. A segment belongs to who holds its lock (flock), which the kernel gives back when a
process ends: its writer while it is written, a reader after that. No segment is written again once
its writer has closed it, or is gone.

Durability: a frame that was appended survives the end of every process. It survives a power cut
once `sync` was called after it, or its segment was closed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from outcrop.store.files import sync

_HEAD = struct.Struct(">II")
SUFFIX = ".segment"
MAX_RECORD_BYTES = 1 << 30
"""A length beyond this is no length, but damage."""


class SpoolFullError(Exception):
    """There is no room for a record: the folder has as many bytes as it may have."""


@dataclass(frozen=True)
class Segment:
    """A closed segment, held by whoever got it."""

    path: Path
    records: tuple[bytes, ...]
    is_torn: bool
    """Its end was half-written, or damaged."""

    @property
    def name(self) -> str:
        """Its name, which no other segment ever has."""
        return self.path.name.removesuffix(SUFFIX)

    @property
    def age_seconds(self) -> float:
        """Time since it was begun, on the clock of the calendar."""
        return time.time() - int(self.name.partition("-")[0]) / 1e6


def frame(record: bytes) -> bytes:
    """Return a record as it stands in a segment; it must not be empty."""
    assert record, "an empty record could not be told from a run of zeros"
    return _HEAD.pack(len(record), zlib.crc32(record)) + record


def read_frames(content: bytes) -> tuple[tuple[bytes, ...], bool]:
    """Return the whole records of a segment's content, and whether anything follows them."""
    found, position = [], 0
    while position + _HEAD.size <= len(content):
        length, checksum = _HEAD.unpack_from(content, position)
        record = (
            content[position + _HEAD.size :][:length] if 0 < length <= MAX_RECORD_BYTES else b""
        )
        if not record or len(record) < length or zlib.crc32(record) != checksum:
            break
        found.append(record)
        position += _HEAD.size + length
    return tuple(found), position < len(content)


class SpoolWriter:
    """Appends records to segments of its own; for one thread."""

    def __init__(self, folder: Path, *, max_bytes: int, segment_bytes: int) -> None:
        """
        Args:
            max_bytes: that the folder may hold, of all writers together.
            segment_bytes: at which a segment is closed and the next one begun.
        """
        self._folder = folder
        self._max_bytes, self._segment_bytes = max_bytes, segment_bytes
        self._file: int | None = None
        self._path: Path | None = None
        self._size = 0
        self._begun_at = 0.0
        self._others = 0
        self._is_synced = True

    @property
    def age_seconds(self) -> float | None:
        """How long the open segment has been open; None where there is none."""
        return None if self._file is None else time.monotonic() - self._begun_at

    def append(self, record: bytes) -> None:
        """Append a record, whole or not at all.

        Raises:
            SpoolFullError: there is no room for it.
            OSError: the disk refuses it.
        """
        framed = frame(record)
        if self._others + self._size + len(framed) > self._max_bytes:
            self._others = folder_bytes(self._folder) - self._size
            if self._others + self._size + len(framed) > self._max_bytes:
                raise SpoolFullError
        if self._file is None:
            self._begin()
        assert self._file is not None
        try:
            written = os.write(self._file, framed)
            while written < len(framed):  # a disk that is nearly full takes a part
                written += os.write(self._file, framed[written:])
        except OSError:
            self._undo()
            raise
        self._size += len(framed)
        self._is_synced = False
        if self._size >= self._segment_bytes:
            self.close()

    def sync(self) -> None:
        """Bring what was appended to the disk."""
        if self._file is not None and not self._is_synced:
            os.fsync(self._file)
            self._is_synced = True

    def close(self) -> None:
        """End the open segment, so that it can be sent on."""
        if self._file is None:
            return
        try:
            self.sync()
        finally:
            os.close(self._file)
            self._file, self._size, self._others = None, 0, self._others + self._size

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            name = f"{time.time_ns() // 1000:016d}-{secrets.token_hex(4)}{SUFFIX}"
            path = self._folder / name
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file).st_nlink:  # no reader was faster than the lock
                    break
            os.close(file)
        with suppress(OSError):  # else its name is lost in a power cut, as its records may be
            sync(self._folder)
        self._file, self._path, self._size = file, path, 0
        self._begun_at = time.monotonic()
        self._others = folder_bytes(self._folder)

    def _undo(self) -> None:
        """Take a half-written frame back, so that none stands behind it unread."""
        assert self._file is not None
        try:
            os.ftruncate(self._file, self._size)
        except OSError:  # readers find its end by its checksum; the next record gets a new segment
            os.close(self._file)
            self._file, self._size = None, 0


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all segments of a folder; 0 where there is none."""
    total = 0
    for path in segments(folder):
        with suppress(FileNotFoundError):  # sent on meanwhile
            total += path.stat().st_size
    return total


def segments(folder: Path) -> list[Path]:
    """Return the paths of a folder's segments, the oldest first, those being written included."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def taken(path: Path) -> Iterator[Segment | None]:
    """Hold a closed segment for the length of a `with` block.

    None where its writer still has it, another reader has it, or it is gone. Its content is on the
    disk before it is returned: what is sent on today is there after a power cut, too.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not os.fstat(file).st_nlink:
            yield None
            return
        os.fsync(file)
        records, is_torn = read_frames(path.read_bytes())
        yield Segment(path, records, is_torn)
    finally:
        os.close(file)


def remove(segment: Segment) -> None:
    """Delete a segment that is held and was sent on."""
    segment.path.unlink(missing_ok=True)
