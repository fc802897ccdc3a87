"""Copy jobs: a custom model of one region becomes one of another, with files of its own.

The files are linked where the file system can, because nothing ever writes to them: each model has
its own names for them, so the one can be deleted and the other stays. What is copied is compared
with its digest before it is published. The source's files stay until the job has ended, also if the
model is deleted meanwhile (`parents.py`).
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ModelError, StopRequested
from outcrop.ids import (
    IMPORTED_FOLDER,
    foundation_model_arn,
    imported_key,
    imported_path,
    parse_arn,
)
from outcrop.jobs import artifacts
from outcrop.jobs.publishing import begin_stage, publish_folder
from outcrop.models.artifact import folder_digest
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import CustomModel, Job, NewCustomModel

logger = logging.getLogger("outcrop.attempt")

SOURCE = "source"
"""In the row of a job: the columns of the model that is copied."""
_COPIED = (
    *("base_model_id", "base_model_arn", "foundation_model_arn", "customization_type"),
    *("hyper_parameters", "spec", "metrics", "artifact_digest"),
)


def describe_source(model: CustomModel) -> dict[str, Any]:
    """Return what the row of a job records of the model that it copies."""
    return {name: getattr(model, name) for name in _COPIED}


def run(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
) -> None:
    """Take a copy job from its row to its model.

    Raises:
        ModelError: the source's files are gone, or are not what was published.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the job.
    """
    begin_stage(engine, job, "copy")
    spec = job.spec
    model_id = spec["customModelId"]
    path = spec["parent"]["artifactPath"]
    made = artifacts.work_folder(settings, job.id, job.fence) / "model"
    shutil.rmtree(made, ignore_errors=True)
    _link(settings.data_dir / path, made, should_stop)
    if folder_digest(made) != spec["parent"]["artifactDigest"]:
        raise ModelError(
            f"The files of the custom model {spec['sourceModelArn']} are not those that were "
            "published: they are damaged or were changed. Nothing was copied."
        )
    own_key = imported_key(model_id, job.fence) if path.startswith(IMPORTED_FOLDER) else None
    place = f"models/custom/{model_id}/{job.fence}" if own_key is None else imported_path(own_key)
    folder = publish_folder(settings, made, place)
    model = _target(job, str(folder.relative_to(settings.data_dir)), own_key)
    result = {"targetModelArn": model.arn}
    with transaction(engine) as connection:
        done = jobs.complete_job(connection, job.id, job.fence, result=result, model=model)
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
        raise LeaseLost
    logger.info("copied %s to %s", spec["sourceModelArn"], model.arn)


def _target(job: Job, artifact_path: str, own_key: str | None) -> NewCustomModel:
    """Return the row of the copy: of the job's region, and made by no job that is to be seen there.

    Args:
        own_key: the key of its weights, where it is its own base.
    """
    source: Mapping[str, Any] = job.spec[SOURCE]
    kept = {**source["spec"], "copiedFrom": job.spec["sourceModelArn"]}
    arn = job.spec["targetModelArn"]
    moved = {
        name: _in_region(source[name], job.region)
        for name in ("base_model_arn", "foundation_model_arn")
    }
    base_model_id = source["base_model_id"]
    if own_key is not None:
        kept |= {"weights": own_key, "baseModelId": own_key}
        moved = dict.fromkeys(moved, arn)
        base_model_id = own_key
    return NewCustomModel(
        id=job.spec["customModelId"],
        account=job.account,
        region=job.region,
        arn=arn,
        name=str(job.model_name),
        base_model_id=base_model_id,
        customization_type=source["customization_type"],
        hyper_parameters=source["hyper_parameters"],
        spec=kept,
        metrics=source["metrics"],
        artifact_path=artifact_path,
        artifact_digest=source["artifact_digest"],
        tags={tag["key"]: tag["value"] for tag in job.spec.get("targetModelTags", ())},
        **moved,
    )


def _in_region(arn: str, region: str) -> str:
    """Return a base model's ARN as the region has it; other models are only where they are."""
    found = parse_arn(arn)
    if found is None or found.resource_type != "foundation-model":
        return arn
    return foundation_model_arn(region, found.resource_id)


def _link(source: Path, target: Path, should_stop: Callable[[], bool]) -> None:
    def copy(file: str, place: str) -> None:
        if should_stop():
            raise StopRequested
        try:
            os.link(file, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, place)

    if not source.is_dir():
        raise ModelError(f"The files of the custom model are gone: {source} is not there.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, copy_function=copy)
