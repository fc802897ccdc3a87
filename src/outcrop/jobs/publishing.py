"""What ends the work of every job that brings a model: its folder moved to where it is read.

A folder comes to the disk with all that is in it before its row does, so that no power cut leaves
a model without its files.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from sqlalchemy import Engine

from outcrop.errors import LeaseLost
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.files import sync, sync_tree
from outcrop.store.rows import Job


def publish_folder(settings: Settings, made: Path, place: str) -> Path:
    """Move a folder that is complete to its place; returns where it is now.

    Args:
        place: relative to the data directory; what is there of an attempt that died is replaced.
    """
    folder = settings.data_dir / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    sync_tree(made)
    made.rename(folder)
    for parent in folder.parents:
        sync(parent)
        if parent == settings.data_dir:
            break
    return folder


def begin_stage(engine: Engine, job: Job, stage: str) -> None:
    """Say that a job of one stage is at work.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    with transaction(engine) as connection:
        if not jobs.advance_stage(connection, job.id, job.fence, stage, "InProgress"):
            raise LeaseLost
        jobs.record_progress(connection, job.id, job.fence, {"stage": stage})
