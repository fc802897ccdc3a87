"""Schema 1: accounts, jobs, custom models, throughputs, tags, request tokens, model servers."""

from __future__ import annotations

from sqlalchemy import Connection

from outcrop.store.tables import metadata


def apply(connection: Connection) -> None:
    """Make all tables."""
    metadata.create_all(connection)
