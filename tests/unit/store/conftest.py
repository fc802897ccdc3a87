"""Databases for the tests of the store: SQLite always, PostgreSQL where its URL is given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from outcrop.ids import new_id
from outcrop.store.database import connect, migrate

POSTGRESQL_VARIABLE = "TEST_POSTGRESQL_URL"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'outcrop.sqlite3'}"
        return
    server = os.environ.get(POSTGRESQL_VARIABLE)
    if not server:
        pytest.skip(f"no PostgreSQL to test with ({POSTGRESQL_VARIABLE} is not set)")
    schema = f"test_{new_id()}"
    admin = sa.create_engine(server)
    with admin.begin() as connection:
        connection.execute(sa.schema.CreateSchema(schema))
    yield f"{server}?options=-csearch_path%3D{schema}"
    with admin.begin() as connection:
        connection.execute(sa.schema.DropSchema(schema, cascade=True))
    admin.dispose()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """An engine on a database of the newest schema."""
    engine = connect(url)
    migrate(engine)
    yield engine
    engine.dispose()
