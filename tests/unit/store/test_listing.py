"""Pages: every row once, in order, whatever comes or goes between two pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_job,
    queued,
    running,
)

from outcrop.store import jobs, tables
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.rows import Job

KIND = "customization"
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def all_pages(engine: Engine, limit: int, *, ascending: bool = False) -> list[str]:
    found: list[str] = []
    after: tuple[int, str] | None = None
    while True:
        with engine.connect() as connection:
            page = jobs.list_jobs(
                *(connection, ACCOUNT, REGION, KIND), limit=limit, after=after, ascending=ascending
            )
        assert len(page.items) <= limit
        found += [job.name for job in page.items]
        after = page.next
        if after is None:
            return found


def make(engine: Engine, seconds: list[int]) -> list[Job]:
    """Jobs created at the given seconds after noon."""
    with transaction(engine) as connection:
        made = [queued(connection, f"j{number}") for number in range(len(seconds))]
        for job, second in zip(made, seconds, strict=True):
            connection.execute(
                sa.update(tables.job)
                .where(tables.job.c.id == job.id)
                .values(created_at=NOON + timedelta(seconds=second))
            )
    return made


@given(
    seconds=st.lists(st.integers(0, 4), max_size=12),
    limit=st.integers(1, 5),
    ascending=st.booleans(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_pages_hold_every_row_once_in_order(
    engine: Engine, seconds: list[int], limit: int, ascending: bool
) -> None:
    with transaction(engine) as connection:
        for table in (tables.job, tables.job_stage, tables.job_event):
            connection.execute(sa.delete(table))
    made = make(engine, seconds)
    order = sorted(zip(seconds, made, strict=True), key=lambda item: (item[0], item[1].id))
    names = [job.name for _, job in order]
    expected = names if ascending else names[::-1]
    assert all_pages(engine, limit, ascending=ascending) == expected


def test_row_that_ends_a_page_may_be_gone_when_the_next_is_asked_for(engine: Engine) -> None:
    made = make(engine, [0, 1, 2, 3])
    with transaction(engine) as connection:
        first = jobs.list_jobs(connection, ACCOUNT, REGION, KIND, limit=2, ascending=True)
        connection.execute(sa.delete(tables.job).where(tables.job.c.id == made[1].id))
        rest = jobs.list_jobs(
            connection, ACCOUNT, REGION, KIND, limit=2, ascending=True, after=first.next
        )
    assert [job.name for job in rest.items] == ["j2", "j3"]
    assert rest.next is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ab", ["ab"]), ("AB", ["AB"]), ("%", []), ("_", []), ("b", ["ab"]), ("zz", [])],
)
def test_name_filter_counts_case_and_knows_no_wild_cards(
    engine: Engine, text: str, expected: list[str]
) -> None:
    with transaction(engine) as connection:
        for name in ("ab", "AB"):
            queued(connection, name)
        page = jobs.list_jobs(connection, ACCOUNT, REGION, KIND, name_contains=text)
    assert [job.name for job in page.items] == expected


def test_filters_by_time_status_account_and_kind(engine: Engine) -> None:
    make(engine, [0, 60, 120])
    with transaction(engine) as connection:
        running(connection, "runs")
        queued(connection, "foreign", OTHER_ACCOUNT)
        queued(connection, "evaluation", kind="evaluation")

        def names(**filters: object) -> set[str]:
            page = jobs.list_jobs(connection, ACCOUNT, REGION, KIND, **filters)  # type: ignore[arg-type]
            return {job.name for job in page.items}

        assert names() == {"j0", "j1", "j2", "runs"}
        assert names(statuses=["running"]) == {"runs"}
        assert names(statuses=["queued", "running"]) == {"j0", "j1", "j2", "runs"}
        assert names(statuses=[]) == set()
        between = names(
            created_after=NOON + timedelta(seconds=1), created_before=NOON + timedelta(seconds=100)
        )
        assert between == {"j1"}


# --- what is read -------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    engine = connect(f"sqlite:///{tmp_path / 'outcrop.sqlite3'}")
    migrate(engine)
    yield engine
    engine.dispose()


@contextmanager
def plans(engine: Engine) -> Iterator[list[str]]:
    """Collect how SQLite carries out what is asked of it in a `with` block."""
    asked: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE")):
            asked.append((statement, parameters))

    found: list[str] = []
    event.listen(engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        for statement, parameters in asked:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            found.append(statement + "\n" + "\n".join(row.detail for row in rows))


@pytest.mark.parametrize(
    ("filters", "index"),
    [
        ({}, "job_list"),
        ({"after": (5, "a")}, "job_list"),
        ({"ascending": True, "created_after": NOON}, "job_list"),
        ({"name_contains": "x", "created_before": NOON}, "job_list"),
        ({"statuses": ["failed"]}, "job_list_status"),
        ({"statuses": ["queued", "running"], "name_contains": "x"}, "job_list_status"),
        ({"statuses": ["queued", "running"], "after": (5, "a")}, "job_list_status"),
    ],
)
def test_a_page_is_found_in_an_index_that_is_in_its_order(
    sqlite: Engine, filters: dict[str, Any], index: str
) -> None:
    with plans(sqlite) as found, sqlite.connect() as connection:
        jobs.list_jobs(connection, ACCOUNT, REGION, KIND, **filters)
    (plan,) = found
    lines = plan.splitlines()
    searches = [number for number, line in enumerate(lines) if "COVERING INDEX" in line]
    assert len(searches) == max(1, len(filters.get("statuses", ())))
    for number in searches:
        assert lines[number].startswith(f"SEARCH job USING COVERING INDEX {index} (account=? AND")
        assert "B-TREE" not in lines[number + 1], "it comes in order, so it can end with the page"
    whole = [line for line in lines if line.startswith(("SCAN job", "SEARCH job USING INDEX"))]
    assert whole == ["SEARCH job USING INDEX sqlite_autoindex_job_1 (id=?)"], "a page of rows"


def test_nothing_in_a_jobs_life_reads_all_jobs(sqlite: Engine) -> None:
    with plans(sqlite) as found, transaction(sqlite) as connection:
        new = new_job("one", uses_model_arn="arn:model")
        job = jobs.create_job(connection, new, max_custom_models=5)
        held = claimed(connection, job)
        jobs.heartbeat(connection, job.id, held.fence)
        jobs.get_job(connection, ACCOUNT, REGION, KIND, "one")
        jobs.stages_of(connection, [job.id])
        jobs.fail_job(connection, job.id, held.fence, "over")
    assert len(found) > 10
    assert [plan for plan in found if "SCAN" in plan or "kind=?)" in plan] == []
