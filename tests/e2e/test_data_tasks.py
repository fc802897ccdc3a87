"""Bad data fail within seconds with their lines, and a preflight says so without a job."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from tests.e2e.service import (
    COHERE,
    ENDED,
    JOB_SECONDS,
    REGION,
    ROLE,
    Service,
    keys,
    new_bucket,
    policy,
    records,
    refusal,
    wait_for,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BAD = records(40) + b'{"prompt": "Which code has part 7?"}\n' + b'{"prompt": "a", "comp\n'


def start(service: Service, bucket: str, **changes: Any) -> str:
    """Start a preflight of the published form; returns its ARN."""
    request = {
        "kind": "preflight",
        "roleArn": ROLE,
        "baseModelIdentifier": COHERE,
        "trainingDataConfig": {"s3Uri": f"s3://{bucket}/train.jsonl"},
        "outputDataConfig": {"s3Uri": f"s3://{bucket}/out/"},
        **changes,
    }
    return str(service.client("outcrop").start_data_task(**request)["taskArn"])


def get(service: Service, task: str) -> dict[str, Any]:
    return dict(service.client("outcrop").get_data_task(taskIdentifier=task))


def wait(service: Service, task: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found = get(service, task)
        return found if found["status"] in ENDED else None

    return wait_for(ended, JOB_SECONDS, f"the task {task} to end")


def put(service: Service, bucket: str, key: str, body: bytes) -> None:
    service.client("s3").put_object(Bucket=bucket, Key=key, Body=body)


def read(service: Service, uri: str) -> bytes:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    body = service.client("s3").get_object(Bucket=bucket, Key=key)["Body"]
    return bytes(body.read())


def test_a_preflight_foretells_word_for_word_what_the_job_fails_with_within_seconds(
    service: Service, bucket: str, name: str
) -> None:
    put(service, bucket, "train.jsonl", BAD)
    foretold = wait(service, start(service, bucket))
    assert (foretold["status"], foretold["verdict"]) == ("Completed", "rejected")
    assert [item["line"] for item in foretold["defects"][:2]] == [41, 42]

    began = time.monotonic()
    arn = service.create_job(bucket, name, validationDataConfig=None)
    job = service.wait_for_job(arn, JOB_SECONDS)
    seconds = time.monotonic() - began
    assert job["status"] == "Failed", f"after {seconds:.1f} s"
    assert job["statusDetails"]["validationDetails"]["status"] == "Failed"
    assert job["statusDetails"]["dataProcessingDetails"]["status"] == "NotStarted"
    folder = f"out/model-customization-job-{arn.rpartition('/')[2]}/"
    task_folder = f"out/data-task-{foretold['taskArn'].rpartition('/')[2]}/"
    assert job["failureMessage"] == foretold["rejection"].replace(task_folder, folder)
    for part in ("Line 41: ", "Line 42: ", f"s3://{bucket}/train.jsonl", "must follow"):
        assert part in job["failureMessage"]

    report = json.loads(read(service, f"s3://{bucket}/{folder}data_report/report.json"))
    assert report["rejection"] == job["failureMessage"]
    page = read(service, f"s3://{bucket}/{folder}data_report/report.html").decode()
    assert f"s3://{bucket}/train.jsonl:42" in page
    assert keys(service, bucket, f"{folder}validated_data") == []
    outputs = {item["name"]: item for item in foretold["outputs"]}
    for item in outputs.values():
        assert hashlib.sha256(read(service, item["s3Uri"])).hexdigest() == item["sha256"]


def test_what_a_job_accepted_is_in_the_bucket_byte_for_byte(service: Service, tuned: Any) -> None:
    status = read(service, f"s3://{tuned.bucket}/{tuned.folder}input_status/manifest.report.csv")
    assert status.decode().splitlines()[1:] == [
        f"s3://{tuned.bucket}/train.jsonl,24,24,0,0",
        f"s3://{tuned.bucket}/validation.jsonl,8,8,0,0",
    ]
    digests = []
    for role, content in (("training", records(24)), ("validation", records(8, first=24))):
        key = f"{tuned.folder}validated_data/{role}/validated_prompts.jsonl"
        assert read(service, f"s3://{tuned.bucket}/{key}") == content
        digests.append(hashlib.sha256(content).hexdigest())
    told = service.progress(tuned.arn)["dataFiles"]
    assert [item["sha256"] for item in told] == digests


def test_data_that_are_replaced_while_the_job_waits_are_checked_as_they_are_then(
    service: Service, bucket: str, name: str
) -> None:
    accepted = wait(service, start(service, bucket))
    assert accepted["verdict"] == "accepted"
    with service.paused("outcrop worker"):
        arn = service.create_job(bucket, name, validationDataConfig=None)
        put(service, bucket, "train.jsonl", BAD)
    job = service.wait_for_job(arn, JOB_SECONDS)
    assert job["status"] == "Failed"
    assert "Line 41: " in job["failureMessage"]
    folder = f"out/model-customization-job-{arn.rpartition('/')[2]}/"
    report = json.loads(read(service, f"s3://{bucket}/{folder}data_report/report.json"))
    assert report["files"][0]["sha256"] == hashlib.sha256(BAD).hexdigest()
    assert accepted["files"][0]["sha256"] == hashlib.sha256(records(24)).hexdigest()


def test_a_task_whose_process_is_killed_ends_as_if_it_had_not_been(
    service: Service, bucket: str
) -> None:
    put(service, bucket, "train.jsonl", records(8_000))
    quiet = wait(service, start(service, bucket, kind="check"))
    task = start(service, bucket, kind="check")
    os.kill(service.process(f"outcrop.jobs.attempt {task.rpartition('/')[2]}").pid, signal.SIGKILL)
    found = wait(service, task)
    assert (found["status"], found["attempt"]) == ("Completed", 2)
    assert found["counts"] == quiet["counts"]
    assert found["files"] == quiet["files"]


def test_a_repeated_token_starts_one_task(service: Service, bucket: str, name: str) -> None:
    first = start(service, bucket, clientRequestToken=f"token-{name}")
    assert start(service, bucket, clientRequestToken=f"token-{name}") == first
    found = wait(service, first)
    assert found["verdict"] == "accepted", found["rejection"]


def test_a_task_reads_with_the_permissions_of_its_role_only(
    service: Service, bucket: str, name: str
) -> None:
    writes = {"Effect": "Allow", "Action": "s3:PutObject", "Resource": "*"}
    role = service.role(f"role-{name}", "bedrock.amazonaws.com", policy(writes))
    error = refusal(lambda: start(service, bucket, roleArn=role))
    assert (error.code, error.status) == ("ValidationException", 400)
    assert "Could not validate GetObject permissions" in error.message
    credentials = service.user(f"user-{name}")
    client = service.client("outcrop", credentials=credentials)
    error = refusal(client.list_data_tasks)
    assert (error.code, error.status) == ("AccessDeniedException", 403)


def test_the_command_line_says_the_same_of_an_object_in_s3(service: Service, bucket: str) -> None:
    put(service, bucket, "train.jsonl", BAD)
    foretold = wait(service, start(service, bucket))
    environment = {
        **{name: text for name, text in os.environ.items() if not name.startswith("AWS_")},
        "AWS_ENDPOINT_URL": service.url,
        "AWS_ACCESS_KEY_ID": service.owner.access_key_id,
        "AWS_SECRET_ACCESS_KEY": service.owner.secret_access_key,
        "AWS_DEFAULT_REGION": REGION,
    }
    command = [sys.executable, "-m", "outcrop", "data", "check", f"s3://{bucket}/train.jsonl"]
    command += ["--for", COHERE, "--json", "--data-dir", str(service.data_dir)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=JOB_SECONDS
    )
    assert done.returncode == 2, done.stderr
    report = json.loads(done.stdout)
    assert foretold["rejection"].startswith(report["rejection"].rstrip())
    assert report["files"][0]["sha256"] == foretold["files"][0]["sha256"]


def test_tasks_are_listed_and_stopped(service: Service, name: str) -> None:
    bucket = new_bucket(service, f"{name}-listed")
    client = service.client("outcrop")
    with service.paused("outcrop worker"):
        task = start(service, bucket)
        client.stop_data_task(taskIdentifier=task)
    assert get(service, task)["status"] == "Stopped"
    pages = client.get_paginator("list_data_tasks").paginate(
        statusEquals="Stopped", PaginationConfig={"PageSize": 1}
    )
    arns = [item["taskArn"] for page in pages for item in page["dataTaskSummaries"]]
    assert task in arns
    error = refusal(lambda: client.stop_data_task(taskIdentifier=task))
    assert error.code == "ConflictException"
