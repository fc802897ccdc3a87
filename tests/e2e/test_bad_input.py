"""Bad input is refused with AWS's error and a reason one can act on, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tests.e2e.conftest import Tuned
from tests.e2e.service import (
    ACCOUNT,
    COHERE,
    LLAMA,
    REGION,
    TITAN,
    Refusal,
    Service,
    job_request,
    keys,
    new_bucket,
    policy,
    records,
    refusal,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

JOB_ARN = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-customization-job/{COHERE}/aaaaaaaaaaaa"
MODEL_ARN = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/{COHERE}/aaaaaaaaaaaa"
THROUGHPUT_ARN = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:provisioned-model/aaaaaaaaaaaa"
LONG_PROMPT = "rock " * 9000


@pytest.fixture(scope="module")
def place(service: Service) -> str:
    """One bucket for all refused jobs: nothing is to be added to it."""
    bucket = new_bucket(service, "bad-input")
    service.client("s3").put_object(Bucket=bucket, Key="folder/train.jsonl", Body=records(8))
    return bucket


def _state(service: Service, bucket: str, name: str) -> object:
    bedrock = service.client("bedrock")
    jobs = bedrock.list_model_customization_jobs(nameContains=name)
    models = bedrock.list_custom_models(nameContains=name)
    return (
        [job["jobArn"] for job in jobs["modelCustomizationJobSummaries"]],
        [model["modelArn"] for model in models["modelSummaries"]],
        keys(service, bucket),
    )


# --- a job that cannot be -------------------------------------------------------------------------

HYPER = {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"}
REFUSED_JOBS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "missing bucket": (
        {"trainingDataConfig": {"s3Uri": "s3://no-such-bucket-here/train.jsonl"}},
        ["GetObject", "no-such-bucket-here", "train.jsonl", "bucket does not exist"],
    ),
    "missing key": (
        {"trainingDataConfig": {"s3Uri": "s3://bad-input/nothing.jsonl"}},
        ["GetObject", "bad-input", "nothing.jsonl", "no object with this key"],
    ),
    "missing validation key": (
        {"validationDataConfig": {"validators": [{"s3Uri": "s3://bad-input/no.jsonl"}]}},
        ["GetObject", "bad-input", "no.jsonl", "no object with this key"],
    ),
    "missing output bucket": (
        {"outputDataConfig": {"s3Uri": "s3://no-such-bucket-here/out/"}},
        ["PutObject", "no-such-bucket-here", "bucket does not exist"],
    ),
    "folder with a slash": (
        {"trainingDataConfig": {"s3Uri": "s3://bad-input/folder/"}},
        ["Invalid training input data configuration", "not a directory", "s3://bad-input/folder/"],
    ),
    "folder without a slash": (
        {"trainingDataConfig": {"s3Uri": "s3://bad-input/folder"}},
        ["Invalid training input data configuration", "not a directory", "s3://bad-input/folder"],
    ),
    "validation folder": (
        {"validationDataConfig": {"validators": [{"s3Uri": "s3://bad-input/folder"}]}},
        ["Invalid validation input data configuration", "s3://bad-input/folder"],
    ),
    "bucket alone": (
        {"trainingDataConfig": {"s3Uri": "s3://bad-input"}},
        ["not a directory"],
    ),
    "no S3 URI": (
        {"trainingDataConfig": {"s3Uri": "https://bad-input/train.jsonl"}},
        ["trainingDataConfig.s3Uri", "https://bad-input/train.jsonl"],
    ),
    "no training data": ({"trainingDataConfig": {}}, ["trainingDataConfig", "s3Uri"]),
    "two validators": (
        {"validationDataConfig": {"validators": [{"s3Uri": "s3://bad-input/train.jsonl"}] * 2}},
        ["validators", "2 entries", "one"],
    ),
    "unknown role": (
        {"roleArn": f"arn:aws:iam::{ACCOUNT}:role/Nobody"},
        [f"arn:aws:iam::{ACCOUNT}:role/Nobody", "does not exist", "BedrockCustomizationRole"],
    ),
    "role of another account": (
        {"roleArn": "arn:aws:iam::999999999999:role/BedrockCustomizationRole"},
        ["arn:aws:iam::999999999999:role/BedrockCustomizationRole", "does not exist"],
    ),
    "no role": ({"roleArn": "BedrockCustomizationRole"}, ["roleArn", "BedrockCustomizationRole"]),
    "unknown base model": (
        {"baseModelIdentifier": "amazon.titan-text-nothing-v1"},
        ["The provided model identifier is invalid", "amazon.titan-text-nothing-v1"],
    ),
    "model that cannot be customized": (
        {"baseModelIdentifier": "mistral.mistral-7b-instruct-v0:2", "hyperParameters": None},
        ["mistral.mistral-7b-instruct-v0:2", "FINE_TUNING", "none"],
    ),
    "type that is not offered": (
        {"customizationType": "DISTILLATION"},
        ["DISTILLATION", "FINE_TUNING"],
    ),
    "type that is none": (
        {"customizationType": "MAGIC"},
        ["customizationType", "MAGIC", "FINE_TUNING"],
    ),
    "continued pre-training where it is not offered": (
        {"customizationType": "CONTINUED_PRE_TRAINING"},
        [COHERE.partition(":")[0], "CONTINUED_PRE_TRAINING", "FINE_TUNING"],
    ),
    "custom model that is not there": (
        {"baseModelIdentifier": "no-such-model"},
        ["The provided model identifier is invalid", "no-such-model", "ListCustomModels"],
    ),
    "key of the customer": (
        {"customModelKmsKeyId": f"arn:aws:kms:{REGION}:{ACCOUNT}:key/{'a' * 36}"},
        ["customModelKmsKeyId"],
    ),
    "unknown hyperparameter": (
        {"hyperParameters": {**HYPER, "momentum": "0.9"}},
        ["momentum", "epochCount", "batchSize", "learningRate"],
    ),
    "hyperparameter that is no number": (
        {"hyperParameters": {**HYPER, "epochCount": "two"}},
        ["epochCount", "'two'", "a whole number from 1 to 100"],
    ),
    "fraction of an epoch": (
        {"hyperParameters": {**HYPER, "epochCount": "1.5"}},
        ["epochCount", "'1.5'", "a whole number from 1 to 100"],
    ),
    "hyperparameter that is not finite": (
        {"hyperParameters": {**HYPER, "learningRate": "nan"}},
        ["learningRate", "'nan'", "5.0E-6", "0.1"],
    ),
    "epochs out of bounds": (
        {"hyperParameters": {**HYPER, "epochCount": "101"}},
        ["epochCount", "'101'", "1 to 100"],
    ),
    "batch out of bounds": (
        {"hyperParameters": {**HYPER, "batchSize": "7"}},
        ["batchSize", "'7'", "8 to 32"],
    ),
    "rate out of bounds": (
        {"hyperParameters": {**HYPER, "learningRate": "0.2"}},
        ["learningRate", "'0.2'", "5.0E-6", "0.1"],
    ),
    "method that is none": (
        {"hyperParameters": {**HYPER, "method": "lora"}},
        ["method", "'lora'", "adapter or full"],
    ),
    "adapter rank out of bounds": (
        {"hyperParameters": {**HYPER, "adapterRank": "0"}},
        ["adapterRank", "'0'", "1 to 256"],
    ),
    "layers that have no adapter": (
        {"hyperParameters": {**HYPER, "adapterTargets": "q_proj,lm_head"}},
        ["adapterTargets", "q_proj,lm_head", "down_proj"],
    ),
    "adapter where all weights are trained": (
        {"hyperParameters": {**HYPER, "method": "full", "adapterAlpha": "8"}},
        ["method is full", "adapterAlpha"],
    ),
    "bounds of another family": (
        {"baseModelIdentifier": TITAN, "hyperParameters": {**HYPER, "evalPercentage": "20"}},
        ["evalPercentage", "unknown"],
    ),
    "two mistakes at once": (
        {"hyperParameters": {"epochCount": "0", "batchSize": "64"}},
        ["epochCount", "'0'", "batchSize", "'64'"],
    ),
    "name that is none": ({"jobName": "a name!"}, ["jobName", "a name!", "pattern"]),
    "model name too long": ({"customModelName": "m" * 64}, ["customModelName", "63"]),
    "tag key too long": (
        {"jobTags": [{"key": "k" * 129, "value": "v"}]},
        ["jobTags", "128"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_JOBS)
def test_a_job_that_cannot_be_is_refused_and_leaves_nothing(
    service: Service, place: str, name: str, case: str
) -> None:
    changes, expected = REFUSED_JOBS[case]
    before = _state(service, place, name)
    bedrock = service.client("bedrock")
    request = job_request(place, name, **changes)
    error = refusal(lambda: bedrock.create_model_customization_job(**request))
    assert (error.code, error.status) == ("ValidationException", 400), error
    for part in expected:
        assert part in error.message
    assert _state(service, place, name) == before


def test_too_many_tags_are_refused(service: Service, place: str, name: str) -> None:
    before = _state(service, place, name)
    tags = [{"key": f"k{number}", "value": "v"} for number in range(51)]
    error = refusal(lambda: service.create_job(place, name, jobTags=tags))
    assert error.code in ("TooManyTagsException", "ValidationException")
    assert error.status == 400
    assert "50" in error.message or "200" in error.message
    assert _state(service, place, name) == before


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        pytest.param([], "GetObject", id="no policy"),
        pytest.param(
            [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::bad-input/*"}],
            "PutObject",
            id="may not write",
        ),
        pytest.param(
            [{"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::other/*"}],
            "GetObject",
            id="another bucket",
        ),
        pytest.param(
            [
                {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
                {
                    "Effect": "Deny",
                    "Action": "s3:GetObject",
                    "Resource": "arn:aws:s3:::bad-input/validation.jsonl",
                },
            ],
            "validation.jsonl",
            id="one file denied",
        ),
    ],
)
def test_a_role_without_access_to_the_bucket_is_refused(
    service: Service, place: str, name: str, statements: list[dict[str, Any]], expected: str
) -> None:
    documents = [policy(*statements)] if statements else []
    role = service.role(f"role-{name}", "bedrock.amazonaws.com", *documents)
    before = _state(service, place, name)
    error = refusal(lambda: service.create_job(place, name, roleArn=role))
    assert (error.code, error.status) == ("ValidationException", 400)
    assert "Could not validate" in error.message
    assert expected in error.message
    assert "bad-input" in error.message
    assert _state(service, place, name) == before


def test_a_role_that_bedrock_may_not_assume_is_refused(
    service: Service, place: str, name: str
) -> None:
    every = policy({"Effect": "Allow", "Action": "*", "Resource": "*"})
    role = service.role(f"role-{name}", "ec2.amazonaws.com", every)
    error = refusal(lambda: service.create_job(place, name, roleArn=role))
    assert (error.code, error.status) == ("ValidationException", 400)
    assert "bedrock.amazonaws.com" in error.message
    assert role in error.message


def test_names_that_are_taken_are_refused(service: Service, tuned: Tuned, name: str) -> None:
    before = _state(service, tuned.bucket, name)
    error = refusal(lambda: service.create_job(tuned.bucket, name, jobName="tuned-job"))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert error.message == "The provided job name is currently in use."
    error = refusal(lambda: service.create_job(tuned.bucket, name, customModelName="tuned-model"))
    assert error.status == 400
    assert "in use" in error.message
    assert _state(service, tuned.bucket, name) == before


def test_names_of_queued_jobs_are_taken_too(service: Service, place: str, name: str) -> None:
    with service.paused("outcrop worker"):
        arn = service.create_job(place, name)
        same = refusal(lambda: service.create_job(place, name))
        model = refusal(
            lambda: service.create_job(place, name + "b", customModelName=f"{name}-model")
        )
        service.client("bedrock").stop_model_customization_job(jobIdentifier=arn)
    assert same == Refusal("ConflictException", 400, "The provided job name is currently in use.")
    assert model.status == 400
    assert "in use" in model.message


# --- lists, and what is not there -----------------------------------------------------------------

LISTS = (
    "list_model_customization_jobs",
    "list_custom_models",
    "list_provisioned_model_throughputs",
)


@pytest.mark.parametrize("operation", LISTS)
def test_a_bad_next_token_is_refused(service: Service, operation: str) -> None:
    error = refusal(lambda: getattr(service.client("bedrock"), operation)(nextToken="abc"))
    assert (error.code, error.status) == ("ValidationException", 400)
    assert "nextToken" in error.message


def test_a_token_of_one_list_is_refused_by_another(
    service: Service, tuned: Tuned, place: str, name: str
) -> None:
    with service.paused("outcrop worker"):
        arn = service.create_job(place, name)
        service.client("bedrock").stop_model_customization_job(jobIdentifier=arn)
    bedrock = service.client("bedrock")
    page = bedrock.list_model_customization_jobs(maxResults=1)
    token = page["nextToken"]
    error = refusal(lambda: bedrock.list_custom_models(nextToken=token))
    assert (error.code, error.status) == ("ValidationException", 400)
    error = refusal(
        lambda: bedrock.list_model_customization_jobs(nextToken=token, nameContains="other")
    )
    assert (error.code, error.status) == ("ValidationException", 400)
    assert bedrock.list_model_customization_jobs(nextToken=token)["modelCustomizationJobSummaries"]


ABSENT: dict[str, tuple[str, dict[str, Any]]] = {
    "job": ("get_model_customization_job", {"jobIdentifier": "no-such-job"}),
    "job by ARN": ("get_model_customization_job", {"jobIdentifier": JOB_ARN}),
    "job to stop": ("stop_model_customization_job", {"jobIdentifier": JOB_ARN}),
    "model": ("get_custom_model", {"modelIdentifier": "no-such-model"}),
    "model by ARN": ("get_custom_model", {"modelIdentifier": MODEL_ARN}),
    "model to delete": ("delete_custom_model", {"modelIdentifier": MODEL_ARN}),
    "throughput": ("get_provisioned_model_throughput", {"provisionedModelId": THROUGHPUT_ARN}),
    "throughput to delete": (
        "delete_provisioned_model_throughput",
        {"provisionedModelId": THROUGHPUT_ARN},
    ),
    "base model": ("get_foundation_model", {"modelIdentifier": "amazon.nothing-v1"}),
    "tags": ("list_tags_for_resource", {"resourceARN": MODEL_ARN}),
    "throughput's model": (
        "create_provisioned_model_throughput",
        {"provisionedModelName": "nothing", "modelId": MODEL_ARN, "modelUnits": 1},
    ),
}


@pytest.mark.parametrize("case", ABSENT)
def test_what_is_not_there_is_not_found(service: Service, case: str) -> None:
    operation, arguments = ABSENT[case]
    error = refusal(lambda: getattr(service.client("bedrock"), operation)(**arguments))
    assert (error.code, error.status) == ("ResourceNotFoundException", 404)
    named = {*arguments.values()} - {1, "nothing"}
    assert any(str(value) in error.message for value in named), error.message


def test_a_job_that_has_ended_cannot_be_stopped(service: Service, tuned: Tuned) -> None:
    bedrock = service.client("bedrock")
    error = refusal(lambda: bedrock.stop_model_customization_job(jobIdentifier="tuned-job"))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert "Completed" in error.message
    assert service.job("tuned-job")["status"] == "Completed"


def test_a_model_in_use_cannot_be_deleted(service: Service, tuned: Tuned, throughput: str) -> None:
    bedrock = service.client("bedrock")
    error = refusal(lambda: bedrock.delete_custom_model(modelIdentifier="tuned-model"))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert "tuned-throughput" in error.message
    assert bedrock.get_custom_model(modelIdentifier="tuned-model")["modelStatus"] == "Active"


def test_quotas_of_throughput_are_refused_with_their_numbers(
    service: Service, name: str, drop_throughput: Callable[[str], None]
) -> None:
    bedrock = service.client("bedrock")

    def create(number: int, units: int = 1) -> str:
        made = bedrock.create_provisioned_model_throughput(
            provisionedModelName=f"{name}-{number}", modelId=f"{TITAN}:0:8k", modelUnits=units
        )
        return str(made["provisionedModelArn"])

    error = refusal(lambda: create(0, units=2))
    assert (error.code, error.status) == ("ServiceQuotaExceededException", 400)
    assert "modelUnits is 2" in error.message

    held = len(bedrock.list_provisioned_model_throughputs()["provisionedModelSummaries"])
    for number in range(held, 2):
        drop_throughput(create(number))
    error = refusal(lambda: create(2))
    assert (error.code, error.status) == ("ServiceQuotaExceededException", 400)
    assert "max_provisioned_models" in error.message
    found = bedrock.list_provisioned_model_throughputs()["provisionedModelSummaries"]
    assert len(found) == 2


# --- invocation -----------------------------------------------------------------------------------


def _titan(**config: Any) -> bytes:
    return json.dumps({"inputText": "Hello", "textGenerationConfig": config}).encode()


REFUSED_BODIES: dict[str, tuple[str, bytes, list[str]]] = {
    "not JSON": (TITAN, b"{", ["Malformed input request", "JSON"]),
    "not UTF-8": (TITAN, b"\xff\xfe", ["Malformed input request", "UTF-8"]),
    "empty": (TITAN, b"", ["Malformed input request"]),
    "an array": (TITAN, b"[]", ["Malformed input request"]),
    "key missing": (TITAN, b"{}", ["Malformed input request", "inputText"]),
    "key unknown": (
        TITAN,
        b'{"inputText":"a","seed":1}',
        ["Malformed input request", "extraneous key [seed] is not permitted"],
    ),
    "body of another family": (
        LLAMA,
        b'{"inputText":"a"}',
        ["2 schema violations", "inputText", "prompt"],
    ),
    "type wrong": (COHERE, b'{"prompt":1}', ["Malformed input request", "prompt"]),
    "temperature too high": (TITAN, _titan(temperature=1.5), ["temperature", "1.5", "1"]),
    "temperature negative": (TITAN, _titan(temperature=-1), ["temperature", "-1", "0"]),
    "top p of 0": (TITAN, _titan(topP=0), ["topP", "0"]),
    "no tokens": (TITAN, _titan(maxTokenCount=0), ["maxTokenCount", "0", "1"]),
    "too many tokens": (
        TITAN,
        _titan(maxTokenCount=8193),
        ["The maximum tokens you requested exceeds the model limit of 8192"],
    ),
    "Cohere's tokens": (
        COHERE,
        b'{"prompt":"a","max_tokens":4097}',
        ["The maximum tokens you requested exceeds the model limit of 4096"],
    ),
    "Llama's tokens": (
        LLAMA,
        b'{"prompt":"a","max_gen_len":2049}',
        ["The maximum tokens you requested exceeds the model limit of 2048"],
    ),
    "prompt longer than the context": (
        LLAMA,
        json.dumps({"prompt": LONG_PROMPT, "max_gen_len": 10}).encode(),
        ["tokens", "8192", "10"],
    ),
    "prompt and answer longer than the context": (
        TITAN,
        json.dumps(
            {"inputText": "rock " * 4000, "textGenerationConfig": {"maxTokenCount": 8000}}
        ).encode(),
        ["tokens", "8000", "8192"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_BODIES)
def test_a_body_that_cannot_be_is_refused(service: Service, case: str) -> None:
    model, body, expected = REFUSED_BODIES[case]
    runtime = service.client("bedrock-runtime", attempts=8)
    error = refusal(lambda: runtime.invoke_model(modelId=model, body=body))
    assert (error.code, error.status) == ("ValidationException", 400), error
    for part in expected:
        assert part in error.message


def test_an_oversized_body_is_refused_and_the_service_lives(service: Service) -> None:
    runtime = service.client("bedrock-runtime", attempts=1)
    error = refusal(lambda: runtime.invoke_model(modelId=TITAN, body=b" " * 25_000_001))
    assert (error.code, error.status) == ("ValidationException", 400)
    assert "25000000" in error.message
    assert httpx.get(f"{service.url}/healthz", trust_env=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("model", "code", "status"),
    [
        ("amazon.titan-text-nothing-v1", "ValidationException", 400),
        (
            f"arn:aws:bedrock:{REGION}::foundation-model/amazon.nothing-v1",
            "ValidationException",
            400,
        ),
        (THROUGHPUT_ARN, "ResourceNotFoundException", 404),
        (MODEL_ARN, "ResourceNotFoundException", 404),
    ],
)
def test_an_unknown_model_is_refused(service: Service, model: str, code: str, status: int) -> None:
    runtime = service.client("bedrock-runtime")
    error = refusal(lambda: runtime.invoke_model(modelId=model, body=_titan()))
    assert (error.code, error.status) == (code, status)
    assert model in error.message


# --- data that cannot be used: the job fails and says where ---------------------------------------

GOOD = b'{"prompt":"Which code has part 1?","completion":" code 07"}\n'
DEFECTS: dict[str, tuple[bytes, list[str]]] = {
    "not JSON": (
        GOOD * 2 + b'{"prompt": "a", "completion"\n',
        ["Unable to parse Amazon S3 file", "Data files must conform to JSONL format", "ine 3"],
    ),
    "wrong keys": (
        GOOD + b'{"question":"a","answer":"b"}\n',
        ["must follow", '"prompt"', '"completion"', "ine 2"],
    ),
    "two formats in one": (
        GOOD * 3 + b'{"prompt":"a","completion":"b","messages":[]}\n',
        ["must follow", "messages", "ine 4"],
    ),
    "completion missing": (GOOD + b'{"prompt":"a"}\n', ["completion", "ine 2"]),
    "value that is no text": (b'{"prompt":"a","completion":7}\n', ["completion", "ine 1"]),
    "format of another family": (
        b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n',
        ["must follow", "ine 1"],
    ),
    "no UTF-8": (GOOD + b'{"prompt":"\xff","completion":"b"}\n', ["UTF-8", "ine 2"]),
    "empty file": (b"", ["no record"]),
    "blank lines only": (b"\n \n\n", ["no record"]),
    "record too long": (
        GOOD + json.dumps({"prompt": "rock " * 4500, "completion": "b"}).encode() + b"\n",
        ["exceeds limit of 4096", "ine 2"],
    ),
    "record of too many characters": (
        GOOD + json.dumps({"prompt": LONG_PROMPT, "completion": "b"}).encode() + b"\n",
        ["Input size exceeded", "ine 2"],
    ),
}


@pytest.fixture(scope="module")
def failing(service: Service) -> dict[str, str]:
    """Job ARNs of all defects, created at once so that they run one after the other."""
    bucket = new_bucket(service, "defects")
    arns = {}
    for number, (case, (body, _)) in enumerate(DEFECTS.items()):
        service.client("s3").put_object(Bucket=bucket, Key=f"{number}.jsonl", Body=body)
        arns[case] = service.create_job(
            bucket,
            f"defect-{number}",
            trainingDataConfig={"s3Uri": f"s3://{bucket}/{number}.jsonl"},
            outputDataConfig={"s3Uri": f"s3://{bucket}/out-{number}/"},
        )
    return arns


@pytest.mark.slow
@pytest.mark.parametrize("case", DEFECTS)
def test_data_that_cannot_be_used_fails_the_job_with_file_and_line(
    service: Service, failing: dict[str, str], case: str
) -> None:
    job = service.wait_for_job(failing[case])
    assert job["status"] == "Failed"
    number = list(DEFECTS).index(case)
    for part in (f"s3://defects/{number}.jsonl", *DEFECTS[case][1]):
        assert part in job["failureMessage"]
    assert "endTime" in job
    assert job["statusDetails"]["validationDetails"]["status"] == "Failed"
    assert job["statusDetails"]["trainingDetails"]["status"] in ("NotStarted", "Failed")
    for absent in ("outputModelArn", "trainingMetrics"):
        assert absent not in job
    models = service.client("bedrock").list_custom_models(nameContains=f"defect-{number}-")
    assert models["modelSummaries"] == []
    written = {key.split("/", 2)[2] for key in keys(service, "defects", f"out-{number}/model-")}
    assert written == {"data_report/report.html", "data_report/report.json"}


@pytest.mark.slow
def test_one_record_over_the_quota_fails_the_job(service: Service, bucket: str, name: str) -> None:
    service.client("s3").put_object(Bucket=bucket, Key="many.jsonl", Body=records(1001))
    many = {"validators": [{"s3Uri": f"s3://{bucket}/many.jsonl"}]}
    job = service.wait_for_job(service.create_job(bucket, name, validationDataConfig=many))
    assert job["status"] == "Failed"
    for part in (f"s3://{bucket}/many.jsonl", "1,000", "max_validation_records"):
        assert part in job["failureMessage"]


@pytest.mark.slow
def test_data_that_is_deleted_before_the_job_runs_fails_it(
    service: Service, bucket: str, name: str
) -> None:
    with service.paused("outcrop worker"):
        arn = service.create_job(bucket, name)
        service.client("s3").delete_object(Bucket=bucket, Key="train.jsonl")
    job = service.wait_for_job(arn)
    assert job["status"] == "Failed"
    assert "GetObject" in job["failureMessage"]
    assert "train.jsonl" in job["failureMessage"]
