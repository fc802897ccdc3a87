"""Fixtures every test may use."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

# The one place that knows where the real data sets are; tests skip by name where they are absent.
SHARED_DATA = Path(
    os.environ.get("BEDROCK_DATA_DIR", Path(__file__).parents[2] / "shared" / "data")
)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty data directory."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data sets in Bedrock's formats."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not here (BEDROCK_DATA_DIR names their folder)")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same random numbers, whatever ran before it."""
    state = random.getstate()
    random.seed(0)
    yield
    random.setstate(state)
