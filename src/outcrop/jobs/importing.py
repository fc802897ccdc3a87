"""Import jobs, and jobs that make a custom model of weights in S3.

Both bring files below a prefix here and publish them as they are: moved to their place whole, then
named by a row, in the transaction that ends the job. An attempt's place has its fence in it, so one
that was killed or has lost its lease leaves nothing that anybody reads.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost
from outcrop.ids import imported_key, imported_path
from outcrop.jobs import adapters
from outcrop.jobs.incoming import Brought, bring_model
from outcrop.jobs.model_places import CREATION_MEMBER, IMPORT_MEMBER, find_model, model_prefix
from outcrop.jobs.parents import ADAPTER_MEMBER
from outcrop.jobs.publishing import begin_stage, publish_folder
from outcrop.models.incoming import ADAPTER_CONFIG, CONFIG
from outcrop.objects.client import ObjectStore, object_store
from outcrop.settings import Settings
from outcrop.store import publication
from outcrop.store.database import transaction
from outcrop.store.rows import Job, NewImportedModel

logger = logging.getLogger("outcrop.attempt")


def run_import(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
) -> None:
    """Take an import job from its row to its imported model.

    Args:
        objects: where the files are; None takes the store of the settings.
    Raises:
        ValidationException, ModelError, ObjectStoreError: the job fails, with the error's text as
            its reason.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the job.
    """
    spec = job.spec
    objects = objects or object_store(settings)
    begin_stage(engine, job, "import")
    prefix = model_prefix(IMPORT_MEMBER, spec["modelDataSource"]["s3DataSource"]["s3Uri"])
    name = spec["importedModelName"]
    brought = bring_model(settings, engine, objects, job, prefix, name, should_stop)
    key = imported_key(spec["importedModelId"], job.fence)
    folder = publish_folder(settings, brought.folder, imported_path(key))
    record = brought.record
    model = NewImportedModel(
        id=spec["importedModelId"],
        account=job.account,
        region=job.region,
        arn=spec["importedModelArn"],
        name=name,
        job_arn=job.arn,
        job_name=job.name,
        weights=key,
        architecture=record.architecture,
        instruct=record.instruct,
        spec={"modelDataSource": spec["modelDataSource"], "roleArn": spec["roleArn"]},
        digest=brought.digest,
        num_bytes=record.num_bytes,
        tags={tag["key"]: tag["value"] for tag in spec.get("importedModelTags", ())},
    )
    result = {"importedModelArn": model.arn, "modelArchitecture": record.architecture}
    with transaction(engine) as connection:
        done = publication.complete_import(connection, job, result=result, model=model)
    _check_done(done, folder)
    logger.info("published %s (%s)", model.arn, record.architecture)


def run_creation(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
) -> None:
    """Make a custom model, whose row is there already, of a whole model or an adapter in S3.

    Raises: as `run_import`; the model is Failed then.
    """
    spec = job.spec
    objects = objects or object_store(settings)
    begin_stage(engine, job, "creation")
    prefix = model_prefix(CREATION_MEMBER, spec["modelSourceConfig"]["s3DataSource"]["s3Uri"])
    with engine.connect() as connection:
        found = find_model(connection, objects, job.account, spec["roleArn"], prefix)
    if ADAPTER_CONFIG in found.objects and CONFIG not in found.objects:
        made = adapters.bring_adapter(settings, engine, objects, job, found, should_stop)
        folder = publish_folder(
            settings, made.folder, f"models/custom/{spec['customModelId']}/{job.fence}"
        )
        values = made.columns
    else:
        name = str(job.model_name)
        brought = bring_model(settings, engine, objects, job, prefix, name, should_stop)
        key = imported_key(spec["customModelId"], job.fence)
        folder = publish_folder(settings, brought.folder, imported_path(key))
        values = _own_base(job, key, brought)
    values["artifact_path"] = str(folder.relative_to(settings.data_dir))
    values["spec"] = {**spec, **values["spec"]}
    result = {"modelArn": spec["modelArn"]}
    with transaction(engine) as connection:
        done = publication.complete_creation(connection, job, result=result, values=values)
    _check_done(done, folder)
    logger.info("published %s", spec["modelArn"])


def _own_base(job: Job, key: str, brought: Brought) -> dict[str, Any]:
    """Return the columns of a whole model: it is its own base model."""
    return {
        "base_model_id": key,
        "artifact_digest": brought.digest,
        "spec": {"baseModelId": key, "weights": key, ADAPTER_MEMBER: None},
    }


def _check_done(done: bool, folder: Path) -> None:
    if not done:
        shutil.rmtree(folder, ignore_errors=True)
        raise LeaseLost
