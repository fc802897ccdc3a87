"""The service outlives a database that is away, and a start can be given up."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from outcrop.cli.serve import MAX_KILLED_STARTS, WORKER, _Service, run_service
from outcrop.errors import SettingsError
from outcrop.processes.supervise import ChildState, ChildStatus
from outcrop.serve.vllm_library import is_installed
from outcrop.settings import Settings
from outcrop.store import servers
from outcrop.store.database import connect, migrate, transaction


def failing(error: Exception) -> sa.Engine:
    """An engine that never gets a connection."""

    def connect() -> sqlite3.Connection:
        raise error

    return sa.create_engine("sqlite://", creator=connect)


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.OperationalError("the disk is full"),
        sqlite3.InterfaceError("the connection is closed"),
        sa.exc.TimeoutError("no connection came free"),
    ],
    ids=["operational", "interface", "pool"],
)
def test_a_database_that_is_away_does_not_end_the_service(
    error: Exception, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = _Service(Settings(data_dir=data_dir), failing(error), data_dir)
    assert not service.look()
    assert "the database does not answer" in caplog.text
    service._on_exit(ChildStatus(WORKER, ChildState.WAITING, None, -9, 1, ""))
    assert "could not be released" in caplog.text


def test_an_engine_that_is_not_installed_is_refused_at_the_start(data_dir: Path) -> None:
    if is_installed():
        pytest.skip("vllm is installed")
    with pytest.raises(SettingsError, match="serve_engine is vllm, but the package"):
        run_service(Settings(data_dir=data_dir, serve_engine="vllm"), lambda url: None)
    assert not list(data_dir.iterdir())


def test_a_start_that_is_given_up_ends_at_once(data_dir: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if "OUTCROP" not in name}
    environment |= {
        # An address of nobody (RFC 5737), so that the gateway is never ready; no object store.
        "OUTCROP_HOST": "192.0.2.1",
        "OUTCROP_S3_ENDPOINT_URL": "http://127.0.0.1:1",
        "OUTCROP_S3_ACCESS_KEY_ID": "key",
        "OUTCROP_S3_SECRET_ACCESS_KEY": "secret",
    }
    command = (sys.executable, "-m", "outcrop", "serve", "--data-dir", str(data_dir))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "gateway started" in line:
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "cannot be started" not in err


@pytest.fixture
def service(data_dir: Path) -> Iterator[_Service]:
    """A service whose processes are never started, over a real database."""
    settings = Settings(data_dir=data_dir)
    engine = connect(settings.effective_database_url)
    migrate(engine, data_dir / "backups")
    yield _Service(settings, engine, data_dir)
    engine.dispose()


def end_while_starting(service: _Service, exit_code: int) -> str:
    """Let the model server end while it loads; returns its row's state, or "" where it is gone."""
    with transaction(service.engine) as connection:
        servers.want(connection, "tiny")
        servers.mark_starting(connection, "tiny", "tiny.sock")
        row = servers.get(connection, "tiny")
    assert row is not None
    service._server_ended(
        row, ChildStatus("model-server:tiny", ChildState.ENDED, None, exit_code, 1, "")
    )
    with service.engine.connect() as connection:
        row = servers.get(connection, "tiny")
    return row.state if row is not None else ""


def test_a_model_server_that_was_killed_while_it_loads_is_wanted_again(service: _Service) -> None:
    found = [end_while_starting(service, -signal.SIGKILL) for _ in range(MAX_KILLED_STARTS)]
    assert found == [*[""] * (MAX_KILLED_STARTS - 1), "failed"]
    assert end_while_starting(service, -signal.SIGKILL) == "", "it is counted anew"


def test_a_model_server_that_is_killed_at_work_is_started_before_anybody_asks(
    service: _Service,
) -> None:
    def end(exit_code: int, *, idle: bool = False) -> str:
        with transaction(service.engine) as connection:
            servers.want(connection, "tiny")
            servers.mark_starting(connection, "tiny", "tiny.sock")
            servers.mark_ready(connection, "tiny", 7)
            row = servers.get(connection, "tiny")
        assert row is not None
        if idle:
            row = replace(row, last_used_at=row.last_used_at - timedelta(minutes=1))
        status = ChildStatus("model-server:tiny", ChildState.ENDED, None, exit_code, 1, "")
        service._server_ended(row, status)
        with transaction(service.engine) as connection:
            after = servers.get(connection, "tiny")
            servers.remove(connection, "tiny")
        return after.state if after is not None else ""

    assert end(-signal.SIGKILL) == "wanted"
    assert end(-signal.SIGKILL, idle=True) == "", "nobody used it"
    assert end(0) == "", "it ended by itself"


def test_a_model_server_that_ends_by_itself_while_it_loads_has_failed(service: _Service) -> None:
    assert end_while_starting(service, 1) == "failed"
