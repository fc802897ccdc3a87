"""`outcrop gc` and the object store: whose uploads it ends, and what it says when it sees none."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from outcrop.cli.gc import collect_garbage
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    """The settings of an installation that was started once."""
    settings = Settings(data_dir=data_dir)
    engine = connect(settings.effective_database_url)
    migrate(engine)
    engine.dispose()
    return settings


def test_an_s3_of_the_owners_is_left_alone(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as store:
        own = Settings(
            data_dir=settings.data_dir,
            s3_endpoint_url=f"http://127.0.0.1:{store.getsockname()[1]}",
            s3_access_key_id="key",
            s3_secret_access_key="secret",
        )
        assert list(collect_garbage(own, remove=True)) == []
        store.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            store.accept()


def test_an_object_store_that_is_away_is_said(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(collect_garbage(settings, remove=True)) == []
    assert "not all abandoned uploads were looked for" in caplog.text
    assert "is not running" in caplog.text
