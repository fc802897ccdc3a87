"""A database for the tests of the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outcrop.store.database import connect, migrate


@pytest.fixture
def engine(data_dir: Path) -> Iterator[Engine]:
    """An engine on a new SQLite database in the data directory."""
    engine = connect(f"sqlite:///{data_dir / 'outcrop.sqlite3'}")
    migrate(engine)
    yield engine
    engine.dispose()
