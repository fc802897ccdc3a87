"""Operations of our own on exports: start one, look at it, list them, stop one.

An export is a row of the job queue in a line of its own, and a worker runs it: nothing here reads
a model.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from outcrop.api.context import RequestContext
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.api.resources import CUSTOM_MODEL, MODEL_EXPORT, find
from outcrop.errors import ConflictException, ModelError, ValidationException
from outcrop.identity.authorize import assume_role_for_service
from outcrop.ids import S3Uri, model_export_arn, new_id
from outcrop.jobs import places, queue
from outcrop.jobs.artifacts import EXPORT_MANIFEST, export_folder
from outcrop.jobs.parents import describe_parent
from outcrop.jobs.states import statuses_of, wire_status
from outcrop.jobs.subjects import (
    OUTPUT_MEMBER,
    UPLOADING,
    WRITING,
    base_of,
    describe_subject,
)
from outcrop.models.artifact import read_artifact
from outcrop.models.exported import ADAPTER, GGUF, check_form
from outcrop.models.files import read_json
from outcrop.models.weights import SHIPPED_KEY, weights_folder
from outcrop.store import jobs, models
from outcrop.store.database import lock_account, transaction
from outcrop.store.rows import EXPORT, CustomModel, Job, JobSummary, NewJob
from outcrop.store.tokens import find_replay, request_token

_CORES = 1
_MEMORY_BYTES = 1 << 30
"""What a small model takes; told to who looks, and no bound on what starts."""


def export_model(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Check what can be known now and queue the export; nothing has run when this returns."""
    services = context.services
    with services.engine.connect() as connection:
        model = find(connection, context, CUSTOM_MODEL, params["modelIdentifier"], "ExportModel")
        context.require(connection, "iam:PassRole", params["roleArn"])
        # A repeat is answered as the first request was, also when the bucket is gone meanwhile.
        token = request_token(context.account, context.region, context.operation, params)
        replayed = find_replay(connection, token)
        if replayed is not None:
            return {"exportArn": model_export_arn(context.region, context.account, replayed)}
        data_type = check_form(params["format"], params.get("dataType"))
        output = _output(params)
        role = assume_role_for_service(connection, context.account, params["roleArn"])
        places.check_writable(connection, role, output)
    _check_model(context, model, params["format"])
    places.check_bucket(services.objects, output)
    export_id = new_id()
    new = NewJob(
        id=export_id,
        account=context.account,
        region=context.region,
        kind=EXPORT,
        arn=model_export_arn(context.region, context.account, export_id),
        name=export_id,
        owner_principal=context.principal.arn,
        spec={
            **params,
            "dataType": data_type,
            "subject": describe_subject(model),
            "parent": describe_parent(model),
        },
        stages=(WRITING, UPLOADING),
        cores=_CORES,
        memory_bytes=_MEMORY_BYTES,
        uses_model_arn=model.arn,
    )
    with transaction(services.engine) as connection:
        # Held to the end: the model cannot be deleted before the row that needs it is there.
        lock_account(connection, context.account, context.region)
        is_there = models.get_model(connection, context.account, context.region, model.arn)
        if is_there is None and find_replay(connection, token) is None:
            raise ValidationException(
                f"The custom model {model.name} was deleted while its export was asked for."
            )
        export = jobs.create_job(connection, new, token=token)
    return {"exportArn": export.arn}


def get(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Describe an export, named by ARN or id, and what it wrote."""
    with context.services.engine.connect() as connection:
        identifier = params["exportIdentifier"]
        export = find(connection, context, MODEL_EXPORT, identifier, "GetModelExport")
        return _describe(connection, export)


def list_(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """List the exports of the account, newest first."""
    position = read_token(context, params)
    with context.services.engine.connect() as connection:
        context.require(connection, "bedrock:ListModelExports", "*")
        page = jobs.list_jobs(
            connection,
            context.account,
            context.region,
            EXPORT,
            statuses=statuses_of(params["statusEquals"]) if "statusEquals" in params else None,
            limit=page_size(params),
            after=position,
        )
    answer: dict[str, Any] = {"modelExportSummaries": [_summarize(export) for export in page.items]}
    if page.next is not None:
        answer["nextToken"] = make_token(context, params, page.next)
    return answer


def stop(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Ask an export to stop. One that waits is stopped at once, one that runs within seconds."""
    with transaction(context.services.engine) as connection:
        identifier = params["exportIdentifier"]
        export = find(connection, context, MODEL_EXPORT, identifier, "StopModelExport")
        if not jobs.request_stop(connection, export.id):
            raise ConflictException(
                f"The model export {export.id} is {wire_status(export.status)}. Only an export "
                "that is InProgress can be stopped."
            )
    return {}


def _output(params: dict[str, Any]) -> S3Uri:
    text = params["outputDataConfig"]["s3Uri"]
    output = places.place(OUTPUT_MEMBER, text)
    # The longest key that is certain to be written must be one that a store takes.
    last = export_folder(output, "x" * 12).join(EXPORT_MANIFEST)
    places.place(OUTPUT_MEMBER, str(last))
    return output


def _check_model(context: RequestContext, model: CustomModel, form: str) -> None:
    """Refuse a form that the model has not, as far as that is seen without reading its weights."""
    if model.status != "Active":
        raise ValidationException(
            f"The custom model {model.name} is {model.status}. Only one that is Active can be "
            "exported."
        )
    settings = context.services.settings
    try:
        base = base_of(context.services.catalog, describe_subject(model))
        found = read_artifact(settings.data_dir / model.artifact_path)
        if form == ADAPTER and found.adapter is None:
            raise ValidationException(
                f"The custom model {model.name} has no adapter: all its weights are its own. "
                "Export it as merged or gguf."
            )
        if form == GGUF and base.weights != SHIPPED_KEY:  # that one can be
            # Only who asks for GGUF pays for this import.
            from outcrop.models.gguf_file import check_gguf

            folder = weights_folder(settings, base.weights)
            check_gguf(read_json((found.weights or folder) / "config.json"), folder)
    except ModelError as error:
        raise ValidationException(
            f"The custom model {model.name} cannot be exported as {form}. {error}"
        ) from error


def _describe(connection: Connection, export: Job) -> dict[str, Any]:
    found = export.result or {}
    return {
        **_summarize(export),
        "roleArn": export.spec["roleArn"],
        "outputDataConfig": export.spec["outputDataConfig"],
        "failureMessage": export.failure_message,
        "queuePosition": queue.queue_position(connection, export.id, EXPORT),
        "attempt": export.attempts,
        "stage": export.progress.get("stage"),
        "outputs": found.get("outputs"),
        "manifest": found.get("manifest"),
    }


def _summarize(export: Job | JobSummary) -> dict[str, Any]:
    return {
        "exportArn": export.arn,
        "modelArn": export.spec["subject"]["modelArn"],
        "format": export.spec["format"],
        "dataType": export.spec["dataType"],
        "status": wire_status(export.status),
        "creationTime": export.created_at,
        "lastModifiedTime": export.last_modified_at,
        "endTime": export.ended_at,
    }
