"""Deployments, inference profiles and throughputs that change their model, asked by boto3."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError
from tests.unit.api.runtime_gateway import (
    ANSWER,
    SECONDS,
    WEIGHTS,
    Gateway,
    running_gateway,
    wait_until,
)
from tests.unit.store.build import ACCOUNT, REGION, new_model

import outcrop.api.usage
from outcrop.identity import api_keys
from outcrop.ids import foundation_model_arn
from outcrop.store import models, readiness
from outcrop.store.database import transaction
from outcrop.store.rows import NewCustomModel, TokenUsage
from outcrop.store.usage import list_usage

LITE = "amazon.titan-text-lite-v1"
LITE_ARN = foundation_model_arn(REGION, LITE)
BODY = json.dumps({"inputText": "Hi"})
TURNS = [{"role": "user", "content": [{"text": "Hi"}]}]
TEXT = "Héllo you"

Ask = Callable[[Gateway, str], Any]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("endpoints") / "data"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outcrop.api.usage, "FLUSH_SECONDS", 0.02)
        with running_gateway(folder, max_provisioned_models=9, machine_model_units=9) as place:
            yield place


@pytest.fixture(autouse=True)
def _scripted(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER)


@pytest.fixture(scope="module")
def bedrock(gateway: Gateway) -> Any:
    return gateway.client(service="bedrock")


@pytest.fixture(scope="module")
def custom(gateway: Gateway) -> list[NewCustomModel]:
    """Two custom models of Titan Text Lite."""
    found = [new_model(name, spec={"weights": WEIGHTS}) for name in ("first", "second")]
    with transaction(gateway.engine) as connection:
        for each in found:
            models.insert_model(connection, each)
    return found


def deploy(bedrock: Any, name: str, model: NewCustomModel, **members: Any) -> str:
    made = bedrock.create_custom_model_deployment(
        modelDeploymentName=name, modelArn=model.arn, **members
    )
    assert made["ResponseMetadata"]["HTTPStatusCode"] == 202
    return str(made["customModelDeploymentArn"])


def profile(bedrock: Any, name: str = "team a", **members: Any) -> str:
    made = bedrock.create_inference_profile(
        inferenceProfileName=name, modelSource={"copyFrom": LITE_ARN}, **members
    )
    assert (made["ResponseMetadata"]["HTTPStatusCode"], made["status"]) == (201, "ACTIVE")
    return str(made["inferenceProfileArn"])


def served(gateway: Gateway) -> None:
    """What the supervisor says when the model server is up."""
    with transaction(gateway.engine) as connection:
        readiness.weights_are_served(connection, WEIGHTS)


def artifact(gateway: Gateway, model: NewCustomModel) -> str:
    return str(gateway.settings.data_dir / model.artifact_path)


# --- every form of an id, every way of asking ----------------------------------------------------


def invoke(gateway: Gateway, model: str) -> str:
    answer = gateway.client().invoke_model(modelId=model, body=BODY)
    return str(json.loads(answer["body"].read())["results"][0]["outputText"])


def invoke_streamed(gateway: Gateway, model: str) -> str:
    answer = gateway.client().invoke_model_with_response_stream(modelId=model, body=BODY)
    with closing(answer["body"]) as events:
        return "".join(json.loads(event["chunk"]["bytes"])["outputText"] for event in events)


def converse(gateway: Gateway, model: str) -> str:
    answer = gateway.client().converse(modelId=model, messages=TURNS)
    return str(answer["output"]["message"]["content"][0]["text"])


def converse_streamed(gateway: Gateway, model: str) -> str:
    answer = gateway.client().converse_stream(modelId=model, messages=TURNS)
    with closing(answer["stream"]) as events:
        deltas = [each["contentBlockDelta"] for each in events if "contentBlockDelta" in each]
    return "".join(each["delta"]["text"] for each in deltas)


def through_the_openai_door(gateway: Gateway, model: str) -> str:
    headers = {"authorization": f"Bearer {api_keys.load_or_make_api_key(gateway.settings).key}"}
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    with httpx.Client(trust_env=False, timeout=SECONDS, headers=headers) as http:
        listed = {each["id"] for each in http.get(f"{gateway.url}/v1/models").json()["data"]}
        assert not model.startswith("arn:") or model in listed
        found = http.post(f"{gateway.url}/v1/chat/completions", json=body).json()
    return str(found["choices"][0]["message"]["content"])


WAYS = [invoke, invoke_streamed, converse, converse_streamed, through_the_openai_door]


@pytest.mark.parametrize("ask", WAYS)
def test_a_deployment_answers_by_arn_and_name_in_every_way(
    gateway: Gateway, bedrock: Any, custom: list[NewCustomModel], ask: Ask
) -> None:
    name = f"by-{ask.__name__}"
    arn = deploy(bedrock, name, custom[0])
    served(gateway)
    for identifier in (arn, name):
        assert ask(gateway, identifier) == TEXT
        assert gateway.model.requests[-1].adapter == artifact(gateway, custom[0])
        assert gateway.model.requests[-1].owner.model == custom[0].arn


@pytest.mark.parametrize("ask", WAYS)
def test_an_inference_profile_answers_by_arn_and_id_in_every_way(
    gateway: Gateway, bedrock: Any, ask: Ask
) -> None:
    arn = profile(bedrock)
    for identifier in (arn, arn.rpartition("/")[2]):
        assert ask(gateway, identifier) == TEXT
        assert gateway.model.requests[-1].adapter is None
        assert gateway.model.requests[-1].owner.model == LITE_ARN


def test_tokens_are_counted_by_either(
    gateway: Gateway, bedrock: Any, custom: list[NewCustomModel]
) -> None:
    for arn in (deploy(bedrock, "counted", custom[0]), profile(bedrock)):
        found = gateway.client().count_tokens(modelId=arn, input={"converse": {"messages": TURNS}})
        assert found["inputTokens"] == 7


def test_usage_tells_deployment_and_profile_apart_and_keeps_the_models_arn(
    gateway: Gateway, bedrock: Any, custom: list[NewCustomModel]
) -> None:
    deployment, team = deploy(bedrock, "metered", custom[1]), profile(bedrock)
    for identifier in (deployment, team, custom[1].arn):
        invoke(gateway, identifier)
    found = usage(gateway, {deployment, team})
    once = TokenUsage(1, 7, 4)
    assert found == {(custom[1].arn, deployment): once, (LITE_ARN, team): once}


def usage(gateway: Gateway, endpoints: set[str]) -> dict[tuple[str, str], TokenUsage]:
    """Return what these were counted, by model and endpoint, once the gateway has written it."""
    now = datetime.now(UTC)
    found: dict[tuple[str, str], TokenUsage] = {}

    def written() -> bool:
        with gateway.engine.connect() as connection:
            rows = list_usage(
                *(connection, ACCOUNT, REGION),
                since=now - timedelta(hours=2),
                until=now + timedelta(hours=1),
            )
        found.update(
            {
                (key.model_arn, key.endpoint_arn): value
                for key, value in rows.items()
                if key.endpoint_arn in endpoints
            }
        )
        return len(found) == len(endpoints)

    wait_until(written)
    return found


# --- a deployment's life -------------------------------------------------------------------------


def test_a_deployments_name_is_one_member_of_get_and_another_of_list(
    bedrock: Any, gateway: Gateway, custom: list[NewCustomModel]
) -> None:
    arn = deploy(bedrock, "quirks", custom[0], description="A try.")
    found = bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=arn)
    assert found["modelDeploymentName"] == "quirks"
    assert "customModelDeploymentName" not in found
    assert (found["status"], found["description"]) == ("Creating", "A try.")
    assert (found["customModelDeploymentArn"], found["modelArn"]) == (arn, custom[0].arn)
    assert "updateDetails" not in found
    assert "failureMessage" not in found
    (item,) = bedrock.list_custom_model_deployments(nameContains="quirks")[
        "modelDeploymentSummaries"
    ]
    assert item["customModelDeploymentName"] == "quirks"
    assert "modelDeploymentName" not in item
    assert (item["status"], item["customModelDeploymentArn"]) == ("Creating", arn)
    served(gateway)
    bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier="quirks")
    with pytest.raises(bedrock.exceptions.ResourceNotFoundException):
        bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=arn)
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        invoke(gateway, arn)


def test_a_deployment_answers_while_it_is_created_and_once_it_failed_says_why(
    bedrock: Any, gateway: Gateway, custom: list[NewCustomModel]
) -> None:
    arn = deploy(bedrock, "hasty", custom[0])
    assert invoke(gateway, arn) == TEXT
    with pytest.raises(bedrock.exceptions.ValidationException, match="is in a mutating state"):
        bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier=arn)
    with transaction(gateway.engine) as connection:
        readiness.weights_failed(connection, WEIGHTS, "No memory.")
    found = bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=arn)
    assert (found["status"], found["failureMessage"]) == ("Failed", "No memory.")
    with pytest.raises(ClientError, match=r"hasty has failed: No memory\. Delete it"):
        invoke(gateway, arn)
    bedrock.delete_custom_model_deployment(customModelDeploymentIdentifier=arn)


# --- moving to another model ---------------------------------------------------------------------


def test_no_request_is_dropped_while_a_deployment_moves(
    bedrock: Any, gateway: Gateway, custom: list[NewCustomModel]
) -> None:
    arn = deploy(bedrock, "moving", custom[0])
    served(gateway)

    def move() -> None:
        done = bedrock.update_custom_model_deployment(
            customModelDeploymentIdentifier="moving", modelArn=custom[1].arn
        )
        assert done["ResponseMetadata"]["HTTPStatusCode"] == 202
        assert done["customModelDeploymentArn"] == arn

    def details() -> tuple[str, str, str]:
        found = bedrock.get_custom_model_deployment(customModelDeploymentIdentifier=arn)
        told = found["updateDetails"]
        return found["status"], told["updateStatus"], told["modelArn"]

    moves_without_a_loss(gateway, arn, custom, move)
    assert details() == ("Active", "UpdateCompleted", custom[1].arn)
    bedrock.update_custom_model_deployment(
        customModelDeploymentIdentifier=arn, modelArn=custom[0].arn
    )
    assert details() == ("Active", "Updating", custom[0].arn)
    served(gateway)


def test_no_request_is_dropped_while_a_throughput_moves(
    bedrock: Any, gateway: Gateway, custom: list[NewCustomModel]
) -> None:
    arn = bedrock.create_provisioned_model_throughput(
        provisionedModelName="moving", modelId=custom[0].arn, modelUnits=1
    )["provisionedModelArn"]
    served(gateway)

    def move() -> None:
        bedrock.update_provisioned_model_throughput(
            provisionedModelId="moving", desiredModelId="second"
        )

    moves_without_a_loss(gateway, arn, custom, move)
    found = bedrock.get_provisioned_model_throughput(provisionedModelId=arn)
    assert (found["status"], found["modelArn"]) == ("InService", custom[1].arn)
    assert {request.owner.reservation for request in gateway.model.requests} == {
        arn.rpartition("/")[2]
    }, "what it reserved stays its own"


def moves_without_a_loss(
    gateway: Gateway, arn: str, custom: list[NewCustomModel], move: Callable[[], None]
) -> None:
    """Ask before, during and after a move, and read a stream that runs through all of it."""
    old, new = (artifact(gateway, each) for each in custom)
    answer = gateway.client().invoke_model_with_response_stream(modelId=arn, body=BODY)
    with closing(answer["body"]) as events:
        chunks = (json.loads(event["chunk"]["bytes"])["outputText"] for event in events)
        text = next(chunks)
        move()
        assert invoke(gateway, arn) == TEXT
        served(gateway)
        assert invoke(gateway, arn) == TEXT
        text += "".join(chunks)
    assert text == TEXT
    assert [request.adapter for request in gateway.model.requests] == [old, old, new]
