"""The database: one SQLAlchemy URL, SQLite by default, PostgreSQL for more machines.

SQLite runs in WAL mode, so that readers never wait for a writer, and with `synchronous=FULL`, which
syncs the log at every commit: what was acknowledged survives a power cut, not only a killed
process. A sync cost 4 ms: a heartbeat took 4.0 ms and not 0.4, creating a job 11 ms and not 6
(medians of 300 with a load of 7 on two cores, ext4 on a virtual disk). Nothing here writes more
than a few times a second.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import URL, Connection, Engine, event

from outcrop.errors import StoreError
from outcrop.store.files import sync
from outcrop.store.migrations import MIGRATIONS, Migration
from outcrop.store.tables import schema_version

logger = logging.getLogger("outcrop.store")

BUSY_SECONDS = 30.0
"""How long a writer waits for another one before it gives up."""
MAX_CONNECTIONS = 64
"""Of one process; above the gateway's 40 threads, so that none waits for a connection."""
_ALLOWED_URLS = (
    "It must be sqlite:////path/of/a/file, or postgresql://user:password@host/database, which "
    "needs `pip install outcrop[postgresql]`."
)


def connect(url: str) -> Engine:
    """Return an engine for the URL; it connects at the first use, and threads may share it.

    Raises:
        StoreError: the URL names no database that can be used, or its driver is not installed.
    """
    parsed = _parse(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    options = {"connect_args": {"timeout": BUSY_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
    try:
        engine = sa.create_engine(parsed, pool_size=8, max_overflow=MAX_CONNECTIONS - 8, **options)
    except ModuleNotFoundError as error:
        raise StoreError(
            f"database_url names a {parsed.get_backend_name()} database, but its driver "
            f"{error.name} is not installed: `pip install outcrop[postgresql]`."
        ) from error
    if is_sqlite:
        _prepare_sqlite(engine)
    return engine


def _parse(url: str) -> URL:
    """Return the URL with its driver. No message shows it, because it can hold a password."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise StoreError(f"database_url is not a URL. {_ALLOWED_URLS}") from error
    if parsed.drivername == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")  # not SQLAlchemy's own default
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise StoreError(
            f"database_url begins with {parsed.drivername}, which is not supported. {_ALLOWED_URLS}"
        )
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError(f"database_url names no file: processes share it. {_ALLOWED_URLS}")
    return parsed


def _prepare_sqlite(engine: Engine) -> None:
    assert engine.url.database is not None
    file = Path(engine.url.database)

    @event.listens_for(engine, "do_connect")
    def _make_private(*arguments: object) -> None:
        # It holds secret access keys. SQLite gives its log the mode of the database itself.
        # One that exists is never opened here: closing it would drop the locks of this process's
        # other connections, and the log would be deleted beneath them by whoever ends next.
        # Source: sqlite.org/howtocorrupt.html, section 2.2.
        if file.parent.is_dir():
            with suppress(FileExistsError):
                os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, record: object) -> None:
        # The driver's own BEGIN is deferred: two such transactions that both come to write fail at
        # once instead of waiting. transaction() begins explicitly.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get("immediate", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Open a transaction that may write; it commits at the end, or rolls back on an exception.

    On SQLite it takes the write lock at once, so that what was read in it still holds when it
    writes. On PostgreSQL see `lock_account`.
    """
    with engine.connect().execution_options(immediate=True) as connection, connection.begin():
        yield connection


def lock_account(connection: Connection, account: str, region: str) -> None:
    """Let no other transaction create or delete resources of this account until this one ends.

    Names and quotas are counted before a row is written; without this, two transactions on
    PostgreSQL could both count before either writes. On SQLite the write lock is that already.
    """
    _advisory_lock(connection, f"{account}/{region}")


def lock_machine(connection: Connection) -> None:
    """Let no other transaction buy a part of the machine until this one ends; after `lock_account`
    where both are needed."""
    _advisory_lock(connection, "machine")


def migrate(
    engine: Engine,
    backup_dir: Path | None = None,
    *,
    migrations: Sequence[Migration] = MIGRATIONS,
) -> None:
    """Bring the database to this code's schema, in one transaction.

    Args:
        backup_dir: receives a copy of an older SQLite database before it is changed; None makes
            no copy.
    Raises:
        StoreError: the database is newer than this code.
    """
    newest = len(migrations)
    current = _version(engine)
    _refuse_newer(current, newest)
    if current == newest:
        return
    if current > 0 and backup_dir is not None and engine.dialect.name == "sqlite":
        _copy(engine, backup_dir, current)
    with transaction(engine) as connection:
        _advisory_lock(connection, "schema")
        schema_version.create(connection, checkfirst=True)
        current = _read_version(connection)  # another process may have been faster
        for number in range(current + 1, newest + 1):
            migrations[number - 1](connection)
            connection.execute(
                sa.insert(schema_version).values(version=number, applied_at=datetime.now(UTC))
            )
            logger.info("database migrated to schema version %d", number)


def check_version(engine: Engine) -> None:
    """Refuse a database that this code cannot work with; for processes that do not migrate it.

    Raises:
        StoreError: it is older or newer than this code.
    """
    current, newest = _version(engine), len(MIGRATIONS)
    _refuse_newer(current, newest)
    if current < newest:
        raise StoreError(
            f"The database has schema version {current}, and this version of Outcrop needs "
            f"{newest}. `outcrop serve` brings it up to date."
        )


def _refuse_newer(current: int, newest: int) -> None:
    if current > newest:
        raise StoreError(
            f"The database has schema version {current}, and this version of Outcrop knows up to "
            f"{newest}. Start the version that wrote it, or a newer one."
        )


def _version(engine: Engine) -> int:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(schema_version.name):
            return 0
        return _read_version(connection)


def _read_version(connection: Connection) -> int:
    found = connection.execute(sa.select(sa.func.max(schema_version.c.version))).scalar()
    return int(found or 0)


def _advisory_lock(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":  # pragma: no cover - needs one
        lock = sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(f"outcrop/{name}", 0))
        connection.execute(sa.select(lock))


def _copy(engine: Engine, backup_dir: Path, version: int) -> None:
    file = engine.url.database
    assert file is not None
    backup_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    target = backup_dir / f"outcrop-v{version}-{stamp}.sqlite3"
    os.close(os.open(target, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    sync(target)
    sync(backup_dir)
    logger.info("the database of schema version %d was copied to %s", version, target)
