"""The database: durable, migrated in one step, private, and refused when it does not fit."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection, Engine
from tests.unit.store.build import queued

from outcrop.errors import StoreError
from outcrop.store import tables
from outcrop.store.database import check_version, connect, migrate, transaction
from outcrop.store.migrations import MIGRATIONS


@pytest.fixture
def sqlite(tmp_path: Path) -> Engine:
    return connect(f"sqlite:///{tmp_path / 'outcrop.sqlite3'}")


def schema_of(engine: Engine) -> dict[str, Any]:
    """What a database says of its tables, in a form that two can be compared in."""
    inspector = sa.inspect(engine)
    return {
        table: {
            "columns": {
                (column["name"], str(column["type"]), column["nullable"])
                for column in inspector.get_columns(table)
            },
            "key": inspector.get_pk_constraint(table)["constrained_columns"],
            "unique": {
                tuple(item["column_names"]) for item in inspector.get_unique_constraints(table)
            },
            "indexes": {
                (index["name"], tuple(index["column_names"]), bool(index["unique"]))
                for index in inspector.get_indexes(table)
                if not str(index["name"]).endswith("_key")  # those of PostgreSQL's constraints
            },
        }
        for table in inspector.get_table_names()
    }


def test_migrations_make_what_tables_py_says(engine: Engine, tmp_path: Path) -> None:
    migrated = schema_of(engine)
    with transaction(engine) as connection:
        tables.metadata.drop_all(connection)
        tables.metadata.create_all(connection)
    assert migrated == schema_of(engine)


def test_acknowledged_writes_are_synced_and_readers_do_not_wait(sqlite: Engine) -> None:
    with sqlite.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_reader_sees_the_last_commit_while_a_writer_is_at_work(engine: Engine) -> None:
    with transaction(engine) as writer:
        queued(writer, "a")
        with engine.connect() as reader:
            assert reader.execute(sa.select(sa.func.count()).select_from(tables.job)).scalar() == 0
    with engine.connect() as reader:
        assert reader.execute(sa.select(sa.func.count()).select_from(tables.job)).scalar() == 1


def test_failed_transaction_leaves_nothing(engine: Engine) -> None:
    def half_way() -> None:
        with transaction(engine) as connection:
            queued(connection, "a")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half_way()
    with engine.connect() as connection:
        assert connection.execute(sa.select(tables.job.c.id)).first() is None


def test_writers_wait_for_each_other(engine: Engine) -> None:
    """Read, then write, from many threads: no update is lost and none fails."""
    key = tables.model_server.c.key == "counter"
    with transaction(engine) as connection:
        connection.execute(
            sa.insert(tables.model_server).values(
                account="service",
                region="local",
                key="counter",
                state="wanted",
                pid=0,
                wanted_at=tables._EPOCH,
                last_used_at=tables._EPOCH,
            )
        )

    def count() -> None:
        for _ in range(10):
            with transaction(engine) as connection:
                pid = sa.select(tables.model_server.c.pid).where(key).with_for_update()
                value = connection.execute(pid).scalar_one()
                connection.execute(sa.update(tables.model_server).where(key).values(pid=value + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        assert connection.execute(sa.select(tables.model_server.c.pid)).scalar() == 40


def test_database_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'outcrop.sqlite3'}")
    migrate(engine)
    with engine.connect():
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    engine.dispose()
    assert modes == dict.fromkeys(modes, 0o600)
    assert "outcrop.sqlite3-wal" in modes


def test_log_stays_while_another_process_comes_and_goes(tmp_path: Path) -> None:
    """Who ends last deletes the log; our locks say that it is not the other one."""
    file = tmp_path / "outcrop.sqlite3"
    engine = connect(f"sqlite:///{file}")
    migrate(engine)
    ends = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT * FROM job')"
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):  # making the second must not undo the first's locks
            connection.execute(sa.select(tables.job.c.id)).all()
        log = Path(f"{file}-wal").stat().st_ino
        subprocess.run([sys.executable, "-c", f"{ends}.fetchall(); c.close()", file], check=True)
        assert Path(f"{file}-wal").stat().st_ino == log
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", r"is not a URL\. It must be sqlite:///"),
        ("mysql://user:secret@host/db", "begins with mysql, which is not supported"),
        ("postgresql+asyncpg://user:secret@host/db", "begins with postgresql.asyncpg, which"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://user:secret@host/db", r"psycopg is not .*`pip install outcrop\[postgr"),
        ("postgresql+psycopg://user:secret@host/db", "psycopg is not installed"),
    ],
)
def test_url_that_cannot_be_used_is_refused_with_the_setting_and_the_remedy(
    url: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as where it is not installed
    with pytest.raises(StoreError, match=f"^database_url .*{says}") as refused:
        connect(url)
    assert "secret" not in str(refused.value)


def test_migrating_twice_changes_nothing(engine: Engine) -> None:
    before = schema_of(engine)
    migrate(engine)
    check_version(engine)
    assert schema_of(engine) == before


def test_older_database_is_copied_and_then_migrated(url: str, tmp_path: Path) -> None:
    engine = connect(url)
    migrate(engine, migrations=MIGRATIONS[:1])
    with transaction(engine) as connection:
        for number, name in enumerate(("late", "early")):
            insert_version_1_job(connection, name, created_at=2 - number)

    migrate(engine, tmp_path / "backups")

    check_version(engine)
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.job.c.name, tables.job.c.lost_attempts).order_by(tables.job.c.number)
        ).all()
    assert rows == [("early", 0), ("late", 0)]
    if engine.dialect.name == "sqlite":
        (copy,) = (tmp_path / "backups").iterdir()
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        kept = sa.create_engine(f"sqlite:///{copy}")
        with kept.connect() as connection:
            versions = connection.execute(sa.select(tables.schema_version.c.version)).scalars()
            assert list(versions) == [1]
            assert len(connection.exec_driver_sql("SELECT name FROM job").all()) == 2
        kept.dispose()
    engine.dispose()


def insert_version_1_job(connection: Connection, name: str, created_at: int) -> None:
    connection.execute(
        sa.text(
            "INSERT INTO job (id, account, region, kind, arn, name, status, owner_principal, spec,"
            " progress, created_at, last_modified_at, attempts, fence, heartbeat, cores,"
            " memory_bytes) VALUES (:name, '1', 'r', 'customization', :name, :name, 'queued', 'o',"
            " '{}', '{}', :at, :at, 0, 0, 0, 1, 1)"
        ),
        {"name": name, "at": created_at},
    )


def test_failed_migration_leaves_the_old_schema(url: str) -> None:
    def fails(connection: Connection) -> None:
        connection.exec_driver_sql("CREATE TABLE half_done (id INTEGER)")
        raise RuntimeError("no disk left")

    engine = connect(url)
    migrate(engine, migrations=MIGRATIONS[:1])
    with pytest.raises(RuntimeError, match="no disk left"):
        migrate(engine, migrations=(*MIGRATIONS, fails))
    assert "half_done" not in sa.inspect(engine).get_table_names()
    with pytest.raises(StoreError, match=rf"schema version 1.*needs {len(MIGRATIONS)}.*serve"):
        check_version(engine)
    engine.dispose()


def test_newer_database_is_refused_and_both_versions_are_named(engine: Engine) -> None:
    with transaction(engine) as connection:
        connection.execute(
            sa.insert(tables.schema_version).values(version=99, applied_at=tables._EPOCH)
        )
    for refuse in (migrate, check_version):
        with pytest.raises(StoreError, match=rf"version 99.*up to {len(MIGRATIONS)}"):
            refuse(engine)


def test_database_that_was_never_migrated_is_refused(sqlite: Engine) -> None:
    with pytest.raises(StoreError, match="schema version 0"):
        check_version(sqlite)


def test_processes_that_migrate_at_once_migrate_once(url: str) -> None:
    engines = [connect(url) for _ in range(4)]
    failures: list[BaseException] = []

    def bring_up(engine: Engine) -> None:
        try:
            migrate(engine)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=bring_up, args=(engine,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with engines[0].connect() as connection:
        versions = connection.execute(sa.select(tables.schema_version.c.version)).scalars().all()
    assert sorted(versions) == list(range(1, len(MIGRATIONS) + 1))
    for engine in engines:
        engine.dispose()


def test_naive_instant_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="aware"):
        tables.Instant().process_bind_param(datetime(2026, 1, 1), None)  # noqa: DTZ001


def test_jobs_of_an_older_database_say_which_model_they_work_with(url: str) -> None:
    engine = connect(url)
    migrate(engine, migrations=MIGRATIONS[:1])
    with transaction(engine) as connection:
        for name in ("chained", "plain"):
            insert_version_1_job(connection, name, created_at=1)
        spec = json.dumps({"parent": {"modelArn": "arn:model"}})
        chained = sa.text("UPDATE job SET spec = :spec WHERE name = 'chained'")
        connection.execute(chained, {"spec": spec})
    migrate(engine)
    with engine.connect() as connection:
        columns = tables.job.c
        query = sa.select(columns.name, columns.uses_model_arn).order_by(columns.name)
        rows = [tuple(row) for row in connection.execute(query)]
    assert rows == [("chained", "arn:model"), ("plain", None)]
    engine.dispose()
