"""Continued pre-training, then fine-tuning from its model; full fine-tuning; both served."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e.conftest import Tuned
from tests.e2e.service import (
    REGION,
    TITAN,
    Service,
    ask_base,
    in_service,
    job_request,
    refusal,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

CPT = "CONTINUED_PRE_TRAINING"
PROMPT = "Which code has part 3?"
ROOT = f"arn:aws:bedrock:{REGION}::foundation-model/{TITAN}:0:8k"
HYPER = {"epochCount": "2", "batchSize": "8", "learningRate": "0.00001"}


def documents(count: int) -> bytes:
    """Return raw text about what the fine-tuning records ask for."""
    lines = (
        " ".join(
            f"Which code has part {n}? code {n * 7 % 100:02}." for n in range(first, first + 4)
        )
        for first in range(count)
    )
    return b"".join(json.dumps({"input": line}).encode() + b"\n" for line in lines)


def invoke(service: Service, model: str) -> str:
    body = {
        "inputText": PROMPT,
        "textGenerationConfig": {"maxTokenCount": 12, "temperature": 0},
    }
    answer = service.client("bedrock-runtime", attempts=8).invoke_model(
        modelId=model, body=json.dumps(body)
    )
    return str(json.loads(answer["body"].read())["results"][0]["outputText"])


def test_a_model_fine_tuned_from_a_pre_trained_one_outlives_it(
    service: Service,
    tuned: Tuned,
    bucket: str,
    name: str,
    drop_throughput: Callable[[str], None],
) -> None:
    bedrock, s3 = service.client("bedrock"), service.client("s3")
    s3.put_object(Bucket=bucket, Key="documents.jsonl", Body=documents(8))
    first = service.create_job(
        bucket,
        f"{name}-cpt",
        customizationType=CPT,
        baseModelIdentifier=TITAN,
        trainingDataConfig={"s3Uri": f"s3://{bucket}/documents.jsonl"},
        validationDataConfig=None,
        hyperParameters={**HYPER, "batchSize": "4"},
    )
    pre_trained = service.wait_for_job(first)
    assert pre_trained["status"] == "Completed", pre_trained.get("failureMessage")
    assert (pre_trained["customizationType"], pre_trained["baseModelArn"]) == (CPT, ROOT)
    parent = bedrock.get_custom_model(modelIdentifier=f"{name}-cpt-model")
    assert parent["customizationType"] == CPT

    with service.paused("outcrop worker"):
        second = service.create_job(
            *(bucket, f"{name}-ft"),
            baseModelIdentifier=f"{name}-cpt-model",
            hyperParameters={**HYPER, "adapterRank": "24"},
        )
        error = refusal(lambda: bedrock.delete_custom_model(modelIdentifier=parent["modelArn"]))
        assert error.code == "ConflictException", "the job that waits needs it"
        assert f"{name}-ft" in error.message
    job = service.wait_for_job(second)
    assert job["status"] == "Completed", job.get("failureMessage")
    assert job["baseModelArn"] == parent["modelArn"]
    bedrock.delete_custom_model(modelIdentifier=parent["modelArn"])
    assert job["hyperParameters"]["adapterRank"] == "24"
    begin = service.progress(second)["baseValidationLoss"]
    assert begin < service.progress(tuned.arn)["baseValidationLoss"], "it begins as its parent"
    assert job["validationMetrics"][0]["validationLoss"] < begin

    for filters in (
        {"baseModelArnEquals": parent["modelArn"]},
        {"foundationModelArnEquals": ROOT, "nameContains": name},
    ):
        (listed,) = bedrock.list_custom_models(**filters)["modelSummaries"]
        assert listed["modelArn"] == job["outputModelArn"]
    drop_throughput(name)
    throughput = in_service(service, name, job["outputModelArn"])
    assert invoke(service, throughput) != invoke(service, TITAN)


def test_a_model_whose_weights_were_all_trained_is_served_beside_the_base(
    service: Service, tuned: Tuned, bucket: str, name: str, drop_throughput: Callable[[str], None]
) -> None:
    request: dict[str, Any] = job_request(
        bucket,
        name,
        baseModelIdentifier=TITAN,
        hyperParameters={
            "epochCount": "1",
            "batchSize": "8",
            "learningRate": "0.0003",
            "method": "full",
        },
    )
    arn = service.client("bedrock").create_model_customization_job(**request)["jobArn"]
    job = service.wait_for_job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    assert job["hyperParameters"]["method"] == "full"
    begin = service.progress(arn)["baseValidationLoss"]
    assert begin == pytest.approx(service.progress(tuned.arn)["baseValidationLoss"], rel=1e-3)
    assert job["validationMetrics"][0]["validationLoss"] < 0.7 * begin
    folder = service.data_dir / "models" / "custom" / job["outputModelArn"].rpartition("/")[2]
    names = {file.name for file in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names

    drop_throughput(name)
    throughput = in_service(service, name, job["outputModelArn"])
    answer = invoke(service, throughput)
    assert answer != invoke(service, TITAN)
    assert invoke(service, throughput) == answer
    assert ask_base(service) == tuned.base_answer, "the base is not touched"
