"""The forms of the published examples are accepted as they stand, and defaults are filled in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.e2e.service import (
    ACCOUNT,
    COHERE,
    LLAMA,
    REGION,
    TITAN,
    Service,
    in_service,
    new_bucket,
    refusal,
    wait_for,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HAIKU = "anthropic.claude-3-haiku-20240307-v1:0"
NOVA = "amazon.nova-micro-v1:0"
# Bedrock's tables: model, parameter -> the least and the greatest value.
BOUNDS: dict[str, dict[str, tuple[str, str]]] = {
    TITAN: {
        "epochCount": ("1", "10"),
        "batchSize": ("1", "64"),
        "learningRate": ("0.0", "1"),
        "learningRateWarmupSteps": ("0", "250"),
    },
    "amazon.titan-text-lite-v1": {
        "epochCount": ("1", "10"),
        "batchSize": ("1", "64"),
        "learningRate": ("0.0", "1"),
        "learningRateWarmupSteps": ("0", "250"),
    },
    "cohere.command-text-v14:7:4k": {
        "epochCount": ("1", "100"),
        "batchSize": ("8", "8"),
        "learningRate": ("0.000005", "0.1"),
        "earlyStoppingThreshold": ("0", "0.1"),
        "earlyStoppingPatience": ("1", "10"),
        "evalPercentage": ("5", "50"),
    },
    COHERE: {
        "epochCount": ("1", "100"),
        "batchSize": ("8", "32"),
        "learningRate": ("5e-6", "0.1"),
        "earlyStoppingThreshold": ("0", "0.1"),
        "earlyStoppingPatience": ("1", "10"),
        "evalPercentage": ("5", "50"),
    },
    LLAMA: {"epochCount": ("1", "10"), "batchSize": ("1", "1"), "learningRate": ("5e-6", "0.1")},
    "meta.llama2-70b-v1": {
        "epochCount": ("1", "10"),
        "batchSize": ("1", "1"),
        "learningRate": ("5e-6", "0.1"),
    },
    "meta.llama3-1-8b-instruct-v1:0:128k": {
        "epochCount": ("1", "10"),
        "batchSize": ("1", "1"),
        "learningRate": ("5.0E-6", "0.1"),
    },
    f"{HAIKU}:200k": {
        "epochCount": ("1", "10"),
        "batchSize": ("4", "256"),
        "learningRateMultiplier": ("0.1", "2"),
        "earlyStoppingThreshold": ("0", "0.1"),
        "earlyStoppingPatience": ("1", "10"),
    },
    f"{NOVA}:128k": {
        "epochCount": ("1", "5"),
        "learningRate": ("1e-6", "1e-4"),
        "learningRateWarmupSteps": ("0", "100"),
    },
}
DEFAULTS: dict[str, dict[str, str]] = {
    TITAN: {
        "epochCount": "5",
        "batchSize": "1",
        "learningRate": "1.0E-5",
        "learningRateWarmupSteps": "5",
    },
    COHERE: {
        "epochCount": "1",
        "batchSize": "8",
        "learningRate": "1.0E-5",
        "earlyStoppingThreshold": "0.01",
        "earlyStoppingPatience": "6",
        "evalPercentage": "20.0",
    },
    LLAMA: {"epochCount": "5", "batchSize": "1", "learningRate": "1.0E-4"},
    HAIKU: {
        "epochCount": "2",
        "batchSize": "32",
        "learningRateMultiplier": "1.0",
        "earlyStoppingThreshold": "0.001",
        "earlyStoppingPatience": "2",
    },
    NOVA: {"epochCount": "2", "learningRate": "1.0E-5", "learningRateWarmupSteps": "10"},
}


@pytest.fixture(scope="module")
def place(service: Service) -> str:
    """One bucket for all of them."""
    return new_bucket(service, "published-forms")


@pytest.fixture
def accept(service: Service, place: str, name: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Creates a job, stops it before it begins, and returns it as it was created."""
    with service.paused("outcrop worker"):

        def create(**changes: Any) -> dict[str, Any]:
            arn = service.create_job(place, name, **changes)
            created = service.job(arn)
            service.client("bedrock").stop_model_customization_job(jobIdentifier=arn)
            assert service.job(arn)["status"] == "Stopped", "a queued job stops at once"
            return created

        yield create


