"""What tests of jobs share: a database, and a model of two layers that talks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model

from outcrop.identity.bootstrap import bootstrap
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate


@pytest.fixture(autouse=True)
def _compiled_once(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep what jobs compile for all tests: each has a data directory of its own, and the compiler
    takes longer than most of them.
    """
    folder = tmp_path_factory.getbasetemp().parent / "kernels"
    monkeypatch.setattr("outcrop.models.compiled.kernel_folder", lambda settings: folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and a chat template, as `add_model` takes it."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), vocab_size=400)
    return tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")


def bootstrapped(settings: Settings) -> Iterator[Engine]:
    """Yield an engine on a database as a first start leaves it."""
    engine = connect(settings.effective_database_url)
    migrate(engine)
    bootstrap(engine, settings)
    yield engine
    engine.dispose()


@pytest.fixture
def engine(data_dir: Path) -> Iterator[Engine]:
    """An engine on a new SQLite database in the data directory."""
    engine = connect(f"sqlite:///{data_dir / 'outcrop.sqlite3'}")
    migrate(engine)
    yield engine
    engine.dispose()
