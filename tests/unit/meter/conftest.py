"""An empty database for the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outcrop.store.database import connect, migrate


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'db'}")
    migrate(engine)
    yield engine
    engine.dispose()
