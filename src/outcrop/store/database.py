"""The database: one SQLAlchemy URL, SQLite by default, PostgreSQL for more machines.

SQLite runs in WAL mode, so that readers never wait for a writer. `synchronous=FULL` syncs the log at every
commit: what was acknowledged survives not only a killed process but a power cut. That costs about a millisecond a
write on a solid-state disk, and nothing here writes more than a few times a second.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event

from outcrop.errors import StoreError
from outcrop.store.migrations import MIGRATIONS
from outcrop.store.tables import metadata, schema_version

logger = logging.getLogger("outcrop.store")

BUSY_SECONDS = 30.0
"""How long a writer waits for another one before it gives up."""


def connect(url: str) -> Engine:
    """Return an engine for the URL; it connects at the first use and is safe for several threads."""
    if not url.startswith("sqlite"):
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, record: object) -> None:
        # The driver's own BEGIN is deferred: two such transactions that both come to write fail at once instead
        # of waiting. transaction() begins explicitly.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that may write; it commits at the end of the block, or rolls back on an exception.

    On SQLite it takes the write lock at once, so that what was read in it still holds when it writes.
    """
    with engine.connect().execution_options(immediate=True) as connection, connection.begin():
        yield connection


def migrate(engine: Engine, backup_dir: Path | None = None) -> None:
    """Bring the database to this code's schema.

    Args:
        backup_dir: receives a copy of an older SQLite database before it is changed; None makes no copy.
    Raises:
        StoreError: the database is newer than this code.
    """
    newest = len(MIGRATIONS)
    current = _version(engine)
    if current > newest:
        raise StoreError(
            f"The database has schema version {current}, and this version of Outcrop knows up to "
            f"{newest}. Start the version that wrote it, or a newer one."
        )
    if current == newest:
        return
    if current > 0 and backup_dir is not None and engine.dialect.name == "sqlite":
        _copy(engine, backup_dir, current)
    with transaction(engine) as connection:
        for number in range(current + 1, newest + 1):
            MIGRATIONS[number - 1](connection)
            connection.execute(
                sa.insert(schema_version).values(version=number, applied_at=datetime.now(UTC))
            )
            logger.info("database migrated to schema version %d", number)


def _version(engine: Engine) -> int:
    if not sa.inspect(engine).has_table(schema_version.name):
        with transaction(engine) as connection:
            metadata.create_all(connection, tables=[schema_version])
        return 0
    with engine.connect() as connection:
        found: Any = connection.execute(sa.select(sa.func.max(schema_version.c.version))).scalar()
    return int(found or 0)


def _copy(engine: Engine, backup_dir: Path, version: int) -> None:
    file = engine.url.database
    assert file is not None
    backup_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    target = backup_dir / f"outcrop-v{version}-{stamp}.sqlite3"
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    target.chmod(0o600)
    logger.info("the database of schema version %d was copied to %s", version, target)
