"""Batch inference jobs: what is created, refused, told, listed and stopped; no model is asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, REGION, claimed, new_model

from outcrop.api import batch_jobs, tags
from outcrop.api.context import Services
from outcrop.errors import (
    AccessDeniedException,
    ApiError,
    ConflictException,
    ResourceNotFoundException,
    ServiceQuotaExceededException,
    TooManyTagsException,
    ValidationException,
)
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.jobs.batch.states import PHASES, WIRE, states_of, wire_status
from outcrop.store import batches, jobs, models
from outcrop.store.database import transaction
from outcrop.store.rows import BATCH, Job, JobStatus
from outcrop.wire.model import service_model
from outcrop.wire.serialize import to_json
from outcrop.wire.validate import validate

MODEL = "amazon.titan-text-lite-v1"
REQUEST: dict[str, Any] = {
    "jobName": "job-1",
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "modelId": MODEL,
    "inputDataConfig": {"s3InputDataConfig": {"s3Uri": f"s3://{BUCKET}/in/a.jsonl"}},
    "outputDataConfig": {"s3OutputDataConfig": {"s3Uri": f"s3://{BUCKET}/out/"}},
}


@pytest.fixture(autouse=True)
def objects(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    content = {"in/a.jsonl": b"not looked at", "in/b.jsonl": b"", "in/readme.txt": b""}
    objects = MemoryStore(**content)
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    return objects


def create(context: Context, **changes: Any) -> str:
    params = {**REQUEST, **changes}
    shape = service_model("bedrock").operation_model("CreateModelInvocationJob").input_shape
    validate(shape, params)
    arn: str = batch_jobs.create(context("CreateModelInvocationJob"), params)["jobArn"]
    return arn


def get(context: Context, identifier: str) -> dict[str, Any]:
    """What GetModelInvocationJob answers, which must fit botocore's model."""
    found = batch_jobs.get(context("GetModelInvocationJob"), {"jobIdentifier": identifier})
    shape = service_model("bedrock").operation_model("GetModelInvocationJob").output_shape
    to_json(shape, {name: value for name, value in found.items() if value is not None})
    assert all(found.get(name) is not None for name in shape.required_members)
    assert set(found) <= set(shape.members)
    return found


def listed(context: Context, **filters: Any) -> list[str]:
    found = batch_jobs.list_(context("ListModelInvocationJobs"), filters)
    return [item["jobName"] for item in found["invocationJobSummaries"]]


def row(services: Services, arn: str) -> Job:
    with services.engine.connect() as connection:
        found = batches.get_batch(connection, ACCOUNT, REGION, arn)
    assert found is not None
    return found


def input_at(uri: str, **more: Any) -> dict[str, Any]:
    return {"s3InputDataConfig": {"s3Uri": uri, **more}}


def test_a_job_is_told_as_it_was_asked_for(context: Context, services: Services) -> None:
    arn = create(context, clientRequestToken="t1", timeoutDurationInHours=48)
    assert arn == f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-invocation-job/{arn[-12:]}"
    found = get(context, arn)
    assert found == get(context, arn[-12:])
    for name in ("jobName", "roleArn", "modelId", "inputDataConfig", "outputDataConfig"):
        assert found[name] == REQUEST[name]
    assert (found["status"], found["clientRequestToken"]) == ("Submitted", "t1")
    assert (found["modelInvocationType"], found["timeoutDurationInHours"]) == ("InvokeModel", 48)
    assert abs(found["jobExpirationTime"] - found["submitTime"] - timedelta(hours=48)) < (
        timedelta(seconds=5)
    )
    assert "totalRecordCount" not in found
    (summary,) = batch_jobs.list_(context("ListModelInvocationJobs"), {})["invocationJobSummaries"]
    assert summary == found
    with pytest.raises(ResourceNotFoundException, match="does not name a batch inference job"):
        get(context, "job-1")
    assert row(services, arn).spec["weights"]


def test_counts_and_the_reason_are_told(context: Context, services: Services) -> None:
    arn = create(context)
    progress = {"totalRecordCount": 9, "processedRecordCount": 4, "usage": {}}
    with transaction(services.engine) as connection:
        job = claimed(connection, row(services, arn))
        jobs.record_progress(connection, job.id, job.fence, progress)
        batches.set_phase(connection, job.id, job.fence, "InProgress")
    found = get(context, arn)
    assert (found["totalRecordCount"], found["processedRecordCount"]) == (9, 4)
    assert found["status"] == "InProgress"
    with transaction(services.engine) as connection:
        jobs.fail_job(connection, job.id, job.fence, "for a reason")
    assert get(context, arn)["message"] == "for a reason"


