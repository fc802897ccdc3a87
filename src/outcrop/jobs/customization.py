"""The stages of a customization job: validation, data processing, training with publication.

Turns a job's row into a custom model and the two CSV files in the owner's bucket. Whatever it
reads, it reads with the permissions of the job's role. Nothing is visible as a model before the
one transaction that also ends the job.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from outcrop.errors import LeaseLost, ModelError, StopRequested, TrainingError
from outcrop.ids import S3Uri, custom_model_arn
from outcrop.jobs import artifacts, memory, validation
from outcrop.jobs.checkpoints import continued_folders
from outcrop.jobs.cleaning import clean_inputs
from outcrop.jobs.parents import ADAPTER_MEMBER, describe_adapter
from outcrop.jobs.publishing import publish_folder
from outcrop.jobs.reporting import Reporter
from outcrop.jobs.validation import Data, Start
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.objects.client import ObjectStore, object_store
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job, NewCustomModel
from outcrop.train.memory import bounded_memory, reserved_bytes
from outcrop.train.own_parameters import CLEAN
from outcrop.train.plan import TrainPlan

if TYPE_CHECKING:
    from outcrop.evaluate.parity import Parity
    from outcrop.train.loop import TrainResult
    from outcrop.train.tuning import ThreadPlan

logger = logging.getLogger("outcrop.attempt")

THREADS = "threads"
"""In a job's run plan: how its cores are used."""


def run(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
) -> None:
    """Take a job from its row to its model.

    Args:
        objects: where the job's places are; None takes the store of the settings.
    Raises:
        DataError, ValidationException, ModelError, TrainingError, ObjectStoreError: the job fails,
            with the error's text as its reason.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the job.
    """
    base = load_catalog(settings).resolve(job.spec["baseModelId"])
    if base is None:
        raise ModelError(
            f"The base model {job.spec['baseModelId']} is not in the catalogue any more."
        )
    stage = _Stages(engine, job)
    objects = objects or object_store(settings)

    stage.begin("validation")
    start = validation.begin(settings, engine, objects, job, base, should_stop)
    plan, output = start.plan, start.output
    folder = artifacts.output_folder(output, job.id)
    report_uri = folder.join(artifacts.DATA_REPORT_PAGE)
    checked = validation.check_inputs(settings, engine, job, base, start, report_uri, should_stop)
    validation.write_report(engine, objects, job, checked.report, folder)
    if checked.refusal is not None:
        raise checked.refusal
    validation.write_accepted(engine, objects, job, checked.check, start.inputs, folder)
    lineage = validation.describe_inputs(start.inputs)
    cleans = plan.data_policy == CLEAN
    if not cleans:
        data = validation.read_data(settings, job, base, start)
        portions = validation.settle(settings, engine, job, start, data)
    _check_stop(should_stop)
    stage.end("validation")

    stage.begin("dataProcessing")
    if cleans:
        start, lineage = _clean(settings, engine, objects, job, base, start, folder, should_stop)
        data = validation.read_data(settings, job, base, start)
        portions = validation.settle(settings, engine, job, start, data)
    if len(start.inputs) == 1 and plan.evaluation_percentage:
        data = Data(*plan.split(data.training))
    _check_stop(should_stop)
    stage.end("dataProcessing")

    stage.begin("training")
    # Here, because it brings torch and transformers: a job that fails before does not wait for
    # them, which takes seconds, and under load many.
    from outcrop.evaluate.parity import check_parity
    from outcrop.models.compiled import kernel_folder
    from outcrop.models.kernels import keep_kernels_in
    from outcrop.train.device import choose_device
    from outcrop.train.loop import train
    from outcrop.train.tuning import ThreadPlan

    keep_kernels_in(kernel_folder(settings))
    reporter = Reporter(
        engine,
        objects,
        job,
        output,
        total_steps=plan.total_steps(len(data.training)),
        num_epochs=plan.num_epochs,
    )
    work = artifacts.work_folder(settings, job.id, job.fence)
    recorded = job.run_plan.get(THREADS)
    device = choose_device(settings.train_device)
    on_cpu = device.type == "cpu"
    allowed = memory.given(settings, job.memory_bytes)
    # A GPU's driver takes address space by the terabyte, and the bound is of no use to its memory.
    bound = allowed + reserved_bytes(job.cores)
    try:
        with bounded_memory(bound, job.cores) if on_cpu else nullcontext():
            result = train(
                plan,
                start.weights,
                data.training,
                data.validation,
                work,
                parent=start.parent,
                on_step=reporter.on_step,
                on_validation=reporter.on_validation,
                on_resume=reporter.on_resume,
                on_portions=reporter.on_portions,
                should_stop=should_stop,
                threads=job.cores,  # what the queue set aside for it, on whatever machine
                device=device,
                micro_batch_tokens=portions.tokens if on_cpu else None,
                kept_tokens=portions.kept_tokens if on_cpu else None,
                cuts=int(job.run_plan.get(memory.MEMORY_CUTS, 0)),
                thread_plan=ThreadPlan(**recorded) if recorded else None,
                thread_plans=artifacts.thread_plan_folder(settings),
                on_thread_plan=partial(_record_threads, engine, job),
                checkpoints=artifacts.checkpoint_folder(settings, job.id, job.fence),
                checkpoint_seconds=settings.checkpoint_seconds,
                earlier=artifacts.earlier_checkpoint_folders(settings, job.id, job.fence),
                continued=continued_folders(settings, job.spec),
            )
    except (StopRequested, TrainingError):
        reporter.flush()
        raise
    reporter.finish(result.published_step)
    _check_stop(should_stop)
    parity = check_parity(
        start.weights,
        result.artifact,
        result.sample,
        threads=job.cores,
        precision=settings.serve_weights,
        should_stop=should_stop,
    )
    logger.info(
        "served as trained: the loss of %d records is %.4f, and was %.4f",
        *(parity.num_records, parity.served_loss, parity.trained_loss),
    )
    publish(settings, engine, job, base, plan, lineage, result, parity)


