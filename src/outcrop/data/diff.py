"""Compare two versions of a data file, record by record: added, removed, changed.

Records are the same where their content is, whatever the order of their keys and of the lines. Of
the others, one that asks the same as before and answers otherwise has changed. Only digests are
kept in memory, about 300 bytes for a record.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from outcrop.data.read import Line, scan_lines

_READ_BYTES = 1 << 20
_KEYS = ("recordId", "image-ref", "prompt")
"""What tells which record it is, in the order of preference; a conversation's is all but its
answer."""


@dataclass(frozen=True)
class Version:
    """A data file to be compared."""

    name: str
    open: Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class VersionFacts:
    """What one of the files is."""

    name: str
    digest: str
    """SHA-256 of its bytes, in hex."""
    num_bytes: int
    num_records: int
    """Lines that are not blank, usable or not."""


@dataclass(frozen=True)
class Diff:
    """How two files differ. Lines count from 1."""

    old: VersionFacts
    new: VersionFacts
    num_unchanged: int
    added: tuple[int, ...]
    """Lines of the new file."""
    removed: tuple[int, ...]
    """Lines of the old file."""
    changed: tuple[tuple[int, int], ...]
    """Line of the old file and line of the new one."""

    @property
    def is_same(self) -> bool:
        """Whether both hold the same records, in whatever order."""
        return not (self.added or self.removed or self.changed)


class _Hashing(io.RawIOBase):
    """Passes a stream on, takes its digest and counts its bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self.sha256.update(content)
        self.num_bytes += len(content)
        return len(content)


@dataclass
class _Reading:
    """What was seen of a file while its records are handed out."""

    version: Version
    num_records: int = 0
    num_bytes: int = 0
    digest: str = ""
    keys: dict[int, bytes] = field(default_factory=dict)
    """Line -> digest of what tells which record it is."""

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """Yield line and digest of the content of each record."""
        with self.version.open() as stream:
            hashing = _Hashing(stream)
            for line in scan_lines(io.BufferedReader(hashing, _READ_BYTES), self.version.name):
                if line.is_blank:
                    continue
                self.num_records += 1
                yield line.number, self._content(line)
        self.digest, self.num_bytes = hashing.sha256.hexdigest(), hashing.num_bytes

    def facts(self) -> VersionFacts:
        return VersionFacts(self.version.name, self.digest, self.num_bytes, self.num_records)

    def _content(self, line: Line) -> bytes:
        if line.value is None:
            return _hash(line.raw)
        key = _key(line.value)
        if key is not None:
            self.keys[line.number] = _hash(_canonical(key))
        return _hash(_canonical(line.value))


def compare(old: Version, new: Version) -> Diff:
    """Return how two versions of a file differ.

    Raises:
        DataError: one of them is packed and cannot be unpacked.
        OSError: one of them cannot be read.
    """
    before, after = _Reading(old), _Reading(new)
    lines_by_content: dict[bytes, list[int]] = defaultdict(list)
    for line, content in before.contents():
        lines_by_content[content].append(line)
    came: list[int] = []
    num_unchanged = 0
    for line, content in after.contents():
        same = lines_by_content.get(content)
        if same:
            same.pop()
            num_unchanged += 1
        else:
            came.append(line)
    gone = sorted(line for lines in lines_by_content.values() for line in lines)
    changed = _changed(before, after, gone, came)
    was_changed = {line for line, _ in changed}
    is_changed = {line for _, line in changed}
    return Diff(
        old=before.facts(),
        new=after.facts(),
        num_unchanged=num_unchanged,
        added=tuple(line for line in came if line not in is_changed),
        removed=tuple(line for line in gone if line not in was_changed),
        changed=tuple(changed),
    )


def _changed(
    before: _Reading, after: _Reading, gone: list[int], came: list[int]
) -> list[tuple[int, int]]:
    """Pair records that went and came with the same key, in the order of their lines."""
    by_key: dict[bytes, list[int]] = defaultdict(list)
    for line in reversed(gone):
        if line in before.keys:
            by_key[before.keys[line]].append(line)
    pairs = []
    for line in came:
        same = by_key.get(after.keys.get(line, b""))
        if same:
            pairs.append((same.pop(), line))
    return pairs


def _key(value: dict[str, Any]) -> Any:
    """Return what tells which record it is; None where nothing does, as in raw text."""
    for name in _KEYS:
        if name in value:
            return [name, value[name]]
    messages = value.get("messages")
    if isinstance(messages, list) and messages:
        return ["messages", value.get("system"), messages[:-1] or messages]
    return None


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