def test_a_repeated_request_makes_one_job_and_a_name_is_given_once(context: Context) -> None:
    first = create(context, clientRequestToken="t1")
    assert create(context, clientRequestToken="t1") == first
    with pytest.raises(ConflictException, match="was used for another"):
        create(context, clientRequestToken="t1", jobName="another")
    with pytest.raises(ConflictException) as refused:
        create(context, clientRequestToken="t2")
    assert refused.value.message == "The provided job name is currently in use."
    assert listed(context) == ["job-1"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"jobName": "a_b"}, "regular expression pattern"),
        ({"jobName": "-a"}, "regular expression pattern"),
        ({"jobName": "a" * 64}, "length less than or equal to 63"),
        ({"timeoutDurationInHours": 23}, "greater than or equal to 24"),
        ({"timeoutDurationInHours": 169}, "less than or equal to 168"),
        ({"modelInvocationType": "Stream"}, r"enum value set: \[InvokeModel, Converse\]"),
        ({"modelId": "nobody.knows-v1"}, "model identifier is invalid"),
        ({"modelId": f"arn:aws:bedrock:{REGION}:{ACCOUNT}:provisioned-model/abcdefghijkl"},
         "regular expression pattern"),
        ({"roleArn": role_arn(ACCOUNT, "nobody")}, "nobody does not exist"),
        ({"inputDataConfig": input_at(f"s3://{BUCKET}/none.jsonl")}, "There is no object"),
        ({"inputDataConfig": input_at("s3://elsewhere/in/")}, "The bucket does not exist"),
        ({"inputDataConfig": input_at(f"s3://{BUCKET}/in/readme.txt")}, "does not end in .jsonl"),
        ({"inputDataConfig": input_at(f"s3://{BUCKET}/in/a.jsonl", s3BucketOwner=OTHER_ACCOUNT)},
         "the bucket owner 210987654321"),
        ({"outputDataConfig": {"s3OutputDataConfig": {"s3Uri": "s3://elsewhere/out"}}},
         "The bucket does not exist"),
        ({"outputDataConfig": {"s3OutputDataConfig": {
            "s3Uri": f"s3://{BUCKET}/out", "s3EncryptionKeyId": "key"}}}, "s3EncryptionKeyId"),
        ({"outputDataConfig": {"s3OutputDataConfig": {"s3Uri": f"s3://{BUCKET}/{'k' * 1000}"}}},
         "key"),
    ],
)  # fmt: skip
def test_what_can_be_known_is_refused_at_once(
    context: Context, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValidationException, match=reason):
        create(context, **changes)
    assert listed(context) == []


