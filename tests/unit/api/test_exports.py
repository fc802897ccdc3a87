"""Exports: what is started, refused, told and stopped; nothing here reads a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, claimed, new_model

from outcrop.api import custom_models, exports
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ConflictException,
    ResourceNotFoundException,
    ValidationException,
)
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.models.weights import SHIPPED_KEY
from outcrop.store import jobs, models
from outcrop.store.database import transaction
from outcrop.store.rows import EXPORT, Job
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json

REQUEST: dict[str, Any] = {
    "modelIdentifier": "mine",
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "format": "gguf",
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
}
RESULT: dict[str, Any] = {
    "outputs": [{"name": "model.gguf", "s3Uri": "s3://b/k", "sha256": "ab", "numBytes": 7}],
    "manifest": "s3://b/manifest.json",
}


@pytest.fixture(autouse=True)
def objects(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    objects = MemoryStore()
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    return objects


@pytest.fixture(autouse=True)
def artifact(services: Services) -> Path:
    """The folder of the model `mine`: an adapter."""
    folder = services.settings.data_dir / "models" / "custom" / "mine" / "1"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    spec = {"baseModelId": "amazon.titan-text-lite-v1", "weights": SHIPPED_KEY, "data": []}
    with transaction(services.engine) as connection:
        path = str(folder.relative_to(services.settings.data_dir))
        models.insert_model(connection, new_model("mine", spec=spec, artifact_path=path))
    return folder


def start(context: Context, **changes: Any) -> str:
    arn: str = exports.export_model(context("ExportModel"), {**REQUEST, **changes})["exportArn"]
    return arn


def get(context: Context, identifier: str) -> dict[str, Any]:
    return exports.get(context("GetModelExport"), {"exportIdentifier": identifier})


def row(services: Services, arn: str) -> Job:
    with services.engine.connect() as connection:
        export = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
    assert export is not None
    return export


def test_an_export_waits_in_a_line_of_its_own_and_tells_what_it_wrote(
    services: Services, context: Context
) -> None:
    arn = start(context)
    export = row(services, arn)
    assert (export.kind, export.status, export.model_name) == (EXPORT, "queued", None)
    told = get(context, arn)
    assert (told["status"], told["queuePosition"], told["dataType"]) == ("InProgress", 0, "f32")
    assert get(context, export.id) == told
    with transaction(services.engine) as connection:
        held = claimed(connection, export)
        jobs.complete_task(connection, held.id, held.fence, result=RESULT, message="done")
    told = get(context, arn)
    assert {name: told[name] for name in RESULT} == RESULT
    shape = service_model("outcrop").operation_model("GetModelExport").output_shape
    sent = to_json(shape, told)
    assert sent["outputs"][0]["numBytes"] == 7
    assert {"failureMessage", "queuePosition"}.isdisjoint(sent)
    (listed,) = exports.list_(context("ListModelExports"), {})["modelExportSummaries"]
    assert (listed["exportArn"], listed["status"]) == (arn, "Completed")


def test_a_repeated_token_starts_nothing(services: Services, context: Context) -> None:
    first = start(context, clientRequestToken="once")
    assert start(context, clientRequestToken="once") == first
    with pytest.raises(ConflictException, match="used for another ExportModel"):
        start(context, clientRequestToken="once", dataType="f16")
    assert len(exports.list_(context("ListModelExports"), {})["modelExportSummaries"]) == 1


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"modelIdentifier": "other"}, ResourceNotFoundException, "other does not name"),
        ({"dataType": "q8_0", "format": "merged"}, ValidationException, "cannot be of dataType"),
        ({"outputDataConfig": {"s3Uri": "s3://gone/x"}}, ValidationException, "does not exist"),
        ({"outputDataConfig": {"s3Uri": "x"}}, ValidationException, "outputDataConfig.s3Uri is"),
        ({"roleArn": role_arn(ACCOUNT, "none")}, ValidationException, "none"),
    ],
)
def test_what_can_be_known_is_refused_at_once(
    context: Context, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        start(context, **changes)
    assert not exports.list_(context("ListModelExports"), {})["modelExportSummaries"]


def test_a_model_that_was_trained_as_a_whole_has_no_adapter_to_export(
    context: Context, artifact: Path
) -> None:
    (artifact / "adapter_config.json").rename(artifact / "config.json")
    with pytest.raises(ValidationException, match="has no adapter: all its weights are its own"):
        start(context, format="adapter")


def test_who_may_not_export_that_model_learns_nothing_of_it(context: Context) -> None:
    other = context("ExportModel", allowed=("bedrock:GetCustomModel", "*"))
    for name in ("mine", "nothing"):
        with pytest.raises(AccessDeniedException, match="bedrock:ExportModel"):
            exports.export_model(other, {**REQUEST, "modelIdentifier": name})


def test_a_model_is_not_deleted_while_its_export_has_not_ended(
    context: Context, artifact: Path
) -> None:
    arn = start(context)
    delete = context("DeleteCustomModel")
    with pytest.raises(ConflictException, match=f"model export {arn.rpartition('/')[2]}"):
        custom_models.delete(delete, {"modelIdentifier": "mine"})
    exports.stop(context("StopModelExport"), {"exportIdentifier": arn})
    assert get(context, arn)["status"] == "Stopped"
    with pytest.raises(ConflictException, match="is Stopped"):
        exports.stop(context("StopModelExport"), {"exportIdentifier": arn})
    custom_models.delete(delete, {"modelIdentifier": "mine"})
    assert not artifact.exists()
