"""Packed matrices on disk: a model server that starts again reads them instead of packing anew.

Packing is most of what a start computes. The file is a copy of what is in memory, with the digest
of each matrix, and the key of what it was made from: the files of the weights, this code, this
processor. A file of another key is not used, a damaged one is made anew; it may be removed any
time. It is read while torch is loaded, so this imports none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import TypeAlias

from outcrop.models.compiled import processor

logger = logging.getLogger("outcrop.model-server")

VERSION = 1
MAX_BYTES = 4 * 2**30
"""Larger models are not kept: reading them takes long too, and disks have an end."""
THREADS = 2
"""That read and compare."""
_SOURCES = ("formats.py", "packed.py", "forward.c")
_ALIGNMENT = 4096
_HEAD_BYTES = 32 + 8
"""A digest of the list of matrices, and its size."""

Matrices: TypeAlias = Mapping[str, tuple[str, memoryview]]
"""By name: a matrix's format and its bytes."""


class KeptMatrices:
    """The file of one model, in one precision."""

    def __init__(self, file: Path, key: str) -> None:
        """
        Args:
            key: see `key_of`.
        """
        self.file, self.key = file, key
        self._reading: Future[Matrices] | None = None

    def start_reading(self) -> None:
        """Begin to read, in threads of its own."""
        reading: Future[Matrices] = Future()
        self._reading = reading
        threading.Thread(
            target=self._read_all, args=(reading,), name="kept matrices", daemon=True
        ).start()

    def read(self) -> Matrices:
        """Return what is kept; nothing where that is missing, of another key, or damaged."""
        if self._reading is None:
            self.start_reading()
        assert self._reading is not None
        reading, self._reading = self._reading, None
        return reading.result()

    def write(self, matrices: Matrices) -> None:
        """Replace the file, whole or not at all. A disk that is full costs the next start time."""
        size = sum(data.nbytes for _, data in matrices.values())
        if size > MAX_BYTES:
            return
        folder = self.file.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for rest in folder.glob(f".{self.file.name}.*"):  # of a process that was killed
                rest.unlink(missing_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    head, places = _head(self.key, matrices)
                    stream.write(head)
                    for (_, data), place in zip(matrices.values(), places, strict=True):
                        stream.seek(place)
                        stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(name).replace(self.file)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the packed matrices could not be kept: %s", error)

    def write_later(self, matrices: Matrices) -> None:
        """Do so in a thread, beside the first requests."""
        threading.Thread(
            target=self.write, args=(matrices,), name="keep matrices", daemon=True
        ).start()

    def _read_all(self, reading: Future[Matrices]) -> None:
        found: Matrices = {}
        try:
            found = _read(self.file, self.key)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged, so it is made anew: %s", self.file, error)
            self.file.unlink(missing_ok=True)
        finally:
            reading.set_result(found)


def key_of(folder: Path, precision: str) -> str:
    """Return what decides how the matrices of a model's folder are packed on this machine."""
    names = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in names]
    sources = [(resources.files("outcrop.serve") / name).read_bytes() for name in _SOURCES]
    digest = hashlib.sha256(repr((VERSION, sys.byteorder, processor(), precision, files)).encode())
    for part in (str(folder.resolve()).encode(), *sources):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _head(key: str, matrices: Matrices) -> tuple[bytes, list[int]]:
    """Return what stands before the matrices, and where each of them begins in the file."""
    sizes = [data.nbytes for _, data in matrices.values()]
    digests = [hashlib.sha256(data).hexdigest() for _, data in matrices.values()]
    formats = [format for format, _ in matrices.values()]
    entries = list(zip(matrices, formats, sizes, digests, strict=True))
    text = json.dumps({"key": key, "matrices": entries}).encode()
    head = hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text
    return head, _places(len(head), sizes)[:-1]


def _places(first: int, sizes: list[int]) -> list[int]:
    """Return where each matrix begins, after `first` bytes, and where the last one ends."""
    places = []
    for size in sizes:
        first = -(-first // _ALIGNMENT) * _ALIGNMENT
        places.append(first)
        first += size
    return [*places, first]


def _read(file: Path, key: str) -> Matrices:
    with file.open("rb") as stream:
        start = stream.read(_HEAD_BYTES)
        size = int.from_bytes(start[32:], "little")
        if size > file.stat().st_size:
            raise ValueError("its head is cut off")
        text = stream.read(size)
        if hashlib.sha256(text).digest() != start[:32]:
            raise ValueError("its head is not what was written")
        head = json.loads(text)
        if head["key"] != key:
            return {}
        entries = head["matrices"]
        sizes = [entry[2] for entry in entries]
        *places, end = _places(_HEAD_BYTES + len(text), sizes)
        if os.fstat(stream.fileno()).st_size != end:
            raise ValueError("its size is not what was written")
        room = memoryview(wide_memory(end))

        def read_one(number: int) -> bool:
            data = room[places[number] : places[number] + sizes[number]]
            read = 0
            while read < len(data):
                if not (more := os.preadv(stream.fileno(), [data[read:]], places[number] + read)):
                    return False
                read += more
            return bool(hashlib.sha256(data).hexdigest() == entries[number][3])

        with ThreadPoolExecutor(THREADS) as threads:
            if not all(list(threads.map(read_one, range(len(entries))))):
                raise ValueError("a matrix is not what was written")
        return {
            name: (format, room[place : place + size])
            for (name, format, size, _), place in zip(entries, places, strict=True)
        }


def wide_memory(num_bytes: int) -> mmap.mmap:
    """Return memory of its own, in large pages where the system has them.

    Matrices are read from end to end for each token; in pages of 4 KiB the processor looks up an
    address for each of them. Memory is taken when it is first written to.
    """
    room = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            room.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            logger.debug("large pages are not to be had")
    return room
