"""The published Bedrock program, point by point, against the real service."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.e2e.conftest import QUESTIONS, Trained, text_of
from tests.e2e.service import (
    ROLE,
    Service,
    invoke,
    job_request,
    titan,
    until,
    wait_for_job,
    wait_in_service,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.xdist_group("service"),
    pytest.mark.timeout(300),
]
EXAMPLES = Path(__file__).parents[2] / "examples"
TITAN = "amazon.titan-text-express-v1"
COHERE = "cohere.command-light-text-v14"
LLAMA = "meta.llama2-13b-v1"


def test_files_go_to_s3_and_come_back(s3: Any, tmp_path: Path) -> None:
    s3.create_bucket(Bucket="round-trip")
    small = b'{"prompt": "a", "completion": "b"}\n'
    s3.put_object(Bucket="round-trip", Key="data/small.jsonl", Body=small)
    upload = s3.create_multipart_upload(Bucket="round-trip", Key="data/large.jsonl")["UploadId"]
    parts = [b"x" * 5 * 2**20, b"the end"]
    done = []
    for number, part in enumerate(parts, start=1):
        answer = s3.upload_part(
            Bucket="round-trip",
            Key="data/large.jsonl",
            UploadId=upload,
            PartNumber=number,
            Body=part,
        )
        done.append({"PartNumber": number, "ETag": answer["ETag"]})
    s3.complete_multipart_upload(
        Bucket="round-trip",
        Key="data/large.jsonl",
        UploadId=upload,
        MultipartUpload={"Parts": done},
    )

    listed = s3.list_objects_v2(Bucket="round-trip", Prefix="data/")["Contents"]
    assert [(item["Key"], item["Size"]) for item in listed] == [
        ("data/large.jsonl", 5 * 2**20 + 7),
        ("data/small.jsonl", len(small)),
    ]
    body = s3.get_object(Bucket="round-trip", Key="data/large.jsonl")["Body"].read()
    assert body == b"".join(parts)


def test_a_presigned_url_needs_no_credentials(s3: Any, bucket: str) -> None:
    url = s3.generate_presigned_url(
        "get_object", Params={"Bucket": bucket, "Key": "train.jsonl"}, ExpiresIn=60
    )
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == s3.get_object(Bucket=bucket, Key="train.jsonl")["Body"].read()


def test_fine_tunable_models_are_listed_under_their_real_names(bedrock: Any) -> None:
    answer = bedrock.list_foundation_models(byCustomizationType="FINE_TUNING")
    listed = {model["modelId"]: model for model in answer["modelSummaries"]}
    assert {TITAN, COHERE, f"{COHERE}:7:4k", LLAMA} <= set(listed)
    for model in listed.values():
        assert "FINE_TUNING" in model["customizationsSupported"]
        assert model["modelName"] == "SmolLM2-135M (Q4_1)"
        assert "Titan" not in model["modelName"]


def test_a_job_is_in_progress_without_results_until_it_completes(trained: Trained) -> None:
    first, job = trained.first_seen, trained.job
    assert first["status"] == "InProgress"
    assert {"outputModelArn", "trainingMetrics", "endTime", "failureMessage"} & set(first) == set()
    assert first["customizationType"] == "FINE_TUNING"
    assert first["hyperParameters"]["learningRate"] == "0.00001"
    assert job["status"] == "Completed"
    assert {detail["status"] for detail in job["statusDetails"].values()} == {"Completed"}
    assert job["trainingMetrics"]["trainingLoss"] > 0
    assert job["validationMetrics"][0]["validationLoss"] > 0
    assert job["endTime"] >= job["creationTime"]


def test_effective_hyperparameters_are_the_given_ones_and_the_defaults(trained: Trained) -> None:
    effective = trained.job["hyperParameters"]
    given = {"epochCount": "3", "batchSize": "8", "learningRate": "0.00001"}
    assert given.items() <= effective.items()
    assert effective["learningRateWarmupSteps"] == "5"


def test_a_job_is_found_by_arn_and_by_name(bedrock: Any, trained: Trained) -> None:
    by_name = bedrock.get_model_customization_job(jobIdentifier="shared-job")
    assert by_name["jobArn"] == trained.job["jobArn"]
    listed = bedrock.list_model_customization_jobs(nameContains="shared-job")
    assert [item["jobArn"] for item in listed["modelCustomizationJobSummaries"]] == [
        trained.job["jobArn"]
    ]


def read_rows(s3: Any, bucket: str, key: str) -> list[dict[str, str]]:
    text = s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode("utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def test_metrics_lie_where_programs_read_them(s3: Any, bucket: str, trained: Trained) -> None:
    job_id = trained.job["jobArn"].rsplit("/", 1)[1]
    folder = f"output/model-customization-job-{job_id}"
    steps = read_rows(s3, bucket, f"{folder}/training_artifacts/step_wise_training_metrics.csv")
    assert list(steps[0]) == ["step_number", "epoch_number", "training_loss", "perplexity"]
    assert [int(row["step_number"]) for row in steps] == list(range(6))
    places = [
        "post_fine_tuning_validation/validation/validation_metrics.csv",
        "validation_metrics.csv",
    ]
    validations = [read_rows(s3, bucket, f"{folder}/validation_artifacts/{p}") for p in places]
    assert validations[0] == validations[1]
    first, last = validations[0][0], validations[0][-1]
    assert list(first) == ["step_number", "epoch_number", "validation_loss", "perplexity"]
    assert int(first["step_number"]) == 0
    assert float(last["validation_loss"]) < float(first["validation_loss"])
    assert float(last["validation_loss"]) == pytest.approx(
        trained.job["validationMetrics"][0]["validationLoss"]
    )


def test_the_progress_of_a_job_can_be_asked(service: Service, trained: Trained) -> None:
    outcrop = service.client("outcrop")
    progress = outcrop.get_job_progress(jobIdentifier=trained.job["jobArn"])
    assert (progress["step"], progress["totalSteps"]) == (6, 6)
    assert progress["validationLoss"] < progress["baseValidationLoss"]
    events = outcrop.list_job_events(jobIdentifier="shared-job")["events"]
    assert events
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


def test_the_cohere_job_of_the_published_example_completes(
    bedrock: Any, bucket: str, trained: Trained
) -> None:
    # `trained` first: two jobs at once would only wait for one another.
    bedrock.create_model_customization_job(**job_request("cohere-job", bucket))
    job = wait_for_job(bedrock, "cohere-job")
    assert job["status"] == "Completed", job.get("failureMessage")
    assert "/cohere.command-light-text-v14:7:4k/" in job["jobArn"]
    assert "/cohere.command-light-text-v14:7:4k/" in job["outputModelArn"]


def test_a_custom_model_knows_where_it_comes_from(bedrock: Any, trained: Trained) -> None:
    model = bedrock.get_custom_model(modelIdentifier=trained.model_arn)
    assert model["modelName"] == "shared-job-model"
    assert model["modelStatus"] == "Active"
    assert model["jobArn"] == trained.job["jobArn"]
    assert model["hyperParameters"] == trained.job["hyperParameters"]
    assert model["trainingMetrics"] == trained.job["trainingMetrics"]
    listed = bedrock.list_custom_models(nameContains="shared-job")["modelSummaries"]
    assert [item["modelArn"] for item in listed] == [trained.model_arn]


def test_provisioned_throughput_comes_into_service(bedrock: Any, throughput: str) -> None:
    found = bedrock.get_provisioned_model_throughput(provisionedModelId="shared-throughput")
    assert found["provisionedModelArn"] == throughput
    assert found["status"] == "InService"
    assert (found["modelUnits"], found["desiredModelUnits"]) == (1, 1)
    assert "commitmentDuration" not in found


def test_the_custom_model_answers_and_is_not_the_base(
    runtime: Any, trained: Trained, throughput: str
) -> None:
    custom = [text_of(runtime, throughput, question) for question in QUESTIONS]
    assert all(custom)
    assert custom != trained.base_answers


def test_titan_bodies_are_answered_in_titans_format(runtime: Any) -> None:
    body, headers = invoke(runtime, TITAN, titan("Name a colour.", maxTokenCount=5))
    (result,) = body["results"]
    assert result["tokenCount"] <= 5
    assert result["completionReason"] in ("FINISH", "LENGTH")
    assert headers["x-amzn-bedrock-input-token-count"] == str(body["inputTextTokenCount"])
    assert headers["x-amzn-bedrock-output-token-count"] == str(result["tokenCount"])
    assert int(headers["x-amzn-bedrock-invocation-latency"]) >= 0


def test_cohere_bodies_are_answered_in_coheres_format(runtime: Any) -> None:
    request = {"prompt": "Name a colour.", "max_tokens": 5, "temperature": 0}
    body, headers = invoke(runtime, COHERE, request)
    (generation,) = body["generations"]
    assert generation["finish_reason"] in ("COMPLETE", "MAX_TOKENS")
    assert isinstance(generation["text"], str)
    assert int(headers["x-amzn-bedrock-output-token-count"]) <= 5


def test_llama_bodies_are_answered_in_llamas_format(runtime: Any) -> None:
    request = {"prompt": "[INST] Name a colour. [/INST]", "max_gen_len": 5, "temperature": 0}
    body, headers = invoke(runtime, LLAMA, request)
    assert body["stop_reason"] in ("stop", "length")
    assert body["generation_token_count"] <= 5
    assert headers["x-amzn-bedrock-input-token-count"] == str(body["prompt_token_count"])


def test_one_prompt_is_the_same_for_every_family(runtime: Any) -> None:
    texts = [
        text_of(runtime, TITAN, "Name a colour."),
        invoke(runtime, COHERE, {"prompt": "Name a colour.", "max_tokens": 16, "temperature": 0})[
            0
        ]["generations"][0]["text"],
        invoke(
            runtime,
            LLAMA,
            {"prompt": "[INST] Name a colour. [/INST]", "max_gen_len": 16, "temperature": 0},
        )[0]["generation"],
    ]
    assert len({text.strip() for text in texts}) == 1


def test_temperature_zero_is_repeatable(runtime: Any) -> None:
    answers = {text_of(runtime, TITAN, "Tell me about rocks.") for _ in range(3)}
    assert len(answers) == 1


def test_a_high_temperature_draws(runtime: Any) -> None:
    body = titan("Tell me about rocks.", temperature=1, topP=1)
    answers = {invoke(runtime, TITAN, body)[0]["results"][0]["outputText"] for _ in range(4)}
    assert len(answers) > 1


def test_a_stop_sequence_ends_the_answer(runtime: Any) -> None:
    whole = text_of(runtime, TITAN, "Count from one to ten.")
    word = whole.split()[2]
    body, _ = invoke(runtime, TITAN, titan("Count from one to ten.", stopSequences=[word]))
    (result,) = body["results"]
    assert result["completionReason"] == "STOP_CRITERIA_MET"
    assert whole.startswith(result["outputText"])
    assert len(result["outputText"]) < len(whole)


@pytest.mark.parametrize("model_id", [f"{COHERE}:7:4k", "amazon.titan-text-lite-v1:0:4k"])
def test_a_context_suffixed_id_can_be_invoked(runtime: Any, model_id: str) -> None:
    cohere = model_id.startswith("cohere")
    request = {"prompt": "Name a colour.", "max_tokens": 2} if cohere else titan("Name a colour.")
    body, _ = invoke(runtime, model_id, request)
    assert set(body) & {"generations", "results"}


def test_tokens_are_counted_as_they_are_charged(runtime: Any) -> None:
    body = titan("How many tokens are in this?")
    counted = runtime.count_tokens(
        modelId=TITAN, input={"invokeModel": {"body": json.dumps(body).encode()}}
    )["inputTokens"]
    answered, _ = invoke(runtime, TITAN, body)
    assert answered["inputTextTokenCount"] == counted


def test_the_caller_has_an_identity(service: Service) -> None:
    identity = service.client("sts").get_caller_identity()
    assert identity["Account"] == "123456789012"
    assert identity["Arn"].startswith("arn:aws:iam::123456789012:")


def test_a_custom_model_is_found_by_an_arn_with_its_name(bedrock: Any, trained: Trained) -> None:
    named = "arn:aws:bedrock:us-east-1:123456789012:custom-model/shared-job-model"
    model = bedrock.get_custom_model(modelIdentifier=named)
    assert model["modelArn"] == trained.model_arn
    created = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName="by-name", modelId=named
    )["provisionedModelArn"]
    try:
        found = bedrock.get_provisioned_model_throughput(provisionedModelId=created)
        assert found["modelArn"] == trained.model_arn
    finally:
        bedrock.delete_provisioned_model_throughput(provisionedModelId=created)


def test_what_is_deleted_is_gone_and_the_base_is_as_before(
    bedrock: Any, runtime: Any, bucket: str, trained: Trained
) -> None:
    bedrock.create_model_customization_job(**job_request("short-lived", bucket))
    job = wait_for_job(bedrock, "short-lived")
    model_arn = job["outputModelArn"]
    throughput = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName="short-lived", modelId=model_arn
    )["provisionedModelArn"]
    wait_in_service(bedrock, throughput)
    with pytest.raises(ClientError, match="short-lived") as refused:
        bedrock.delete_custom_model(modelIdentifier=model_arn)
    assert refused.value.response["Error"]["Code"] == "ConflictException"

    bedrock.delete_provisioned_model_throughput(provisionedModelId=throughput)
    bedrock.delete_custom_model(
        modelIdentifier="arn:aws:bedrock:us-east-1:123456789012:custom-model/short-lived-model"
    )

    for gone in (
        lambda: bedrock.get_custom_model(modelIdentifier=model_arn),
        lambda: bedrock.get_provisioned_model_throughput(provisionedModelId=throughput),
        lambda: runtime.invoke_model(modelId=throughput, body=json.dumps(titan("Hi"))),
    ):
        with pytest.raises(ClientError) as missing:
            gone()
        assert missing.value.response["Error"]["Code"] == "ResourceNotFoundException"
    again = [text_of(runtime, TITAN, question) for question in QUESTIONS]
    assert again == trained.base_answers
    still = bedrock.get_model_customization_job(jobIdentifier="short-lived")
    assert still["status"] == "Completed"


def test_a_running_job_stops_within_five_seconds(
    bedrock: Any, bucket: str, trained: Trained, service: Service
) -> None:
    outcrop = service.client("outcrop")
    request = job_request(
        "stopped-job", bucket, hyperParameters={"epochCount": "100", "batchSize": "8"}
    )
    arn = bedrock.create_model_customization_job(**request)["jobArn"]
    until(lambda: outcrop.get_job_progress(jobIdentifier=arn).get("step"), 120, "the first step")
    bedrock.stop_model_customization_job(jobIdentifier=arn)
    seen = bedrock.get_model_customization_job(jobIdentifier=arn)["status"]
    job = wait_for_job(bedrock, arn, seconds=6)
    assert seen in ("Stopping", "Stopped")
    assert job["status"] == "Stopped"
    assert "outputModelArn" not in job


ACCEPTED: dict[str, tuple[str, dict[str, str]]] = {
    "titan-most": (
        TITAN,
        {
            "epochCount": "10",
            "batchSize": "64",
            "learningRate": "1",
            "learningRateWarmupSteps": "250",
        },
    ),
    "titan-least": (
        "amazon.titan-text-lite-v1:0:4k",
        {
            "epochCount": "1",
            "batchSize": "1",
            "learningRate": "0.0",
            "learningRateWarmupSteps": "0",
        },
    ),
    "cohere-most": (
        f"{COHERE}:7:4k",
        {
            "epochCount": "100",
            "batchSize": "32",
            "learningRate": "0.1",
            "earlyStoppingThreshold": "0.1",
            "earlyStoppingPatience": "10",
            "evalPercentage": "50",
        },
    ),
    "cohere-least": (
        "cohere.command-text-v14",
        {
            "epochCount": "1",
            "batchSize": "8",
            "learningRate": "5e-6",
            "earlyStoppingThreshold": "0",
            "earlyStoppingPatience": "1",
            "evalPercentage": "5",
        },
    ),
    "llama2": (LLAMA, {"epochCount": "10", "batchSize": "1", "learningRate": "0.1"}),
    "llama3-1": (
        "meta.llama3-1-8b-instruct-v1:0:128k",
        {"epochCount": "5", "batchSize": "1", "learningRate": "1.0E-4"},
    ),
    "claude-most": (
        "anthropic.claude-3-haiku-20240307-v1:0:200k",
        {
            "epochCount": "10",
            "batchSize": "256",
            "learningRateMultiplier": "2",
            "earlyStoppingThreshold": "0.1",
            "earlyStoppingPatience": "10",
        },
    ),
    "claude-least": (
        "anthropic.claude-3-haiku-20240307-v1:0",
        {"epochCount": "1", "batchSize": "4", "learningRateMultiplier": "0.1"},
    ),
    "nova": (
        "amazon.nova-micro-v1:0:128k",
        {"epochCount": "5", "learningRate": "1e-4", "learningRateWarmupSteps": "100"},
    ),
    "none-given": (TITAN, {}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_published_hyperparameters_are_accepted(bedrock: Any, bucket: str, name: str) -> None:
    model_id, hyper_parameters = ACCEPTED[name]
    request = job_request(
        f"accepted-{name}",
        bucket,
        baseModelIdentifier=model_id,
        hyperParameters=hyper_parameters,
    )
    arn = bedrock.create_model_customization_job(**request)["jobArn"]
    job = bedrock.get_model_customization_job(jobIdentifier=arn)
    bedrock.stop_model_customization_job(jobIdentifier=arn)
    assert hyper_parameters.items() <= job["hyperParameters"].items()
    assert job["roleArn"] == ROLE
    assert wait_for_job(bedrock, arn, seconds=20)["status"] == "Stopped"


def test_the_example_runs_with_what_outcrop_env_prints(
    service: Service, trained: Trained, small_files: Path
) -> None:
    # `trained` first: the example's job would wait for that one.
    done = subprocess.run(
        (sys.executable, EXAMPLES / "customize.py", small_files),
        env=service.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("exact match", "perplexity", "Three answers side by side", "3 of 3 answers"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
