"""A model from S3 on the real service: imported by a worker, invoked, deleted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.assets import tiny_tokenizer as tiny
from tests.assets.tiny_model import write_tiny_model
from tests.e2e.service import JOB_SECONDS, ROLE, Service, new_bucket, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]


def test_a_model_is_imported_from_s3_and_answers(
    service: Service, name: str, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path, vocab_size=400)
    tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    bucket, s3 = new_bucket(service, name), service.client("s3")
    for file in folder.iterdir():
        s3.put_object(Bucket=bucket, Key=f"models/tiny/{file.name}", Body=file.read_bytes())
    bedrock, runtime = service.client("bedrock"), service.client("bedrock-runtime", attempts=8)
    arn = bedrock.create_model_import_job(
        jobName=name,
        importedModelName=name,
        roleArn=ROLE,
        modelDataSource={"s3DataSource": {"s3Uri": f"s3://{bucket}/models/tiny"}},
    )["jobArn"]

    def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = bedrock.get_model_import_job(jobIdentifier=arn)
        return job if job["status"] != "InProgress" else None

    job = wait_for(ended, JOB_SECONDS, "the import to end")
    assert (job["status"], job.get("failureMessage")) == ("Completed", None)
    model = job["importedModelArn"]
    body = {"prompt": "<|im_start|>user\nhello", "max_gen_len": 8, "temperature": 0}
    answers = [
        json.loads(runtime.invoke_model(modelId=model, body=json.dumps(body))["body"].read())
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert 0 < answers[0]["generation_token_count"] <= 8
    counted = runtime.count_tokens(
        modelId=model, input={"invokeModel": {"body": json.dumps(body).encode()}}
    )
    assert counted["inputTokens"] == answers[0]["prompt_token_count"]
    said = runtime.converse(
        modelId=model,
        messages=[{"role": "user", "content": [{"text": "hello"}]}],
        inferenceConfig={"maxTokens": 8},
    )
    assert said["output"]["message"]["role"] == "assistant"
    bedrock.delete_imported_model(modelIdentifier=model)
    assert name not in [
        one["modelName"] for one in bedrock.list_imported_models()["modelSummaries"]
    ]