def _clean(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    base: BaseModel,
    start: Start,
    folder: S3Uri,
    should_stop: Callable[[], bool],
) -> tuple[Start, list[dict[str, Any]]]:
    """Clean the data and check what comes of it; returns what to train on, and the lineage."""
    cleaned = clean_inputs(settings, engine, objects, job, base, start, folder, should_stop)
    lineage = validation.describe_inputs(start.inputs)
    for row in lineage:
        row["cleaned"] = cleaned.described[row["s3Uri"]]
    start = replace(start, inputs=cleaned.inputs)
    names = (artifacts.CLEANED_REPORT_JSON, artifacts.CLEANED_REPORT_PAGE)
    checked = validation.check_inputs(
        *(settings, engine, job, base, start, folder.join(names[1]), should_stop),
        made_from=cleaned.made_from,
    )
    validation.write_report(engine, objects, job, checked.report, folder, names)
    if checked.refusal is not None:
        raise checked.refusal
    return start, lineage


class _Stages:
    """Moves the job's stages on, under its fence."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine, self._job = engine, job

    def begin(self, name: str) -> None:
        self._advance(name, "InProgress")

    def end(self, name: str) -> None:
        self._advance(name, "Completed")

    def _advance(self, name: str, status: str) -> None:
        with transaction(self._engine) as connection:
            if not jobs.advance_stage(connection, self._job.id, self._job.fence, name, status):
                raise LeaseLost
            if status == "InProgress":
                progress = {"stage": name}
                jobs.record_progress(connection, self._job.id, self._job.fence, progress)
        logger.info("%s: %s", name, status)


def _check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise StopRequested


def _record_threads(engine: Engine, job: Job, plan: ThreadPlan) -> None:
    """Note how the job uses its cores, so that another attempt does it alike.

    Raises:
        LeaseLost: another attempt holds the job.
    """
    validation.note(engine, job, **{THREADS: asdict(plan)})


def publish(
    settings: Settings,
    engine: Engine,
    job: Job,
    base: BaseModel,
    plan: TrainPlan,
    lineage: list[dict[str, Any]],
    result: TrainResult,
    parity: Parity,
    *,
    trained_by: tuple[str, str] | None = None,
) -> None:
    """Move the artifact to its place, then make model and end of job visible in one transaction.

    Args:
        lineage: the data files and their digests.
        trained_by: ARN and name of the job that trained it; None for this job itself.
    Raises:
        StopRequested: the job's owner asked it to stop.
        LeaseLost: another attempt holds the job.
    """
    job_arn, job_name = trained_by or (job.arn, job.name)
    model_id = job.spec["customModelId"]
    place = artifacts.model_folder(settings, model_id, job.fence).relative_to(settings.data_dir)
    folder = publish_folder(settings, result.artifact, str(place))
    metrics: dict[str, Any] = {
        "trainingMetrics": {"trainingLoss": result.training_loss},
        "validationMetrics": (
            [] if result.validation_loss is None else [{"validationLoss": result.validation_loss}]
        ),
        "publishedStep": result.published_step,
        "servingParity": asdict(parity),
    }
    arn = custom_model_arn(job.region, job.account, base.customization_id, model_id)
    model = NewCustomModel(
        id=model_id,
        account=job.account,
        region=job.region,
        arn=arn,
        name=job.spec["customModelName"],
        job_arn=job_arn,
        job_name=job_name,
        base_model_id=base.customization_id,
        base_model_arn=job.spec["baseModelArn"],
        foundation_model_arn=job.spec.get("foundationModelArn", job.spec["baseModelArn"]),
        customization_type=job.spec["customizationType"],
        hyper_parameters=job.spec["hyperParameters"],
        spec={
            **job.spec,
            ADAPTER_MEMBER: describe_adapter(plan),
            "data": lineage,
        },
        metrics=metrics,
        artifact_path=str(folder.relative_to(settings.data_dir)),
        artifact_digest=result.digest,
        tags={tag["key"]: tag["value"] for tag in job.spec.get("customModelTags", ())},
    )
    with transaction(engine) as connection:
        completed = jobs.complete_job(
            connection, job.id, job.fence, result={"outputModelArn": arn, **metrics}, model=model
        )
    if not completed:
        shutil.rmtree(folder, ignore_errors=True)
        with engine.connect() as connection:
            now = jobs.get_job_by_id(connection, job.id)
        if now is not None and now.fence == job.fence and now.status == "stopping":
            raise StopRequested
        raise LeaseLost
    logger.info("published %s", arn)
