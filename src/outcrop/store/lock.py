"""One service a data directory: a lock that ends with its holder, however that ends."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import Engine

from outcrop.errors import StoreError


@contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """Hold the data directory for the length of a `with` block.

    Raises:
        StoreError: another process holds it; the message has its process id.
    """
    path = data_dir / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise StoreError(
                f"{data_dir} is in use by another `outcrop serve`, process {holder}. End that "
                "one, or give this one a directory of its own with --data-dir."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


@contextmanager
def only_one(engine: Engine, data_dir: Path, name: str) -> Iterator[bool]:
    """Let one process of all do something for the length of a `with` block; False in the others.

    What is held ends with its holder: a file's lock where the database is a file of this machine,
    else an advisory lock of the database's connection.
    """
    if engine.dialect.name == "postgresql":  # pragma: no cover - needs one
        with engine.connect() as connection:
            key = sa.func.hashtextextended(f"outcrop/only/{name}", 0)
            yield bool(connection.execute(sa.select(sa.func.pg_try_advisory_lock(key))).scalar())
        return
    folder = data_dir / "run"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = folder / f"only-{digest}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