def test_sizes_have_quotas_that_are_settings(
    context: Context, services: Services, objects: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = services.settings
    assert (settings.max_batch_file_bytes, settings.max_batch_bytes) == (1 << 30, 5 << 30)
    monkeypatch.setitem(vars(settings), "max_batch_file_bytes", 13)
    create(context)
    monkeypatch.setitem(vars(settings), "max_batch_file_bytes", 12)
    with pytest.raises(ServiceQuotaExceededException, match=r"has 13 bytes.*max_batch_file_bytes"):
        create(context, jobName="large")
    monkeypatch.setitem(vars(settings), "max_batch_file_bytes", 13)
    monkeypatch.setitem(vars(settings), "max_batch_bytes", 12)
    with pytest.raises(ServiceQuotaExceededException, match="2 input files have 13 bytes"):
        create(context, jobName="many", inputDataConfig=input_at(f"s3://{BUCKET}/in/"))


def test_only_who_may_creates_reads_lists_and_stops(context: Context) -> None:
    arn = create(context)
    allowed = ("s3:GetObject", "*")
    for call, operation, params in (
        (batch_jobs.create, "CreateModelInvocationJob", REQUEST),
        (batch_jobs.get, "GetModelInvocationJob", {"jobIdentifier": arn}),
        (batch_jobs.list_, "ListModelInvocationJobs", {}),
        (batch_jobs.stop, "StopModelInvocationJob", {"jobIdentifier": arn}),
    ):
        caller = context(operation, allowed=allowed) if call is batch_jobs.create else caller_of(
            context, operation
        )  # fmt: skip
        with pytest.raises(AccessDeniedException, match=f"bedrock:{operation}"):
            call(caller, params)


def caller_of(context: Context, operation: str) -> Any:
    """The same user again, who may read objects only."""
    from dataclasses import replace

    from outcrop.identity.principals import user_principal

    return replace(context(operation), principal=user_principal(ACCOUNT, "somebody"))


def test_tags_are_given_with_the_job_and_changed_later(context: Context) -> None:
    arn = create(context, tags=[{"key": "team", "value": "geology"}])
    tags.tag_resource(
        context("TagResource"), {"resourceARN": arn, "tags": [{"key": "a", "value": "b"}]}
    )
    found = tags.list_tags_for_resource(context("ListTagsForResource"), {"resourceARN": arn})
    assert found["tags"] == [{"key": "a", "value": "b"}, {"key": "team", "value": "geology"}]
    many = [{"key": f"k{number}", "value": ""} for number in range(51)]
    with pytest.raises(TooManyTagsException):
        create(context, jobName="many", tags=many)


def test_a_waiting_job_is_stopped_at_once_and_only_once(context: Context) -> None:
    arn = create(context)
    caller = context("StopModelInvocationJob")
    assert batch_jobs.stop(caller, {"jobIdentifier": arn}) == {}
    found = get(context, arn)
    assert found["status"] == "Stopped"
    assert found["endTime"] is not None
    with pytest.raises(ConflictException, match="job-1 is Stopped"):
        batch_jobs.stop(caller, {"jobIdentifier": arn})


def test_lists_are_filtered_sorted_and_paged(context: Context, services: Services) -> None:
    names = [f"job-{number}" for number in range(5)]
    arns = [create(context, jobName=name) for name in names]
    batch_jobs.stop(context("StopModelInvocationJob"), {"jobIdentifier": arns[2]})
    assert listed(context) == names[::-1]
    assert listed(context, sortOrder="Ascending", sortBy="CreationTime") == names
    assert listed(context, nameContains="b-3") == ["job-3"]
    assert listed(context, statusEquals="Stopped") == ["job-2"]
    assert listed(context, statusEquals="Submitted", sortOrder="Ascending") == [
        name for name in names if name != "job-2"
    ]
    at = get(context, arns[2])["submitTime"]
    assert listed(context, submitTimeAfter=at) == ["job-4", "job-3"]
    assert listed(context, submitTimeBefore=at) == ["job-1", "job-0"]
    found: list[str] = []
    params: dict[str, Any] = {"maxResults": 2}
    while True:
        page = batch_jobs.list_(context("ListModelInvocationJobs"), params)
        found += [item["jobName"] for item in page["invocationJobSummaries"]]
        if "nextToken" not in page:
            break
        params = {"maxResults": 2, "nextToken": page["nextToken"]}
    assert found == names[::-1]
    with pytest.raises(ValidationException, match="nextToken is invalid"):
        listed(context, nextToken=page.get("nextToken", "tampered"))


def test_every_state_shows_as_one_of_bedrock_s_and_is_found_by_it(
    context: Context, services: Services
) -> None:
    allowed = service_model("bedrock").shape_for("ModelInvocationJobStatus").enum
    assert {name for names in WIRE.values() for name in names.values()} == set(allowed)
    assert {phase for names in WIRE.values() for phase in names} == set(PHASES)
    arn = create(context)
    for wire in allowed:
        for status, phase in states_of(wire):
            assert wire_status(status, phase) == wire
            put(services, arn, status, phase)
            assert get(context, arn)["status"] == wire
            matching = [name for name in allowed if listed(context, statusEquals=name)]
            assert matching == [wire]


def put(services: Services, arn: str, status: JobStatus, phase: str) -> None:
    import sqlalchemy as sa

    from outcrop.store import tables

    with transaction(services.engine) as connection:
        query = sa.update(tables.job).where(tables.job.c.arn == arn)
        connection.execute(query.values(status=status, phase=phase))


def test_a_custom_model_that_a_job_asks_is_not_deleted_before_its_end(
    context: Context, services: Services
) -> None:
    base = services.catalog.resolve(MODEL)
    assert base is not None
    new = new_model("mine", spec={"weights": base.weights})
    with transaction(services.engine) as connection:
        models.insert_model(connection, new)
    arn = create(context, modelId=new.arn)
    spec = row(services, arn).spec
    assert (spec["artifactPath"], spec["artifactDigest"]) == (new.artifact_path, "0" * 64)
    with transaction(services.engine) as connection:
        found = models.get_model(connection, ACCOUNT, REGION, new.arn)
        assert found is not None
        assert new.artifact_path in models.artifact_paths(connection)
        with pytest.raises(ApiError, match="job-1"):
            models.delete_model(connection, found)
    batch_jobs.stop(context("StopModelInvocationJob"), {"jobIdentifier": arn})
    with transaction(services.engine) as connection:
        models.delete_model(connection, found)


def test_expired_jobs_are_ended_by_whoever_looks(context: Context, services: Services) -> None:
    arn = create(context)
    with transaction(services.engine) as connection:
        assert batches.end_expired(connection, datetime.now(UTC) + timedelta(hours=23)) == []
        assert batches.end_expired(connection, datetime.now(UTC) + timedelta(hours=25)) == [
            arn[-12:]
        ]
    found = get(context, arn)
    assert (found["status"], BATCH in found["message"]) == ("Expired", False)
    assert "did not begin before its time was up" in found["message"]