@pytest.mark.parametrize("end", [0, 1], ids=["least", "greatest"])
@pytest.mark.parametrize("model", BOUNDS)
def test_both_ends_of_every_published_range_are_accepted(
    accept: Callable[..., dict[str, Any]], model: str, end: int
) -> None:
    sent = {parameter: ends[end] for parameter, ends in BOUNDS[model].items()}
    job = accept(baseModelIdentifier=model, hyperParameters=sent)
    assert job["hyperParameters"] == sent


@pytest.mark.parametrize("model", DEFAULTS)
def test_hyperparameters_that_are_left_out_get_the_published_defaults(
    accept: Callable[..., dict[str, Any]], model: str
) -> None:
    job = accept(baseModelIdentifier=model, hyperParameters=None)
    assert job["hyperParameters"] == DEFAULTS[model]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"customizationType": None}, id="type left out"),
        pytest.param({"validationDataConfig": None}, id="no validation data"),
        pytest.param(
            {"baseModelIdentifier": f"arn:aws:bedrock:{REGION}::foundation-model/{COHERE}"},
            id="base by ARN",
        ),
        pytest.param(
            {
                "baseModelIdentifier": TITAN,
                "hyperParameters": {
                    "epochCount": "3",
                    "batchSize": "1",
                    "learningRate": "0.00001",
                },
            },
            id="Titan, three epochs",
        ),
    ],
)
def test_forms_of_the_examples_are_accepted(
    accept: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    job = accept(**changes)
    assert job["status"] == "InProgress"
    assert job["customizationType"] == "FINE_TUNING"
    if changes.get("validationDataConfig", True) is None:
        assert job["validationDataConfig"] == {"validators": []}


def test_a_plain_base_id_becomes_the_id_with_context_in_arns(
    accept: Callable[..., dict[str, Any]],
) -> None:
    job = accept(baseModelIdentifier=TITAN, hyperParameters=None)
    prefix = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-customization-job/{TITAN}:0:8k/"
    assert job["jobArn"].startswith(prefix)
    assert job["baseModelArn"] == f"arn:aws:bedrock:{REGION}::foundation-model/{TITAN}:0:8k"


def test_a_base_model_can_be_given_throughput(
    service: Service, name: str, drop_throughput: Callable[[str], None]
) -> None:
    arn = in_service(service, name, f"{TITAN}:0:8k")
    drop_throughput(arn)
    body = {"inputText": "Hello", "textGenerationConfig": {"maxTokenCount": 3, "temperature": 0}}
    answer = service.client("bedrock-runtime").invoke_model(modelId=arn, body=json.dumps(body))
    assert json.loads(answer["body"].read())["results"][0]["tokenCount"] <= 3


def test_a_throughput_that_is_creating_is_not_ready_and_clients_try_again(
    service: Service, name: str, drop_throughput: Callable[[str], None]
) -> None:
    body = json.dumps({"inputText": "Hello", "textGenerationConfig": {"maxTokenCount": 2}})
    with service.paused("serve"):  # nobody brings the throughput into service meanwhile
        arn = service.client("bedrock").create_provisioned_model_throughput(
            provisionedModelName=name, modelId=f"{TITAN}:0:8k", modelUnits=1
        )["provisionedModelArn"]
        drop_throughput(arn)
        once = service.client("bedrock-runtime", attempts=1)
        error = refusal(lambda: once.invoke_model(modelId=arn, body=body))
        assert (error.code, error.status) == ("ModelNotReadyException", 429)
        assert name in error.message
        assert "Creating" in error.message

    def answered() -> Any:
        patient = service.client("bedrock-runtime", attempts=10)
        return patient.invoke_model(modelId=arn, body=body)

    answer = wait_for(answered, 90.0, "an answer")
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 200


def test_modelled_operations_that_are_not_built_answer_501_with_their_name(
    service: Service,
) -> None:
    error = refusal(lambda: service.client("bedrock", attempts=1).list_guardrails())
    assert error.status == 501
    assert "ListGuardrails" in error.message
