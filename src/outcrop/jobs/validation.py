"""The validation stage: of a customization job, and of a data task that foretells it.

The same functions for both, so that what the one says is what the other does. They ask for the
places again, bring the data here, check all of them before anything is trained, and leave in the
owner's bucket what was found: the report, the counts as Bedrock gives them, and the data that were
accepted.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.data.check import Check, FileFacts, check_files
from outcrop.data.examples import Rendered, read_examples
from outcrop.data.limits import TRAINING, VALIDATION, check_total_records
from outcrop.data.records import Example
from outcrop.data.rejection import rejection
from outcrop.data.render import Renderer
from outcrop.data.report import Training, build_report, write_json
from outcrop.data.report_page import write_page
from outcrop.errors import DataError, LeaseLost
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts, memory
from outcrop.jobs.digests import DataDigests
from outcrop.jobs.inputs import (
    Input,
    asking,
    check_places,
    data_file,
    fetch_inputs,
    validation_uri,
)
from outcrop.jobs.log_inputs import fetch_logs, logs_config
from outcrop.jobs.parents import parent_artifact, plan_parent
from outcrop.models.catalog import BaseModel
from outcrop.models.weights import ensure_weights
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job
from outcrop.train.plan import TrainPlan, make_plan
from outcrop.train.portions import Portions
from outcrop.train.prediction import ModelShape

logger = logging.getLogger("outcrop.attempt")

SPEED = "speed"
"""In a job's run plan: the speed from which its report estimates."""
_STATUS_COLUMNS = (
    *("fileName", "totalProcessedRecordCount", "acceptedRecordCount"),
    *("partiallyAcceptedRecordCount", "rejectedRecordCount"),
)


@dataclass(frozen=True)
class Start:
    """What a job starts with, once its places have been asked for."""

    output: S3Uri
    weights: Path
    """The folder of the base weights."""
    plan: TrainPlan
    parent: Path | None
    """The artifact of the custom model to start from."""
    inputs: tuple[Input, ...]
    digests: DataDigests


@dataclass(frozen=True)
class Data:
    """The records of a job, rendered."""

    training: list[Example]
    validation: list[Example]


@dataclass(frozen=True)
class Checked:
    """What a check of the inputs found, and the report of it."""

    check: Check
    report: dict[str, Any]
    refusal: DataError | None
    """Why a job with these data fails; None where it does not."""


def begin(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    base: BaseModel,
    should_stop: Callable[[], bool],
) -> Start:
    """Ask for the places again, find the weights and the parent, and bring the data here.

    Raises:
        ValidationException, ModelError, ObjectStoreError: something is gone, or not allowed.
        TrainingError: the data are not what an earlier attempt saw.
        StopRequested: `should_stop` answered True.
    """
    output = check_places(engine, objects, job.account, job.spec)
    weights = ensure_weights(settings, job.spec["weights"])
    plan = make_plan(
        base,
        job.spec["customizationType"],
        job.spec["userHyperParameters"],
        has_validation=validation_uri(job.spec) is not None,
        parent=plan_parent(job.spec),
    )
    parent = parent_artifact(settings, job.spec)
    digests = DataDigests()
    folder = artifacts.input_folder(settings, job.id, job.fence)
    inputs = fetch_inputs(objects, job.spec, folder, digests, should_stop)
    if logs_config(job.spec) is not None:
        logged = fetch_logs(engine, objects, job, base, folder, digests, should_stop)
        inputs = (logged, *inputs)
    digests.check(job.run_plan.get("data", {}))
    return Start(output, weights, plan, parent, inputs, digests)


def check_inputs(
    settings: Settings,
    engine: Engine,
    job: Job,
    base: BaseModel,
    start: Start,
    report_uri: S3Uri,
    should_stop: Callable[[], bool],
    *,
    made_from: Mapping[str, str] | None = None,
) -> Checked:
    """Check the files of a job as it would train on them.

    Args:
        report_uri: where the report will be, for the message.
        made_from: as `build_report` takes it.
    Raises:
        StopRequested: `should_stop` answered True.
    """

    customization_type = job.spec["customizationType"]
    check = check_files(
        [data_file(item) for item in start.inputs],
        base=base,
        customization_type=customization_type,
        batch_size=start.plan.batch_size,
        renderer=Renderer(start.weights),
        hyper_parameters=start.plan.hyper_parameters,
        max_training_records=settings.max_training_records,
        max_validation_records=settings.max_validation_records,
        progress=asking(should_stop),
    )
    refusal = rejection(check, base.formats(customization_type), report=str(report_uri))
    speed = _speed(engine, job, base, start.plan)
    training = Training(
        start.plan.num_epochs,
        tokens_per_second=speed.get("tokensPerSecond"),
        measured_by=speed.get("job", ""),
    )
    report = build_report(
        check,
        model_name=base.full_name,
        training=training,
        rejection=None if refusal is None else refusal.message,
        made_from=made_from,
    )
    logger.info("the data were checked in %.2f s: %s", check.seconds, check.verdict)
    return Checked(check, report, refusal)


