"""Jobs and custom models as a client meets them: whole requests, whole answers, many at once.

Every answer passes through `check_answer`, so it is also held against its service model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from tests.protocol.answers import check_answer
from tests.protocol.in_process import Gateway, Refused, gateway_in_process
from tests.protocol.wires import send
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, REGION, claimed, new_model, new_throughput

from outcrop.api.context import Services
from outcrop.api.operations import OPERATIONS
from outcrop.identity import accounts
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import role_arn
from outcrop.models.weights import SHIPPED_KEY
from outcrop.store import jobs, models, tables, throughputs
from outcrop.store.database import transaction
from outcrop.store.rows import NewCustomModel
from outcrop.wire.model import service_model

ROLE = role_arn(ACCOUNT, CUSTOMIZATION_ROLE)
STARTED = {
    "roleArn": ROLE,
    "baseModelIdentifier": "amazon.titan-text-lite-v1",
    "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
}
SPEC = {
    "weights": SHIPPED_KEY,
    **{name: STARTED[name] for name in ("trainingDataConfig", "outputDataConfig")},
}
METRICS = {"trainingMetrics": {"trainingLoss": 1.5}, "validationMetrics": []}
QUOTAS: dict[str, Any] = {"max_throughputs": 9, "max_model_units": 9, "machine_model_units": 9}


@pytest.fixture
def gateway(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Gateway]:
    objects = MemoryStore(**{"train.jsonl": b"{}"})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    folder = tmp_path_factory.mktemp("jobs-and-models")
    quotas = dict.fromkeys(("max_custom_models", "max_provisioned_models"), 1000)
    with gateway_in_process(folder, machine_model_units=1000, **quotas) as running:
        yield running


def create(gateway: Gateway, name: str, **changes: Any) -> str:
    request = {"jobName": name, "customModelName": f"{name}-model", **STARTED, **changes}
    answer = gateway.call("bedrock", "CreateModelCustomizationJob", **request)
    return str(answer["jobArn"])


def job(gateway: Gateway, identifier: str) -> dict[str, Any]:
    return gateway.call("bedrock", "GetModelCustomizationJob", jobIdentifier=identifier)


def publish(gateway: Gateway, name: str, **fields: Any) -> NewCustomModel:
    model = new_model(name, spec=SPEC, metrics=METRICS, **fields)
    with transaction(gateway.engine) as connection:
        models.insert_model(connection, model)
    return model


def refusal(gateway: Gateway, name: str, **params: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        gateway.call("bedrock", name, **params)
    return caught.value


# --- what a job says of itself --------------------------------------------------------------------


def test_a_job_is_told_in_every_state_it_can_have(gateway: Gateway) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    arn = create(
        gateway,
        "first",
        clientRequestToken="token-1",
        jobTags=[{"key": "team", "value": "a"}],
        customModelTags=[{"key": "team", "value": "b"}],
        hyperParameters={"epochCount": "2"},
        vpcConfig={"subnetIds": ["subnet-1"], "securityGroupIds": ["sg-1"]},
    )
    assert re.fullmatch(r".*:model-customization-job/amazon\.titan-text-lite-v1:0:4k/\w{12}", arn)
    queued = job(gateway, arn)
    assert job(gateway, "first") | {"ResponseMetadata": 0} == queued | {"ResponseMetadata": 0}
    assert queued["clientRequestToken"] == "token-1"
    assert queued["status"] == "InProgress"
    assert queued["validationDataConfig"] == {"validators": []}
    assert queued["validationMetrics"] == []
    assert queued["hyperParameters"]["epochCount"] == "2"
    assert queued["vpcConfig"]["subnetIds"] == ["subnet-1"]
    assert not {"endTime", "outputModelArn", "trainingMetrics", "failureMessage"} & queued.keys()
    assert queued["statusDetails"]["trainingDetails"] == {"status": "NotStarted"}
    tags = gateway.call("bedrock", "ListTagsForResource", resourceARN=arn)["tags"]
    assert tags == [{"key": "team", "value": "a"}], "the job's own, not its model's"

    with transaction(gateway.engine) as connection:
        row = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
        assert row is not None
        held = claimed(connection, row)
        jobs.advance_stage(connection, held.id, held.fence, "validation", "InProgress")
    begun = job(gateway, arn)["statusDetails"]["validationDetails"]
    assert begun["status"] == "InProgress"
    assert before <= begun["creationTime"] <= begun["lastModifiedTime"] <= datetime.now(UTC)
    with transaction(gateway.engine) as connection:
        jobs.advance_stage(connection, held.id, held.fence, "validation", "Completed")
        jobs.advance_stage(connection, held.id, held.fence, "training", "InProgress")
    details = job(gateway, arn)["statusDetails"]
    assert details["validationDetails"]["creationTime"] == begun["creationTime"]
    assert details["validationDetails"]["lastModifiedTime"] >= begun["lastModifiedTime"]

    gateway.call("bedrock", "StopModelCustomizationJob", jobIdentifier="first")
    stopping = job(gateway, arn)
    assert stopping["status"] == "Stopping"
    assert stopping["statusDetails"]["trainingDetails"]["status"] == "Stopping"
    assert refusal(gateway, "StopModelCustomizationJob", jobIdentifier=arn).code == (
        "ConflictException"
    )
    with transaction(gateway.engine) as connection:
        jobs.end_stopped(connection, held.id, held.fence)
    stopped = job(gateway, arn)
    assert stopped["status"] == "Stopped"
    assert stopped["endTime"] >= stopped["creationTime"]
    (listed,) = gateway.call("bedrock", "ListModelCustomizationJobs")[
        "modelCustomizationJobSummaries"
    ]
    shared = listed.keys() & stopped.keys()
    assert {name: listed[name] for name in shared} == {name: stopped[name] for name in shared}
    assert {"jobArn", "baseModelArn", "status", "statusDetails", "creationTime"} <= shared


@pytest.mark.parametrize("how", ["completed", "failed"])
def test_an_ended_job_and_its_model_are_told(gateway: Gateway, how: str) -> None:
    arn = create(gateway, "one")
    model = new_model("one-model", spec=SPEC, metrics=METRICS, job_arn=arn, job_name="one")
    with transaction(gateway.engine) as connection:
        row = jobs.get_job_by_id(connection, arn.rpartition("/")[2])
        assert row is not None
        held = claimed(connection, row)
        if how == "failed":
            jobs.fail_job(connection, held.id, held.fence, "Line 3 is no JSON.")
        else:
            result = {"outputModelArn": model.arn, **METRICS}
            jobs.complete_job(connection, held.id, held.fence, result=result, model=model)
    ended = job(gateway, arn)
    assert ended["status"] == how.capitalize()
    assert "endTime" in ended
    if how == "failed":
        assert ended["failureMessage"] == "Line 3 is no JSON."
        return
    assert ended["outputModelArn"] == model.arn
    assert ended["trainingMetrics"] == {"trainingLoss": 1.5}
    for identifier in (model.arn, "one-model"):
        found = gateway.call("bedrock", "GetCustomModel", modelIdentifier=identifier)
        assert (found["jobArn"], found["modelStatus"]) == (arn, "Active")
    (listed,) = gateway.call("bedrock", "ListModelCustomizationJobs", statusEquals="Completed")[
        "modelCustomizationJobSummaries"
    ]
    assert listed["customModelArn"] == model.arn
    for own in ("GetJobProgress", "GetJobMetrics", "ListJobEvents"):
        assert gateway.call("outcrop", own, jobIdentifier="one")


# --- lists ----------------------------------------------------------------------------------------


def test_models_are_listed_by_every_filter(gateway: Gateway) -> None:
    parent = publish(gateway, "parent")
    publish(gateway, "child", base_model_arn=parent.arn, customization_type="FINE_TUNING")
    with transaction(gateway.engine) as connection:
        models.insert_model(connection, new_model("making", spec=SPEC, metrics=METRICS))
        making = tables.custom_model.c.name == "making"
        connection.execute(sa.update(tables.custom_model).where(making).values(status="Creating"))

    def names(**filters: Any) -> list[str]:
        found = gateway.call("bedrock", "ListCustomModels", **filters)["modelSummaries"]
        return [item["modelName"] for item in found]

    assert names() == ["making", "child", "parent"]
    assert names(sortBy="CreationTime", sortOrder="Ascending") == ["parent", "child", "making"]
    assert names(sortOrder="Descending") == names()
    assert names(modelStatus="Creating") == ["making"]
    assert names(modelStatus="Failed") == []
    assert names(nameContains="ar") == ["parent"]
    assert names(baseModelArnEquals=parent.arn) == ["child"]
    assert names(foundationModelArnEquals=BASE_ARN, modelStatus="Active") == ["child", "parent"]
    assert names(isOwned=True) == names()
    assert names(isOwned=False) == []
    future = datetime(2100, 1, 1, tzinfo=UTC)
    assert names(creationTimeAfter=future) == []
    assert names(creationTimeBefore=future) == names()


def test_pages_of_a_filtered_list_hold_every_job_once(gateway: Gateway) -> None:
    for number in range(7):
        create(gateway, f"job-{number}")
    gateway.call("bedrock", "StopModelCustomizationJob", jobIdentifier="job-3")
    found: list[str] = []
    query: dict[str, Any] = {"statusEquals": "InProgress", "nameContains": "job", "maxResults": 2}
    while True:
        page = gateway.call("bedrock", "ListModelCustomizationJobs", **query)
        found += [item["jobName"] for item in page["modelCustomizationJobSummaries"]]
        if "nextToken" not in page:
            break
        assert len(page["modelCustomizationJobSummaries"]) == 2
        query["nextToken"] = page["nextToken"]
    assert found == ["job-6", "job-5", "job-4", "job-2", "job-1", "job-0"]


PAGED = sorted(
    (service, name)
    for service, name in OPERATIONS
    if (shape := service_model(service).operation_model(name).input_shape)
    and "nextToken" in shape.members
    and set(shape.required_members) <= {"jobIdentifier"}
)


def test_a_token_of_another_list_query_or_account_is_refused_by_every_list(
    gateway: Gateway,
) -> None:
    """Of every operation that takes one; those that need a job are given one."""
    for number in range(2):
        create(gateway, f"job-{number}")
    page = gateway.call("bedrock", "ListModelCustomizationJobs", maxResults=1)
    token = page["nextToken"]
    with transaction(gateway.engine) as connection:
        accounts.create_user(connection, "210987654321", "stranger")
        policy = '{"Statement": {"Effect": "Allow", "Action": "*", "Resource": "*"}}'
        accounts.put_user_policy(connection, "210987654321", "stranger", "all", policy)
        stranger = accounts.create_access_key(connection, "210987654321", "stranger")
    assert len(PAGED) >= 6
    for service, name in PAGED:
        shape = service_model(service).operation_model(name).input_shape
        params = dict.fromkeys(shape.required_members, "job-0")
        if name != "ListModelCustomizationJobs":
            refused = _refused(gateway, service, name, **params, nextToken=token)
            assert (name, refused.code) == (name, "ValidationException")
            assert "nextToken is invalid" in refused.message
        for wrong in (token[:-1], token + "A", "x", token.swapcase()):
            refused = _refused(gateway, service, name, **params, nextToken=wrong)
            assert "nextToken is invalid" in refused.message, (name, wrong)
    name = "ListModelCustomizationJobs"
    for changes in ({"nameContains": "j"}, {"sortOrder": "Ascending"}, {"statusEquals": "Failed"}):
        assert "nextToken is invalid" in refusal(gateway, name, nextToken=token, **changes).message
    with pytest.raises(Refused, match="nextToken is invalid"):
        gateway.call("bedrock", name, credentials=stranger, nextToken=token)
    assert gateway.call("bedrock", name, nextToken=token, maxResults=5), "its own list takes it"


def _refused(gateway: Gateway, service: str, name: str, **params: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        gateway.call(service, name, **params)
    return caught.value


# --- many at once ---------------------------------------------------------------------------------


def test_jobs_created_by_many_clients_at_once_are_neither_lost_nor_doubled(
    gateway: Gateway,
) -> None:
    """Each request is sent twice with its token, and some names are wanted by two clients."""
    chance = random.Random(22)
    operation = service_model("bedrock").operation_model("CreateModelCustomizationJob")
    wanted = [(f"job-{number % 40}", f"token-{number}") for number in range(48)]
    sent = [item for item in wanted for _ in range(2)]
    chance.shuffle(sent)
    requests = []
    for name, token in sent:
        params = {"jobName": name, "customModelName": f"{name}-model", **STARTED}
        requests.append(("bedrock", send(operation, {**params, "clientRequestToken": token})))
    replies = gateway.replies_at_once(requests, clients=16)
    by_token: dict[str, set[str]] = {}
    for (_, token), reply in zip(sent, replies, strict=True):
        assert reply.status in (201, 400), reply.body
        outcome = reply.body.decode() if reply.status == 201 else "in use"
        assert reply.status == 201 or b"job name is currently in use." in reply.body
        by_token.setdefault(token, set()).add(outcome)
    assert all(len(outcomes) == 1 for outcomes in by_token.values()), "a repeat is answered alike"
    made = {outcome for outcomes in by_token.values() for outcome in outcomes} - {"in use"}
    assert len(made) == 40, "of two clients that want a name one gets it"
    listed = gateway.call("bedrock", "ListModelCustomizationJobs", maxResults=1000)
    names = [item["jobName"] for item in listed["modelCustomizationJobSummaries"]]
    assert sorted(names) == sorted({name for name, _ in wanted})


@pytest.mark.parametrize(
    ("use", "user"),
    [
        ("CreateModelCustomizationJob", "model customization job"),
        ("CreateProvisionedModelThroughput", "provisioned throughput"),
    ],
)
def test_a_model_that_is_deleted_and_used_at_once_is_one_or_the_other(
    gateway: Gateway, use: str, user: str
) -> None:
    """In either order: the deletion is refused, or the use finds no model."""
    chance = random.Random(4)
    deleting = service_model("bedrock").operation_model("DeleteCustomModel")
    using = service_model("bedrock").operation_model(use)
    for number in range(8):
        model = publish(gateway, f"model-{number}")
        name = f"user-{number}"
        params: dict[str, Any] = (
            {"provisionedModelName": name, "modelId": model.arn, "modelUnits": 1}
            if "Throughput" in use
            else {
                **STARTED,
                "jobName": name,
                "customModelName": f"child-{number}",
                "baseModelIdentifier": model.name,
            }
        )
        pair = [
            ("bedrock", send(deleting, {"modelIdentifier": model.arn})),
            ("bedrock", send(using, params)),
        ]
        order = [0, 1] if chance.random() < 0.5 else [1, 0]
        replies = gateway.replies_at_once([pair[index] for index in order], clients=2)
        deleted, used = (replies[order.index(index)] for index in (0, 1))
        with gateway.engine.connect() as connection:
            is_there = models.get_model(connection, ACCOUNT, REGION, model.arn) is not None
        outcome = (deleted.status, used.status < 300, is_there)
        assert outcome in ((400, True, True), (200, False, False)), (deleted.body, used.body)
        assert used.status in (201, 400, 404)
        if is_there:
            assert f"in use by {user} {name}." in deleted.body.decode()


def test_two_deletions_at_once_delete_once(gateway: Gateway) -> None:
    publish(gateway, "model")
    operation = service_model("bedrock").operation_model("DeleteCustomModel")
    requests = [("bedrock", send(operation, {"modelIdentifier": "model"})) for _ in range(6)]
    replies = gateway.replies_at_once(requests, clients=6)
    assert sorted(reply.status for reply in replies) == [200] + [404] * 5


def test_every_user_of_a_model_is_named_when_it_is_to_be_deleted(gateway: Gateway) -> None:
    model = publish(gateway, "model")
    for number in range(7):
        create(gateway, f"job-{number}", baseModelIdentifier=model.arn)
    with transaction(gateway.engine) as connection:
        throughputs.create_throughput(connection, new_throughput("pt", model.arn), **QUOTAS)
    refused = refusal(gateway, "DeleteCustomModel", modelIdentifier="model")
    assert (refused.status, refused.code) == (400, "ConflictException")
    for user in ("model customization job job-0", "2 more", "provisioned throughput pt"):
        assert user in refused.message
    gateway.call("bedrock", "DeleteProvisionedModelThroughput", provisionedModelId="pt")
    for number in range(7):
        gateway.call("bedrock", "StopModelCustomizationJob", jobIdentifier=f"job-{number}")
    gateway.call("bedrock", "DeleteCustomModel", modelIdentifier="model")
    assert refusal(gateway, "GetCustomModel", modelIdentifier="model").status == 404


# --- the helper itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"jobArn": None}, "jobArn: it is missing"),
        ({"status": "Done"}, "'Done' is none of"),
        ({"jobName": "-"}, "does not match"),
        ({"jobName": "x" * 64}, "is above 63"),
        ({"creationTime": "now"}, "is no timestamp"),
        ({"statusDetails": {"trainingDetails": {"status": 1}}}, "trainingDetails.status: 1 is no"),
        ({"validationDataConfig": {"validators": [{}]}}, "validators.1.s3Uri: it is missing"),
        ({"nothing": 1}, "no such member"),
    ],
)
def test_an_answer_that_its_model_does_not_allow_is_found(
    gateway: Gateway, changes: dict[str, Any], says: str
) -> None:
    create(gateway, "job")
    answer = {**job(gateway, "job"), **changes}
    answer = {name: value for name, value in answer.items() if value is not None}
    operation = service_model("bedrock").operation_model("GetModelCustomizationJob")
    with pytest.raises(AssertionError, match=re.escape(says)):
        check_answer(operation, answer)
