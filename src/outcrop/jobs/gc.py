"""What nothing needs any more: ended jobs' scratch files, artifacts without a model, old logs.

Knows files only; abandoned uploads are the object store's. A file is garbage only where the
database says so, and nothing younger than an hour is. The folders are listed before the database is
asked, so that what an attempt publishes in between is seen as used.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from outcrop.ids import IMPORTED_FOLDER
from outcrop.jobs import checkpoints
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
    is_empty_folder: bool = False
    """It is removed only if nothing has come into it since."""


@dataclass(frozen=True)
class _Used:
    """What the database knows to be in use."""

    live: set[str]
    """Ids of the jobs that have not ended."""
    publishing: set[tuple[str, str]]
    """Model id and fence of what running attempts may be about to publish."""
    stopped: set[str]
    """Ids of stopped jobs whose last checkpoint is kept."""
    artifacts: set[str]
    """Folders of custom and imported models, relative to the data directory."""


def find_garbage(
    settings: Settings, engine: Engine, *, young_seconds: float = YOUNG_SECONDS
) -> list[Garbage]:
    """Return what may be removed, with its size and the reason."""
    data = settings.data_dir
    scratch = _grandchildren(data / "work")
    artifacts = [
        *_grandchildren(data / "models" / "custom"),
        *_grandchildren(data / IMPORTED_FOLDER),
    ]
    logs = _children(data / "logs" / "jobs")
    used = _used(settings, engine, {folder.parent.name for folder in scratch})
    found = [
        *_scratch(settings, scratch, used),
        *_artifacts(data, artifacts, used),
        *_empty(data / "work", "folder of an ended job"),
        *_empty(data / "models" / "custom", "folder of a deleted custom model"),
        *_empty(data / IMPORTED_FOLDER, "folder of a deleted imported model"),
        *_conversions(data / "models" / "base"),
        *_job_logs(logs, used),
        *_rotated_logs(data / "logs"),
    ]
    now = time.time()
    return [item for item in found if _age(item.path, now) >= young_seconds]


def remove(item: Garbage) -> None:
    """Remove a file or a folder; one that is gone already is no error."""
    if item.is_empty_folder:
        with suppress(OSError):  # it is gone, or somebody fills it
            item.path.rmdir()
    elif item.path.is_dir():
        shutil.rmtree(item.path, ignore_errors=True)
    else:
        item.path.unlink(missing_ok=True)


def _used(settings: Settings, engine: Engine, job_ids: set[str]) -> _Used:
    with engine.connect() as connection:
        live = jobs.live_jobs(connection)
        publishing = set()
        for held in live:
            job = jobs.get_job_by_id(connection, held.id) if held.status in jobs.HELD else None
            if job is not None and "customModelId" in job.spec:
                publishing.add((str(job.spec["customModelId"]), str(held.fence)))
        stopped = checkpoints.jobs_in_use(connection)
        for job_id in job_ids - {held.id for held in live}:
            job = jobs.get_job_by_id(connection, job_id)
            if job is not None and checkpoints.is_kept(settings, job):
                stopped.add(job_id)
        return _Used(
            stopped=stopped,
            live={job.id for job in live},
            publishing=publishing,
            artifacts=models.artifact_paths(connection),
        )


def _scratch(settings: Settings, folders: list[Path], used: _Used) -> Iterator[Garbage]:
    for folder in folders:
        # A job that has not ended may go on from the checkpoints of any attempt it had.
        if folder.parent.name not in used.live | used.stopped:
            yield _garbage(folder, "scratch files of an ended job")
    for job_id in sorted({folder.parent.name for folder in folders} & used.stopped):
        for path in checkpoints.surplus(settings, job_id):
            yield _garbage(path, "scratch files of a stopped job, but for its last checkpoint")


def _artifacts(data: Path, folders: list[Path], used: _Used) -> Iterator[Garbage]:
    for folder in folders:
        in_use = str(folder.relative_to(data)) in used.artifacts
        if not in_use and (folder.parent.name, folder.name) not in used.publishing:
            yield _garbage(folder, "artifact that no model uses")


def _empty(folder: Path, reason: str) -> Iterator[Garbage]:
    for child in _children(folder):
        if not _children(child):
            yield Garbage(child, 0, reason, is_empty_folder=True)


def _conversions(folder: Path) -> Iterator[Garbage]:
    for child in _children(folder):
        if child.name.startswith(".") and ".tmp-" in child.name:
            yield _garbage(child, "conversion of weights that was not finished")


def _job_logs(logs: list[Path], used: _Used) -> Iterator[Garbage]:
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in logs[KEEP_JOB_LOGS:]:
        if path.name.partition(".")[0] not in used.live:
            yield _garbage(path, "log of an ended job")


def _rotated_logs(folder: Path) -> Iterator[Garbage]:
    for path in _children(folder):
        if path.name.endswith(".log.1"):
            yield _garbage(path, "older part of a log")


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _grandchildren(folder: Path) -> list[Path]:
    return [path for child in _children(folder) for path in _children(child)]


def _garbage(path: Path, reason: str) -> Garbage:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Garbage(path, sum(_size(file) for file in files), reason)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # its attempt is removing it right now
        return 0


def _age(path: Path, now: float) -> float:
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
