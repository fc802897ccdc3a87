"""Model servers that are wanted, and those that run: how the gateway asks, and the supervisor
answers.

The gateway never starts a process. It writes that it wants the server of some base weights;
`outcrop serve` starts it and writes where it listens. Rows belong to the service, not to an
account.
"""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from outcrop.store import tables
from outcrop.store.rows import ModelServer, from_row

_TABLE = tables.model_server
REGION = "local"


def want(connection: Connection, key: str) -> None:
    """Ask for a server; nothing changes where one is wanted, starting or ready already."""
    now = datetime.now(UTC)
    if _update(
        *(connection, key),
        from_state="failed",
        state="wanted",
        wanted_at=now,
        last_used_at=now,
        error=None,
    ):
        return
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(
        insert(_TABLE)
        .values(
            account=tables.SERVICE_ACCOUNT,
            region=REGION,
            key=key,
            state="wanted",
            wanted_at=now,
            last_used_at=now,
        )
        .on_conflict_do_nothing()  # another request may want it at the same instant
    )


def get(connection: Connection, key: str) -> ModelServer | None:
    """Return the row of a server, or None where nobody wants it."""
    row = connection.execute(sa.select(_TABLE).where(*_is(key))).first()
    return None if row is None else from_row(ModelServer, row)


def list_servers(connection: Connection) -> list[ModelServer]:
    """Return all rows."""
    query = sa.select(_TABLE).where(_TABLE.c.account == tables.SERVICE_ACCOUNT)
    return [from_row(ModelServer, row) for row in connection.execute(query)]


def mark_starting(connection: Connection, key: str, address: str) -> bool:
    """Say that a wanted server is being started; False where it is not wanted any more."""
    return _update(connection, key, from_state="wanted", state="starting", address=address)


def mark_ready(connection: Connection, key: str, pid: int) -> bool:
    """Say that a starting server answers at its address."""
    now = datetime.now(UTC)
    return _update(connection, key, from_state="starting", state="ready", pid=pid, last_used_at=now)


def mark_failed(connection: Connection, key: str, error: str) -> bool:
    """Say that a server could not be started, and why."""
    now = datetime.now(UTC)
    return _update(
        connection, key, state="failed", error=error, address=None, pid=None, last_used_at=now
    )


def touch(connection: Connection, key: str) -> bool:
    """Say that a server was used now."""
    return _update(connection, key, last_used_at=datetime.now(UTC))


def idle_seconds(row: ModelServer) -> float:
    """Return for how long a server was not used."""
    return (datetime.now(UTC) - row.last_used_at).total_seconds()


def remove(connection: Connection, key: str) -> None:
    """Forget a server that has ended."""
    connection.execute(sa.delete(_TABLE).where(*_is(key)))


def forget_all(connection: Connection) -> None:
    """Forget every server: those of an earlier supervisor have ended with it."""
    connection.execute(sa.delete(_TABLE).where(_TABLE.c.account == tables.SERVICE_ACCOUNT))


def _update(
    connection: Connection, key: str, *, from_state: str | None = None, **values: object
) -> bool:
    query = sa.update(_TABLE).where(*_is(key)).values(**values)
    if from_state is not None:
        query = query.where(_TABLE.c.state == from_state)
    return connection.execute(query).rowcount == 1


def _is(key: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _TABLE.c.account == tables.SERVICE_ACCOUNT,
        _TABLE.c.region == REGION,
        _TABLE.c.key == key,
    )
