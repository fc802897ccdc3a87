"""The published program from end to end: upload, fine-tune, deploy, ask, compare, delete."""

from __future__ import annotations

import csv
import io
import json
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.e2e.conftest import Tuned
from tests.e2e.service import (
    ACCOUNT,
    COHERE,
    LLAMA,
    REGION,
    ROLE,
    TITAN,
    Service,
    ask_base,
    in_service,
    job_request,
    keys,
    refusal,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TITAN_BODY = {
    "inputText": "Which code has part 5?",
    "textGenerationConfig": {"maxTokenCount": 10, "temperature": 0},
}
COHERE_BODY = {"prompt": "Which code has part 5?", "max_tokens": 10, "temperature": 0}
LLAMA_BODY = {"prompt": "Which code has part 5?", "max_gen_len": 10, "temperature": 0}


def invoke(service: Service, model: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    answer = service.client("bedrock-runtime").invoke_model(modelId=model, body=json.dumps(body))
    return json.loads(answer["body"].read()), answer["ResponseMetadata"]["HTTPHeaders"]


# --- 1: data in S3 --------------------------------------------------------------------------------


def test_results_are_read_back_listed_uploaded_in_parts_and_presigned(
    service: Service, bucket: str
) -> None:
    s3 = service.client("s3")
    large = b"0123456789abcdef" * (6 << 16)  # 6 MiB: two parts
    s3.upload_fileobj(io.BytesIO(large), bucket, "large", Config=_parts_of_5_mib())
    head = s3.head_object(Bucket=bucket, Key="large")
    assert head["ContentLength"] == len(large)
    assert head["ETag"].strip('"').endswith("-2"), "it was not uploaded in parts"
    assert s3.get_object(Bucket=bucket, Key="large")["Body"].read() == large
    assert keys(service, bucket) == ["large", "train.jsonl", "validation.jsonl"]

    where = {"Bucket": bucket, "Key": "train.jsonl"}
    url = s3.generate_presigned_url("get_object", Params=where, ExpiresIn=60)
    with urllib.request.urlopen(url, timeout=10) as response:
        assert response.read() == s3.get_object(**where)["Body"].read()


def _parts_of_5_mib() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20)


def test_caller_identity_names_the_account(service: Service) -> None:
    identity = service.client("sts").get_caller_identity()
    assert identity["Account"] == ACCOUNT
    assert identity["Arn"].startswith(f"arn:aws:iam::{ACCOUNT}:user/")


# --- 2: base models -------------------------------------------------------------------------------


def test_models_that_can_be_fine_tuned_are_listed_under_their_real_names(service: Service) -> None:
    bedrock = service.client("bedrock")
    found = bedrock.list_foundation_models(byCustomizationType="FINE_TUNING")["modelSummaries"]
    by_id = {item["modelId"]: item for item in found}
    assert {TITAN, COHERE, "cohere.command-light-text-v14", LLAMA} <= by_id.keys()
    for item in found:
        assert "FINE_TUNING" in item["customizationsSupported"]
        assert item["modelArn"] == f"arn:aws:bedrock:{REGION}::foundation-model/{item['modelId']}"
        assert "SmolLM2" in item["modelName"], "a listing must say whose weights answer"
    assert "mistral.mistral-7b-instruct-v0:2" not in by_id


# --- 3 and 4: the job -----------------------------------------------------------------------------


def test_a_running_job_has_no_metrics_and_no_model(tuned: Tuned) -> None:
    created = tuned.created
    assert created["status"] == "InProgress"
    for absent in ("trainingMetrics", "outputModelArn", "endTime"):
        assert absent not in created
    assert created["validationMetrics"] == [], "as recorded answers of the live service"
    assert {"validationDetails", "dataProcessingDetails", "trainingDetails"} == set(
        created["statusDetails"]
    )


def test_a_completed_job_tells_its_metrics_model_and_stages(tuned: Tuned) -> None:
    job = tuned.job
    assert job["trainingMetrics"]["trainingLoss"] > 0
    assert [item["validationLoss"] > 0 for item in job["validationMetrics"]] == [True]
    assert job["outputModelName"] == "tuned-model"
    assert re.fullmatch(
        rf"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/{re.escape(COHERE)}/[a-z0-9]{{12}}",
        job["outputModelArn"],
    )
    assert job["creationTime"] <= job["endTime"]
    stages = job["statusDetails"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "validationDetails": "Completed",
        "dataProcessingDetails": "Completed",
        "trainingDetails": "Completed",
    }
    begun = [stages[name]["creationTime"] for name in stages]
    assert begun == sorted(begun), "the stages follow each other"
    assert job["baseModelArn"].endswith(f"::foundation-model/{COHERE}")
    assert (job["roleArn"], job["clientRequestToken"]) == (ROLE, "tuned-token")


def test_the_hyperparameters_in_effect_are_the_users_and_the_defaults(tuned: Tuned) -> None:
    assert tuned.job["hyperParameters"] == {
        "epochCount": "1",
        "batchSize": "8",
        "learningRate": "0.0001",
        "earlyStoppingThreshold": "0.01",
        "earlyStoppingPatience": "6",
        "evalPercentage": "20.0",
    }


def test_a_job_is_found_by_arn_and_by_name(service: Service, tuned: Tuned) -> None:
    assert service.job(tuned.arn)["jobArn"] == service.job("tuned-job")["jobArn"] == tuned.arn
    bedrock = service.client("bedrock")
    listed = bedrock.list_model_customization_jobs(nameContains="tuned-job")
    (summary,) = listed["modelCustomizationJobSummaries"]
    assert (summary["jobArn"], summary["status"]) == (tuned.arn, "Completed")
    assert summary["customModelArn"] == tuned.job["outputModelArn"]


def test_a_repeated_token_returns_the_first_job(service: Service, tuned: Tuned) -> None:
    bedrock = service.client("bedrock")
    assert bedrock.create_model_customization_job(**tuned.request)["jobArn"] == tuned.arn
    other = {**tuned.request, "jobName": "tuned-job-other"}
    error = refusal(lambda: bedrock.create_model_customization_job(**other))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert "clientRequestToken" in error.message
    listed = bedrock.list_model_customization_jobs(nameContains="tuned-job")
    assert len(listed["modelCustomizationJobSummaries"]) == 1


def test_tags_of_job_and_model_are_kept_apart(service: Service, tuned: Tuned) -> None:
    bedrock = service.client("bedrock")
    assert bedrock.list_tags_for_resource(resourceARN=tuned.arn)["tags"] == [
        {"key": "team", "value": "geology"}
    ]
    model = tuned.job["outputModelArn"]
    assert bedrock.list_tags_for_resource(resourceARN=model)["tags"] == [
        {"key": "kind", "value": "first"}
    ]


def test_progress_and_events_tell_how_the_job_went(service: Service, tuned: Tuned) -> None:
    own = service.client("outcrop")
    progress = own.get_job_progress(jobIdentifier=tuned.arn)
    assert (progress["status"], progress["step"], progress["totalSteps"]) == ("Completed", 3, 3)
    assert progress["baseValidationLoss"] > 0
    events = own.list_job_events(jobIdentifier=tuned.arn)["events"]
    assert [item["type"] for item in events][:2] == ["Queued", "Started"]


# --- 5: metrics as files --------------------------------------------------------------------------


def _table(service: Service, tuned: Tuned, name: str) -> list[dict[str, str]]:
    found = service.client("s3").get_object(Bucket=tuned.bucket, Key=tuned.folder + name)
    return list(csv.DictReader(io.StringIO(found["Body"].read().decode())))


def test_the_loss_of_every_step_is_in_the_bucket(service: Service, tuned: Tuned) -> None:
    rows = _table(service, tuned, "training_artifacts/step_wise_training_metrics.csv")
    assert list(rows[0]) == ["step_number", "epoch_number", "training_loss", "perplexity"]
    assert [row["step_number"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["training_loss"]) > 0 for row in rows)


def test_the_metrics_that_a_client_asks_for_are_those_of_the_files(
    service: Service, tuned: Tuned
) -> None:
    own = service.client("outcrop")
    told = own.get_job_metrics(jobIdentifier=tuned.arn)
    assert (told["jobArn"], told["status"]) == (tuned.arn, "Completed")
    for kind, name, loss in (
        ("steps", "training_artifacts/step_wise_training_metrics.csv", "training"),
        ("validations", "validation_artifacts/validation_metrics.csv", "validation"),
    ):
        columns = (
            ("step", "step_number"),
            ("epoch", "epoch_number"),
            (f"{loss}Loss", f"{loss}_loss"),
        )
        rows = _table(service, tuned, name)
        for member, column in (*columns, ("perplexity", "perplexity")):
            assert [row[member] for row in told[kind]] == [float(row[column]) for row in rows]
    key = f"{tuned.folder}training_artifacts/step_metrics.jsonl"
    lines = service.client("s3").get_object(Bucket=tuned.bucket, Key=key)["Body"].read()
    for line, row in zip(lines.splitlines(), told["steps"], strict=True):
        assert json.loads(line).items() >= row.items()
    rest = own.get_paginator("get_job_metrics").paginate(
        jobIdentifier=tuned.arn, sinceStep=1, PaginationConfig={"PageSize": 1}
    )
    whole = rest.build_full_result()
    assert whole["steps"] == told["steps"][1:]
    assert whole["validations"] == [row for row in told["validations"] if row["step"] >= 1]


@pytest.mark.parametrize(
    "place",
    [
        "validation_artifacts/post_fine_tuning_validation/validation/validation_metrics.csv",
        "validation_artifacts/post_fine_tuning_validation/validation_metrics.csv",
        "validation_artifacts/validation_metrics.csv",
    ],
)
def test_validation_metrics_begin_with_the_base(service: Service, tuned: Tuned, place: str) -> None:
    rows = _table(service, tuned, place)
    assert list(rows[0]) == ["step_number", "epoch_number", "validation_loss", "perplexity"]
    assert rows[0]["step_number"] == "0"
    assert len(rows) > 1
    last = float(rows[-1]["validation_loss"])
    assert last == pytest.approx(tuned.job["validationMetrics"][0]["validationLoss"], rel=1e-4)
    assert last < float(rows[0]["validation_loss"]), "training did not make it better"


# --- 6: custom model and throughput ---------------------------------------------------------------


def test_the_custom_model_is_found_by_arn_name_and_published_arn(
    service: Service, tuned: Tuned
) -> None:
    bedrock = service.client("bedrock")
    published = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/tuned-model"
    for identifier in (tuned.job["outputModelArn"], "tuned-model", published):
        model = bedrock.get_custom_model(modelIdentifier=identifier)
        assert model["modelArn"] == tuned.job["outputModelArn"]
    assert (model["jobArn"], model["jobName"]) == (tuned.arn, "tuned-job")
    assert model["trainingMetrics"] == tuned.job["trainingMetrics"]
    assert model["hyperParameters"] == tuned.job["hyperParameters"]
    listed = bedrock.list_custom_models(nameContains="tuned-model")["modelSummaries"]
    assert [item["modelArn"] for item in listed] == [tuned.job["outputModelArn"]]


def test_a_throughput_names_its_model_and_root(
    service: Service, tuned: Tuned, throughput: str
) -> None:
    bedrock = service.client("bedrock")
    found = bedrock.get_provisioned_model_throughput(provisionedModelId="tuned-throughput")
    assert (found["provisionedModelArn"], found["status"]) == (throughput, "InService")
    assert found["modelArn"] == found["desiredModelArn"] == tuned.job["outputModelArn"]
    assert found["foundationModelArn"].endswith(COHERE)
    assert (found["modelUnits"], found["desiredModelUnits"]) == (1, 1)


def test_a_throughput_is_made_for_the_published_arn_of_a_model(
    service: Service,
    tuned: Tuned,
    throughput: str,
    name: str,
    drop_throughput: Callable[[str], None],
) -> None:
    published = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/tuned-model"
    arn = in_service(service, name, published)
    drop_throughput(arn)
    same, _ = invoke(service, arn, COHERE_BODY)
    other, _ = invoke(service, throughput, COHERE_BODY)
    assert same["generations"][0]["text"] == other["generations"][0]["text"]


# --- 7: invocation --------------------------------------------------------------------------------


def test_titan_body_is_answered_in_titans_format(service: Service) -> None:
    answer, headers = invoke(service, TITAN, TITAN_BODY)
    (result,) = answer["results"]
    assert result.keys() == {"tokenCount", "outputText", "completionReason"}
    assert result["completionReason"] in ("FINISH", "LENGTH")
    _check_counts(headers, answer["inputTextTokenCount"], result["tokenCount"])


def test_cohere_body_is_answered_in_coheres_format(service: Service) -> None:
    answer, headers = invoke(service, COHERE, COHERE_BODY)
    assert answer["prompt"] == COHERE_BODY["prompt"]
    (generation,) = answer["generations"]
    assert generation["finish_reason"] in ("COMPLETE", "MAX_TOKENS")
    assert {"id", "text"} <= generation.keys()
    _check_counts(headers)


def test_llama_body_is_answered_in_llamas_format(service: Service) -> None:
    answer, headers = invoke(service, LLAMA, LLAMA_BODY)
    assert answer.keys() == {
        "generation",
        "prompt_token_count",
        "generation_token_count",
        "stop_reason",
    }
    assert answer["stop_reason"] in ("stop", "length")
    _check_counts(headers, answer["prompt_token_count"], answer["generation_token_count"])


def _check_counts(
    headers: Any, num_input: int | None = None, num_output: int | None = None
) -> None:
    counted_input = int(headers["x-amzn-bedrock-input-token-count"])
    counted_output = int(headers["x-amzn-bedrock-output-token-count"])
    assert counted_input == (num_input or counted_input) > 0
    assert 0 < counted_output == (num_output or counted_output) <= 10
    assert int(headers["x-amzn-bedrock-invocation-latency"]) >= 0
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("model", "body"),
    [
        ("amazon.titan-text-express-v1:0:8k", TITAN_BODY),
        ("cohere.command-text-v14:7:4k", COHERE_BODY),
        ("meta.llama2-13b-v1:0:4k", LLAMA_BODY),
        ("meta.llama3-1-8b-instruct-v1:0:128k", LLAMA_BODY),
        (f"arn:aws:bedrock:{REGION}::foundation-model/{LLAMA}", LLAMA_BODY),
    ],
)
def test_ids_with_context_and_arns_can_be_invoked(
    service: Service, model: str, body: dict[str, Any]
) -> None:
    answer, _ = invoke(service, model, body)
    assert answer


