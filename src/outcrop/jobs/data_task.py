"""The stages of a data task: work on data files without a customization job.

A preflight is the validation stage of a job with the same members, and says what the job would say.
A check is the same without a look at memory; the other kinds make files (`making.py`). What comes
of a task is in its row and in the owner's bucket. Its objects depend on the data alone, and each
becomes visible whole or not at all: an attempt that follows a killed one writes the same ones
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from sqlalchemy import Engine

from outcrop.data.check import Check
from outcrop.data.defects import SEVERITIES
from outcrop.data.report import describe_defect
from outcrop.errors import LeaseLost, ModelError, OutOfMemoryError, SettingsError, StopRequested
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts, making, validation
from outcrop.jobs.estimate import Counts, describe_estimate, estimate_job
from outcrop.jobs.publishing import begin_stage
from outcrop.jobs.queue import JOB_NEEDS
from outcrop.jobs.validation import Checked, Start
from outcrop.meter.prices import PriceBook, load_prices
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.objects.client import ObjectStore, object_store
from outcrop.settings import Settings
from outcrop.store import jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job

CHECK, PREFLIGHT = "check", "preflight"
MAX_DEFECTS = 50
"""Defects that the row keeps; the report has more."""
_OUTPUT_NAMES = {
    artifacts.DATA_REPORT_JSON: "reportJson",
    artifacts.DATA_REPORT_PAGE: "reportHtml",
}


def run(
    settings: Settings,
    engine: Engine,
    job: Job,
    should_stop: Callable[[], bool],
    *,
    objects: ObjectStore | None = None,
) -> None:
    """Take a data task from its row to its result.

    Args:
        objects: where the task's places are; None takes the store of the settings.
    Raises:
        DataError, ValidationException, ModelError, TrainingError, ObjectStoreError: the task fails,
            with the error's text as its reason. That a check finds data which cannot be trained on
            is no such error.
        StopRequested: `should_stop` answered True.
        LeaseLost: another attempt holds the task.
    """
    base = load_catalog(settings).resolve(job.spec["baseModelId"])
    if base is None:
        raise ModelError(
            f"The base model {job.spec['baseModelId']} is not in the catalogue any more."
        )
    kind = job.spec["kind"]
    objects = objects or object_store(settings)
    begin_stage(engine, job, kind)
    start = validation.begin(settings, engine, objects, job, base, should_stop)
    # At once: whatever an attempt after this one says, it says of the same bytes.
    validation.note(engine, job, data=start.digests.found)
    if kind in (CHECK, PREFLIGHT):
        result = _check(settings, engine, objects, job, base, start, should_stop)
        message = f"The data are {result['verdict']}."
    else:
        folder = artifacts.task_folder(start.output, job.id)
        made = making.make(settings, job, base, start, folder, should_stop)
        outputs = making.write_made(engine, objects, job, folder, made)
        result = {"files": validation.describe_inputs(start.inputs), "outputs": outputs}
        message = f"{len(outputs)} files were written below {folder}."
    with transaction(engine) as connection:
        done = jobs.complete_task(connection, job.id, job.fence, result=result, message=message)
    if not done:
        with engine.connect() as connection:
            now = jobs.get_job_by_id(connection, job.id)
        if now is not None and now.fence == job.fence and now.status == "stopping":
            raise StopRequested
        raise LeaseLost


def _check(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    base: BaseModel,
    start: Start,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    folder = artifacts.task_folder(start.output, job.id)
    report_uri = folder.join(artifacts.DATA_REPORT_PAGE)
    checked = validation.check_inputs(settings, engine, job, base, start, report_uri, should_stop)
    refusal = None if checked.refusal is None else checked.refusal.message
    foretold = None
    if job.spec["kind"] == PREFLIGHT and refusal is None:
        foretold, refusal = _foretell(settings, engine, job, base, start, checked)
    report = {**checked.report, "rejection": refusal}
    written = validation.write_report(engine, objects, job, report, folder)
    return {
        "verdict": "accepted" if refusal is None else "rejected",
        "rejection": refusal,
        **_found(checked),
        "files": _files(checked.check, start),
        "outputs": describe_outputs(folder, written),
        **({} if foretold is None else {"estimate": foretold}),
    }


def _foretell(
    settings: Settings, engine: Engine, job: Job, base: BaseModel, start: Start, checked: Checked
) -> tuple[dict[str, Any], str | None]:
    """Return what the job will take and cost, and why it would not fit, or None where it would."""
    data = validation.read_data(settings, job, base, start)
    refusal = None
    try:
        validation.settle(settings, engine, replace(job, **job.spec[JOB_NEEDS]), start, data)
    except OutOfMemoryError as error:
        refusal = str(error)
    lengths = [len(example.input_ids) for example in data.training]
    trained = lengths
    if len(start.inputs) == 1 and start.plan.evaluation_percentage:
        trained, _ = start.plan.split(lengths)
    measured = checked.report["training"] or {}
    name, speed = measured.get("measuredBy"), measured.get("tokensPerSecond")
    found = estimate_job(
        *(settings, replace(base, weights=job.spec["weights"]), start.plan),
        cores=job.spec[JOB_NEEDS]["cores"],
        data_bytes=sum(item.num_bytes for item in start.inputs),
        book=_prices(settings),
        parent=start.parent,
        counts=Counts(sum(trained), max(lengths, default=0)),
        speed=(name, speed) if name and speed else None,
    )
    refused = found.refusal.message if found.refusal and settings.refuse_unfit_jobs else None
    refusal = refusal or refused
    described = {**describe_estimate(found), "fits": refusal is None}
    return described | ({} if refusal is None else {"refusal": refusal}), refusal


def _prices(settings: Settings) -> PriceBook:
    try:
        return load_prices(settings.price_book)
    except SettingsError as error:  # changed since the start, which refuses a wrong one
        raise ModelError(str(error)) from error


def _found(checked: Checked) -> dict[str, Any]:
    check = checked.check
    gravest = sorted(check.defects, key=lambda defect: SEVERITIES.index(defect.severity))
    defects = []
    for defect in gravest[:MAX_DEFECTS]:
        row = describe_defect(defect)
        shown = ("code", "severity", "line", "message", "value")
        defects.append({"s3Uri": row["file"], **{name: row[name] for name in shown}})
    return {
        "counts": {str(severity): check.count(severity) for severity in SEVERITIES},
        "countsByCode": {code: sum(counts.values()) for code, counts in check.counts.items()},
        "defects": defects,
    }


def _files(check: Check, start: Start) -> list[dict[str, Any]]:
    facts = {found.name: found for found in check.files}
    rows = validation.describe_inputs(start.inputs)
    for row in rows:
        found = facts[row["s3Uri"]]
        row["records"] = found.num_records
        row["rejected"] = found.num_records - found.num_usable
        if check.tokens is not None and row["role"] == "training":
            row["tokens"] = check.tokens.epoch_tokens
    return rows


def describe_outputs(folder: S3Uri, written: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Return what was written below a folder, as GetDataTask tells it."""
    return [
        {
            "name": _OUTPUT_NAMES[name],
            "s3Uri": str(folder.join(name)),
            "sha256": hashlib.sha256(content).hexdigest(),
            "numBytes": len(content),
        }
        for name, content in written.items()
    ]
