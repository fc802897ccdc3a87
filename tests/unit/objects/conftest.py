"""A real embedded object store, shared by the tests of this room that do no harm to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from outcrop.objects import embedded
from outcrop.objects.client import ObjectStore, object_store
from outcrop.processes.supervise import Supervisor
from outcrop.settings import Settings


@dataclass
class Running:
    """One embedded object store that runs."""

    settings: Settings
    supervisor: Supervisor
    objects: ObjectStore

    @property
    def pid(self) -> int:
        status = self.supervisor.status(embedded.NAME)
        assert status is not None
        assert status.pid is not None
        return status.pid

    @property
    def data_dir(self) -> Path:
        return self.settings.data_dir


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One store for all tests that only add to it."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("shared") / "data")
    with embedded.running(settings) as supervisor:
        yield Running(settings, supervisor, object_store(settings))


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A store that tests may kill; it is started again."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("mortal") / "data")
    with embedded.running(settings) as supervisor:
        yield Running(settings, supervisor, object_store(settings))


_numbers = itertools.count(1)


@pytest.fixture
def bucket(shared: Running) -> str:
    """A new bucket in the shared store."""
    return new_bucket(shared.objects)


def new_bucket(objects: ObjectStore) -> str:
    name = f"bucket-{next(_numbers)}"
    objects.create_bucket(name)
    return name
