"""What was asked and answered is logged, and a job's validation stage takes it as training data."""

from __future__ import annotations

import gzip
import json

import pytest
from tests.e2e.service import JOB_SECONDS, Service, job_request, keys, new_bucket, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ASKED = "cohere.command-light-text-v14"
NUM_CALLS = 25


def test_answers_are_logged_and_become_training_data(service: Service, name: str) -> None:
    bucket = new_bucket(service, f"{name}-logs")
    s3, bedrock = service.client("s3"), service.client("bedrock")
    bedrock.put_model_invocation_logging_configuration(
        loggingConfig={"s3Config": {"bucketName": bucket, "keyPrefix": "logs"}}
    )
    runtime = service.client("bedrock-runtime", attempts=8)
    answers: dict[str, str] = {}
    try:
        for number in range(NUM_CALLS):
            prompt = f"Say something of rock number {number}."
            body = json.dumps({"prompt": prompt, "max_tokens": 3, "temperature": 0})
            metadata = json.dumps({"wanted": "no" if number == 0 else "yes"})
            answer = runtime.invoke_model(modelId=ASKED, body=body, requestMetadata=metadata)
            if number:
                answers[prompt] = json.loads(answer["body"].read())["generations"][0]["text"]
    finally:
        bedrock.delete_model_invocation_logging_configuration()

    def logged() -> list[dict[str, object]] | None:
        found = []
        for key in keys(service, bucket, "logs/"):
            if key.endswith(".json.gz"):
                content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
                found += [json.loads(line) for line in gzip.decompress(content).splitlines()]
        return found if len(found) >= NUM_CALLS else None

    records = wait_for(logged, JOB_SECONDS, "the logs")
    assert len({record["requestId"] for record in records}) == len(records) == NUM_CALLS

    config = {
        "usePromptResponse": True,
        "invocationLogSource": {"s3Uri": f"s3://{bucket}/logs"},
        "requestMetadataFilters": {"equals": {"wanted": "yes"}},
    }
    request = job_request(bucket, name, trainingDataConfig={"invocationLogsConfig": config})
    arn = bedrock.create_model_customization_job(**request)["jobArn"]

    def validated() -> bool:
        job = service.job(arn)
        assert job["status"] == "InProgress", job.get("failureMessage")
        return bool(job["statusDetails"]["validationDetails"]["status"] == "Completed")

    wait_for(validated, JOB_SECONDS, "the validation stage to end")
    bedrock.stop_model_customization_job(jobIdentifier=arn)
    folder = f"out/model-customization-job-{arn.rpartition('/')[2]}"
    key = f"{folder}/validated_data/training/validated_prompts.jsonl"
    kept = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    assert {
        line["prompt"]: line["completion"] for line in map(json.loads, kept.splitlines())
    } == answers
    assert service.wait_for_job(arn)["status"] == "Stopped"
