"""What is remembered of the database is what stands in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine

from outcrop.store.database import connect, transaction
from outcrop.store.remembered import Remembered


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = connect(f"sqlite:///{tmp_path}/d.sqlite3")
    with transaction(made) as connection:
        connection.execute(sa.text("CREATE TABLE t (x INTEGER)"))
        connection.execute(sa.text("INSERT INTO t VALUES (1)"))
    yield made
    made.dispose()


class Reader:
    """Reads the number and counts how often."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.count = engine, 0

    def __call__(self) -> int | None:
        self.count += 1
        with self.engine.connect() as connection:
            found: int | None = connection.execute(sa.text("SELECT x FROM t")).scalar()
        return found


def write(engine: Engine, x: int) -> None:
    with transaction(engine) as connection:
        connection.execute(sa.text("UPDATE t SET x = :x"), {"x": x})


def test_what_nobody_changed_is_read_once(engine: Engine) -> None:
    remembered, read = Remembered(engine), Reader(engine)
    assert [remembered.get("x", read) for _ in range(3)] == [1, 1, 1]
    assert read.count == 1
    assert remembered.get("another key", read) == 1
    assert read.count == 2
    remembered.close()


@pytest.mark.parametrize("by_another_engine", [False, True])
def test_a_change_is_seen_at_once(engine: Engine, by_another_engine: bool) -> None:
    remembered, read = Remembered(engine), Reader(engine)
    other = connect(str(engine.url)) if by_another_engine else engine
    for x in range(2, 6):
        write(other, x)
        assert remembered.get("x", read) == x
    if by_another_engine:
        other.dispose()
    remembered.close()


def test_a_change_while_it_is_read_is_not_missed(engine: Engine) -> None:
    remembered, read = Remembered(engine), Reader(engine)

    def read_late() -> int | None:
        found = read()
        write(engine, 7)
        return found

    assert remembered.get("x", read_late) == 1
    assert remembered.get("x", read) == 7
    remembered.close()


def test_nothing_found_and_an_error_are_not_remembered(engine: Engine) -> None:
    remembered, read = Remembered(engine), Reader(engine)
    assert remembered.get("x", lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        remembered.get("x", lambda: 1 // 0)
    assert remembered.get("x", read) == 1
    remembered.close()


def test_without_an_engine_and_after_the_end_each_read_is_made(engine: Engine) -> None:
    closed = Remembered(engine)
    closed.get("x", Reader(engine))
    closed.close()
    for remembered in (Remembered(), closed):
        read = Reader(engine)
        assert [remembered.get("x", read) for _ in range(2)] == [1, 1]
        assert read.count == 2