def read_data(settings: Settings, job: Job, base: BaseModel, start: Start) -> Data:
    """Render every record of the files.

    Raises:
        DataError: one cannot be rendered, or is one too many; `check_inputs` finds those first.
    """
    customization_type = job.spec["customizationType"]
    renderer = Renderer(start.weights)
    rendered = {VALIDATION: Rendered([], 0)}
    quotas = {
        TRAINING: settings.max_training_records,
        VALIDATION: settings.max_validation_records,
    }
    for item in start.inputs:
        with item.path.open("rb") as stream:
            rendered[item.role] = read_examples(
                stream,
                str(item.uri),
                base,
                renderer,
                role=item.role,
                batch_size=start.plan.batch_size,
                max_records=quotas[item.role],
                customization_type=customization_type,
            )
    training, validating = rendered[TRAINING], rendered[VALIDATION]
    if not any(quotas.values()):
        counts = training.num_records, validating.num_records
        check_total_records(base, *counts, customization_type)
    return Data(training.examples, validating.examples)


def settle(settings: Settings, engine: Engine, job: Job, start: Start, data: Data) -> Portions:
    """Decide, at the job's first attempt, what all of its attempts compute alike, and return the
    portions of its steps.

    Raises:
        TrainingError: the data do not fit into memory.
        LeaseLost: another attempt holds the job.
    """
    recorded = job.run_plan.get("portions")
    if recorded is not None:
        return Portions(**recorded)
    allowed = memory.given(settings, job.memory_bytes)
    shape = ModelShape.read(start.weights)
    portions = memory.portions_of_job(
        settings, shape, start.plan, data.training, allowed, job.cores
    )
    note(engine, job, portions=portions.described(), data=start.digests.found)
    return portions


def write_report(
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    report: Mapping[str, Any],
    folder: S3Uri,
    names: tuple[str, str] = (artifacts.DATA_REPORT_JSON, artifacts.DATA_REPORT_PAGE),
) -> dict[str, bytes]:
    """Write the report below a folder, for programs and for people; returns it by name.

    Raises:
        LeaseLost: another attempt holds the job; nothing was written.
    """
    files = {names[0]: write_json(report), names[1]: write_page(report)}
    check_lease(engine, job)
    for name, content in files.items():
        objects.write(folder.join(name), content)
    return files


def write_accepted(
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    check: Check,
    inputs: Sequence[Input],
    folder: S3Uri,
) -> None:
    """Record as Bedrock does what was accepted: the counts of each file, and its very bytes.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    check_lease(engine, job)
    objects.write(folder.join(artifacts.INPUT_STATUS), status_csv(check.files))
    for item in inputs:
        check_lease(engine, job)
        name = artifacts.VALIDATED_DATA.format(role=item.role)
        objects.write(folder.join(name), item.path)


def status_csv(files: Sequence[FileFacts]) -> bytes:
    """Return Bedrock's counts, one row a file. No record is accepted in part here."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_STATUS_COLUMNS)
    for facts in files:
        rejected = facts.num_records - facts.num_usable
        writer.writerow((facts.name, facts.num_records, facts.num_usable, 0, rejected))
    return text.getvalue().encode()


def check_lease(engine: Engine, job: Job) -> None:
    """Ask right before something is written where no fence is known.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    with transaction(engine) as connection:
        if jobs.heartbeat(connection, job.id, job.fence) is None:
            raise LeaseLost


def note(engine: Engine, job: Job, **decided: Any) -> None:
    """Keep in the job's row what all of its attempts do alike.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    with transaction(engine) as connection:
        now = jobs.get_job_by_id(connection, job.id)
        if now is None:
            raise LeaseLost
        run_plan = {**now.run_plan, **decided}
        if not jobs.record_run_plan(connection, job.id, job.fence, run_plan):
            raise LeaseLost


def describe_inputs(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Return the files and their digests, as rows record them."""
    return [
        {
            "role": item.role,
            "s3Uri": str(item.uri),
            "sha256": item.sha256,
            "numBytes": item.num_bytes,
        }
        for item in inputs
    ]


def _speed(engine: Engine, job: Job, base: BaseModel, plan: TrainPlan) -> dict[str, Any]:
    """Return the speed of the account's last job of the same weights and method: the same at every
    attempt of a job.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    with engine.connect() as connection:
        now = jobs.get_job_by_id(connection, job.id)
        if now is not None and SPEED in now.run_plan:
            found: dict[str, Any] = now.run_plan[SPEED]
            return found
        scope = (job.account, job.region, job.spec["weights"])
        last = jobs.last_speed(connection, *scope, plan.method, default_method=base.method)
    speed = {} if last is None else {"job": last[0], "tokensPerSecond": last[1]}
    note(engine, job, **{SPEED: speed})
    return speed
