"""A batch job through boto3, with its attempt and its model server killed on the way."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest
from tests.e2e.service import JOB_SECONDS, ROLE, TITAN, Service, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ENDED = ("Completed", "PartiallyCompleted", "Failed", "Stopped", "Expired")
NUM_RECORDS = 90


def test_a_batch_job_answers_every_record_once_whatever_is_killed(
    service: Service, bucket: str, name: str
) -> None:
    settings = {"maxTokenCount": 4, "temperature": 0}
    records: list[dict[str, Any]] = [
        {
            "recordId": f"r{number}",
            "modelInput": {
                "inputText": f"Name rock number {number}.",
                "textGenerationConfig": settings,
            },
        }
        for number in range(NUM_RECORDS)
    ]
    records[7]["modelInput"] = {"prompt": "of another family"}
    body = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    s3, bedrock = service.client("s3"), service.client("bedrock")
    s3.put_object(Bucket=bucket, Key="batch/in.jsonl", Body=body)
    arn = bedrock.create_model_invocation_job(
        jobName=name,
        roleArn=ROLE,
        modelId=TITAN,
        inputDataConfig={"s3InputDataConfig": {"s3Uri": f"s3://{bucket}/batch/"}},
        outputDataConfig={"s3OutputDataConfig": {"s3Uri": f"s3://{bucket}/answers/"}},
    )["jobArn"]

    def look() -> dict[str, Any]:
        return dict(bedrock.get_model_invocation_job(jobIdentifier=arn))

    wait_for(lambda: look().get("processedRecordCount", 0) > 1, JOB_SECONDS, "the first answers")
    assert look()["status"] == "InProgress"
    for part in (f"outcrop.jobs.attempt {arn[-12:]}", "outcrop model-server"):
        os.kill(service.process(part).pid, signal.SIGKILL)
    job = wait_for(
        lambda: found if (found := look())["status"] in ENDED else None, JOB_SECONDS, "the end"
    )
    assert job["status"] == "Completed", job
    counts = {name: job[f"{name}RecordCount"] for name in ("total", "processed", "error")}
    assert counts == {"total": NUM_RECORDS, "processed": NUM_RECORDS, "error": 1}

    def read(key: str) -> bytes:
        found = s3.get_object(Bucket=bucket, Key=f"answers/{arn[-12:]}/{key}")
        return bytes(found["Body"].read())

    lines = [json.loads(line) for line in read("in.jsonl.out").splitlines()]
    assert [line["recordId"] for line in lines] == [record["recordId"] for record in records]
    assert [line["modelInput"] for line in lines] == [record["modelInput"] for record in records]
    assert [line["recordId"] for line in lines if "error" in line] == ["r7"]
    tokens = sum(
        line["modelOutput"]["results"][0]["tokenCount"] for line in lines if "modelOutput" in line
    )
    manifest = json.loads(read("manifest.json.out"))
    assert manifest["outputTokenCount"] == tokens
    assert manifest["successRecordCount"] == NUM_RECORDS - 1
