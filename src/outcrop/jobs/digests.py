"""What a job's data was when it was checked: later attempts train on the same bytes or not at all.

The digest of each file is taken while the file is read, and kept in the job's row.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, cast

from outcrop.errors import TrainingError
from outcrop.ids import S3Uri
from outcrop.objects.client import ObjectStore

_BUFFER_BYTES = 1 << 20


class DataDigests:
    """The SHA-256, in hex, of each object that was read to its end."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    @contextmanager
    def reading(self, objects: ObjectStore, uri: S3Uri) -> Iterator[BinaryIO]:
        """Open an object for reading; its digest is known after the `with`."""
        with objects.open(uri) as stream:
            hashing = _Hashing(stream)
            yield cast("BinaryIO", io.BufferedReader(hashing, _BUFFER_BYTES))
        found = hashing.digest.hexdigest()
        _check(uri=str(uri), before=self.found.setdefault(str(uri), found), now=found)

    def check(self, recorded: Mapping[str, str]) -> None:
        """Refuse data that is not what it was when the job first checked it.

        Args:
            recorded: `found` of the job's first attempt.
        Raises:
            TrainingError: an object has changed; with both digests.
        """
        for uri, now in self.found.items():
            _check(uri=uri, before=recorded.get(uri, now), now=now)


def _check(*, uri: str, before: str, now: str) -> None:
    if before != now:
        raise TrainingError(
            f"{uri} changed while the job ran: its SHA-256 was {before} when the job checked it "
            f"first, and is {now}. A model is made of one set of data only, so nothing was "
            "published. Create the job again."
        )


class _Hashing(io.RawIOBase):
    """Passes a stream on and takes its digest."""

    def __init__(self, stream: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self.digest.update(content)
        return len(content)
