"""Garbage: what nobody needs is found with its size and reason, and nothing else is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import new_model, queued, running

from outcrop.jobs import gc
from outcrop.settings import Settings
from outcrop.store import jobs, models
from outcrop.store.database import transaction

OLD = time.time() - 2 * gc.YOUNG_SECONDS


def put(data_dir: Path, name: str, content: bytes = b"12345") -> Path:
    file = data_dir / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def age(data_dir: Path) -> None:
    for path in data_dir.rglob("*"):
        os.utime(path, (OLD, OLD))


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


def found(settings: Settings, engine: Engine) -> dict[str, tuple[int, str]]:
    return {
        str(item.path.relative_to(settings.data_dir)): (item.num_bytes, item.reason)
        for item in gc.find_garbage(settings, engine)
    }


def test_scratch_files_are_garbage_once_their_job_has_ended(
    settings: Settings, engine: Engine
) -> None:
    data = settings.data_dir
    with transaction(engine) as connection:
        runs = running(connection, "runs")
        waits = queued(connection, "waits")
    put(data, f"work/{runs.id}/1/state.bin")
    put(data, f"work/{runs.id}/0/state.bin")
    put(data, f"work/{waits.id}/1/state.bin")  # it goes on from there
    put(data, "work/unknown/1/deep/state.bin")
    (data / "work" / "empty").mkdir()
    age(data)
    assert found(settings, engine) == {
        "work/unknown/1": (5, "scratch files of an ended job"),
        "work/empty": (0, "folder of an ended job"),
    }


def test_artifacts_are_garbage_when_no_model_uses_them(settings: Settings, engine: Engine) -> None:
    data = settings.data_dir
    used = new_model("used")
    with transaction(engine) as connection:
        models.insert_model(connection, used)
        job = running(connection, "publishing")
    put(data, f"{used.artifact_path}/adapter.safetensors")
    put(data, f"models/custom/{used.id}/2/adapter.safetensors")
    publishing = put(data, f"models/custom/{job.spec['customModelId']}/1/adapter.safetensors")
    put(data, "models/custom/deleted/1/adapter.safetensors")
    age(data)
    unused = (5, "artifact that no model uses")
    assert found(settings, engine) == {
        f"models/custom/{used.id}/2": unused,
        "models/custom/deleted/1": unused,
    }
    with transaction(engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "over")
    assert str(publishing.parent.relative_to(data)) in found(settings, engine)


def test_what_is_young_is_left_alone(settings: Settings, engine: Engine) -> None:
    put(settings.data_dir, "models/custom/just-written/1/adapter.safetensors")
    assert found(settings, engine) == {}
    everything = gc.find_garbage(settings, engine, young_seconds=0)
    assert [item.path.name for item in everything] == ["1"]


def test_half_converted_weights_and_rotated_logs_are_garbage(
    settings: Settings, engine: Engine
) -> None:
    data = settings.data_dir
    put(data, "models/base/.tiny.tmp-123/model.safetensors")
    put(data, "models/base/tiny/model.safetensors")
    put(data, "models/base/.tiny.lock")
    put(data, "logs/gateway.log")
    put(data, "logs/gateway.log.1")
    age(data)
    assert found(settings, engine) == {
        "models/base/.tiny.tmp-123": (5, "conversion of weights that was not finished"),
        "logs/gateway.log.1": (5, "older part of a log"),
    }


def test_the_newest_job_logs_are_kept_and_those_of_live_jobs(
    settings: Settings, engine: Engine
) -> None:
    data = settings.data_dir
    with transaction(engine) as connection:
        live = queued(connection, "waits")
    files = [put(data, f"logs/jobs/ended{number}.log") for number in range(gc.KEEP_JOB_LOGS + 1)]
    oldest = put(data, f"logs/jobs/{live.id}.log")
    for number, file in enumerate([*reversed(files), oldest]):
        os.utime(file, (OLD - number, OLD - number))
    assert found(settings, engine) == {"logs/jobs/ended0.log": (5, "log of an ended job")}


def test_empty_folder_that_was_filled_meanwhile_is_left_alone(
    settings: Settings, engine: Engine
) -> None:
    data = settings.data_dir
    for name in ("work/filled", "work/empty"):
        (data / name).mkdir(parents=True)
    age(data)
    garbage = gc.find_garbage(settings, engine)
    assert [item.path.name for item in garbage] == ["empty", "filled"]
    kept = put(data, "work/filled/2/state.bin")
    for item in (*garbage, *garbage):
        gc.remove(item)
    assert kept.exists()
    assert not (data / "work" / "empty").exists()


def test_removed_garbage_is_gone_and_removing_it_again_is_no_error(
    settings: Settings, engine: Engine
) -> None:
    data = settings.data_dir
    put(data, "work/unknown/1/state.bin")
    put(data, "logs/gateway.log.1")
    kept = put(data, "logs/gateway.log")
    age(data)
    garbage = gc.find_garbage(settings, engine)
    for item in (*garbage, *garbage):
        gc.remove(item)
    age(data)
    assert [item.path.name for item in gc.find_garbage(settings, engine)] == ["unknown"]
    assert kept.exists()