def test_the_same_prompt_has_the_same_tokens_in_every_format(service: Service) -> None:
    counts = {
        invoke(service, model, body)[1]["x-amzn-bedrock-input-token-count"]
        for model, body in ((TITAN, TITAN_BODY), (COHERE, COHERE_BODY), (LLAMA, LLAMA_BODY))
    }
    counted = service.client("bedrock-runtime").count_tokens(
        modelId=LLAMA, input={"invokeModel": {"body": json.dumps(LLAMA_BODY)}}
    )
    assert counts == {str(counted["inputTokens"])}


def test_temperature_0_is_repeatable(service: Service, throughput: str) -> None:
    for model, body in ((LLAMA, LLAMA_BODY), (throughput, COHERE_BODY)):
        texts = set()
        for _ in range(3):
            answer, _ = invoke(service, model, body)
            texts.add(answer.get("generation") or answer["generations"][0]["text"])
        assert len(texts) == 1


def test_max_tokens_and_stop_sequences_end_the_answer(service: Service) -> None:
    short, _ = invoke(service, LLAMA, {**LLAMA_BODY, "max_gen_len": 2})
    assert (short["generation_token_count"], short["stop_reason"]) == (2, "length")
    prompt = "Count from one to nine in words."
    config = {"maxTokenCount": 40, "temperature": 0}
    whole, _ = invoke(service, TITAN, {"inputText": prompt, "textGenerationConfig": config})
    text = whole["results"][0]["outputText"]
    word = text.split()[len(text.split()) // 2]
    cut, _ = invoke(
        service,
        TITAN,
        {"inputText": prompt, "textGenerationConfig": {**config, "stopSequences": [word]}},
    )
    (result,) = cut["results"]
    assert result["completionReason"] == "STOP_CRITERIA_MET"
    assert text.startswith(result["outputText"])
    assert len(result["outputText"]) < len(text)


def test_a_high_temperature_gives_different_answers(service: Service) -> None:
    body = {"prompt": "Tell a story.", "max_gen_len": 12, "temperature": 1.0, "top_p": 1.0}
    texts = {invoke(service, LLAMA, body)[0]["generation"] for _ in range(5)}
    assert len(texts) > 1


def test_top_k_of_1_is_greedy_at_any_temperature(service: Service) -> None:
    greedy, _ = invoke(service, COHERE, COHERE_BODY)
    hot, _ = invoke(service, COHERE, {**COHERE_BODY, "temperature": 5, "k": 1})
    assert hot["generations"][0]["text"] == greedy["generations"][0]["text"]


def test_the_custom_model_answers_as_it_was_trained(
    service: Service, tuned: Tuned, throughput: str
) -> None:
    body = {"prompt": "Which code has part 3?", "max_tokens": 12, "temperature": 0}
    custom, headers = invoke(service, throughput, body)
    base, _ = invoke(service, COHERE, body)
    assert custom["generations"][0]["text"] != base["generations"][0]["text"]
    for identifier in (tuned.job["outputModelArn"], "tuned-model"):
        on_demand, _ = invoke(service, identifier, body)
        assert on_demand["generations"][0]["text"] == custom["generations"][0]["text"]
    _check_counts(headers | {"x-amzn-bedrock-output-token-count": "1"})


# --- 8: deletion ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_the_custom_models_life_the_base_answers_exactly_as_before(
    service: Service, tuned: Tuned, name: str, bucket: str
) -> None:
    bedrock = service.client("bedrock")
    arn = service.create_job(bucket, name, validationDataConfig=None)
    model = service.wait_for_job(arn)["outputModelArn"]
    throughput = in_service(service, name, model)
    invoke(service, throughput, COHERE_BODY)

    error = refusal(lambda: bedrock.delete_custom_model(modelIdentifier=model))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert name in error.message, "it must say what holds the model"

    bedrock.delete_provisioned_model_throughput(provisionedModelId=throughput)
    error = refusal(lambda: invoke(service, throughput, COHERE_BODY))
    assert (error.code, error.status) == ("ResourceNotFoundException", 404)
    bedrock.delete_custom_model(modelIdentifier=f"{name}-model")
    with pytest.raises(ClientError, match="ResourceNotFoundException"):
        bedrock.get_custom_model(modelIdentifier=model)
    artifacts = service.data_dir / "models" / "custom"
    paths = [path for path in artifacts.rglob("*") if path.is_file()]
    assert not any(model.rpartition("/")[2] in str(path) for path in paths)

    assert ask_base(service) == tuned.base_answer
    assert service.job(arn)["status"] == "Completed", "the job outlives its model"


def test_the_role_of_the_examples_is_there_at_the_first_start(
    service: Service, bucket: str, name: str
) -> None:
    # Its use by name is in every job here; this one has the form of the Titan example.
    with service.paused("outcrop worker"):
        request = job_request(
            bucket,
            name,
            baseModelIdentifier=TITAN,
            hyperParameters={"epochCount": "3", "batchSize": "1", "learningRate": "0.00001"},
        )
        bedrock = service.client("bedrock")
        assert request["roleArn"] == "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
        arn = bedrock.create_model_customization_job(**request)["jobArn"]
        assert f":model-customization-job/{TITAN}:0:8k/" in arn
        bedrock.stop_model_customization_job(jobIdentifier=arn)
