"""What nothing needs any more: ended attempts' scratch files, artifacts without a model, old logs of jobs.

Knows files only; abandoned uploads are the object store's. A file is garbage only where the database says so, and
nothing younger than an hour is: what is being written right now has no row yet.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from outcrop.settings import Settings
from outcrop.store import jobs, models

YOUNG_SECONDS = 3600.0
KEEP_JOB_LOGS = 200
"""Logs of jobs that are kept; older ones are garbage."""


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed."""

    path: Path
    num_bytes: int
    reason: str


def find_garbage(
    settings: Settings, engine: Engine, *, young_seconds: float = YOUNG_SECONDS
) -> list[Garbage]:
    """Return what may be removed, with its size and the reason."""
    with engine.connect() as connection:
        live = {job.id for job in (*jobs.held_jobs(connection), *jobs.queued_jobs(connection))}
        used = models.artifact_paths(connection)
    found = [
        *_scratch(settings, live),
        *_artifacts(settings, used),
        *_job_logs(settings, live),
    ]
    now = time.time()
    return [item for item in found if now - item.path.stat().st_mtime >= young_seconds]


def remove(item: Garbage) -> None:
    """Remove a file or a folder; one that is gone already is no error."""
    if item.path.is_dir():
        shutil.rmtree(item.path, ignore_errors=True)
    else:
        item.path.unlink(missing_ok=True)


def _scratch(settings: Settings, live: set[str]) -> Iterator[Garbage]:
    for folder in _children(settings.data_dir / "work"):
        if folder.name not in live:
            yield _garbage(folder, "scratch files of an ended job")


def _artifacts(settings: Settings, used: set[str]) -> Iterator[Garbage]:
    for model in _children(settings.data_dir / "models" / "custom"):
        attempts = _children(model)
        for folder in attempts:
            if str(folder.relative_to(settings.data_dir)) not in used:
                yield _garbage(folder, "artifact that no custom model uses")
        if not attempts:
            yield _garbage(model, "folder of a deleted custom model")


def _job_logs(settings: Settings, live: set[str]) -> Iterator[Garbage]:
    logs = _children(settings.data_dir / "logs" / "jobs")
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[KEEP_JOB_LOGS:]:
        if path.name.partition(".")[0] not in live:
            yield _garbage(path, "log of an ended job")


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _garbage(path: Path, reason: str) -> Garbage:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Garbage(path, sum(file.stat().st_size for file in files), reason)
