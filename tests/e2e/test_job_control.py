"""Jobs wait in a queue that can be seen, stop when asked, and one runs at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from tests.e2e.service import JOB_SECONDS, PUBLISHED, TITAN, Service, keys, refusal, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LONG = {**PUBLISHED, "epochCount": "100"}
STOP_SECONDS = 5.0
NOISE_SECONDS = 5.0
"""Machines that run other tests beside this one are slow; the promise is the number above."""


@pytest.mark.slow
def test_a_running_job_stops_and_the_next_one_takes_its_place(
    service: Service,
    bucket: str,
    name: str,
    record_property: Callable[[str, object], None],
) -> None:
    bedrock = service.client("bedrock")
    first = service.create_job(bucket, f"{name}-first", hyperParameters=LONG)
    second = service.create_job(bucket, f"{name}-second", hyperParameters=LONG)
    third = service.create_job(bucket, f"{name}-third", hyperParameters=LONG)
    progress = service.wait_for_step(first)
    assert "queuePosition" not in progress
    assert (progress["stage"], progress["attempt"]) == ("training", 1)
    assert progress["totalSteps"] == 300
    assert [service.progress(arn)["queuePosition"] for arn in (second, third)] == [0, 1]
    assert service.job(second)["statusDetails"]["validationDetails"]["status"] == "NotStarted"

    stopped_at = time.monotonic()
    bedrock.stop_model_customization_job(jobIdentifier=third)
    assert service.job(third)["status"] == "Stopped", "a queued job stops at once"
    assert service.progress(second)["queuePosition"] == 0

    stopped_at = time.monotonic()
    bedrock.stop_model_customization_job(jobIdentifier=first)
    assert service.job(first)["status"] in ("Stopping", "Stopped")
    job = service.wait_for_job(first, 60.0)
    seconds = time.monotonic() - stopped_at
    record_property("seconds until a running job had stopped", round(seconds, 2))
    assert job["status"] == "Stopped"
    assert seconds < STOP_SECONDS + NOISE_SECONDS
    assert "endTime" in job
    assert "outputModelArn" not in job
    assert "trainingMetrics" not in job
    assert job["statusDetails"]["trainingDetails"]["status"] == "Stopped"

    wait_for(
        lambda: "queuePosition" not in service.progress(second), 30.0, "the second job to begin"
    )
    bedrock.stop_model_customization_job(jobIdentifier=second)
    assert service.wait_for_job(second, 60.0)["status"] == "Stopped"
    error = refusal(lambda: bedrock.stop_model_customization_job(jobIdentifier=second))
    assert (error.code, error.status) == ("ConflictException", 400)
    assert "Stopped" in error.message
    assert bedrock.list_custom_models(nameContains=name)["modelSummaries"] == []


@pytest.mark.slow
def test_a_job_stops_in_the_middle_of_a_long_record(
    service: Service, name: str, record_property: Callable[[str, object], None]
) -> None:
    """A step of one record near the limit takes longer than a stop may; it is not waited for."""
    bucket = f"{name}-long"
    text = " ".join(f"part {number}" for number in range(330))
    line = json.dumps({"prompt": text, "completion": f" {text}"}).encode() + b"\n"
    s3 = service.client("s3")
    s3.create_bucket(Bucket=bucket)
    s3.put_object(Bucket=bucket, Key="train.jsonl", Body=line * 12)
    arn = service.create_job(
        bucket,
        name,
        baseModelIdentifier=TITAN,
        hyperParameters={"epochCount": "1", "batchSize": "1"},
        validationDataConfig=None,
    )
    job_id = arn.rpartition("/")[2]
    log = service.data_dir / "logs" / "jobs" / f"{job_id}.log"
    wait_for(
        lambda: log.is_file() and "step 0 of 12 begins" in log.read_text(encoding="utf-8"),
        JOB_SECONDS,
        "the first step to begin",
    )
    stopped_at = time.monotonic()
    service.client("bedrock").stop_model_customization_job(jobIdentifier=arn)
    assert service.wait_for_job(arn, 60.0)["status"] == "Stopped"
    seconds = time.monotonic() - stopped_at
    record_property("seconds until a job had stopped in a long record", round(seconds, 2))
    assert seconds < STOP_SECONDS + NOISE_SECONDS
    said = log.read_text(encoding="utf-8")
    assert "stopped by its owner" in said, "it heard the request itself and was not killed"
    assert service.progress(arn).get("step", 0) == 0


@pytest.mark.slow
def test_metrics_and_progress_can_be_read_while_the_job_runs(
    service: Service, bucket: str, name: str
) -> None:
    arn = service.create_job(bucket, name, hyperParameters=LONG)
    folder = f"out/model-customization-job-{arn.rpartition('/')[2]}/"
    progress = service.wait_for_step(arn)
    found = wait_for(lambda: keys(service, bucket, folder), 30.0, "the first metrics file")
    assert service.job(arn)["status"] == "InProgress"
    assert any(key.endswith("validation_metrics.csv") for key in found)
    assert progress["baseValidationLoss"] > 0
    assert progress["trainingLoss"] > 0
    assert progress["etaSeconds"] > 0
    started = time.monotonic()
    service.job(arn)
    assert time.monotonic() - started < 2.0, "a job at full load leaves the gateway responsive"
    service.client("bedrock").stop_model_customization_job(jobIdentifier=arn)
    assert service.wait_for_job(arn, 60.0)["status"] == "Stopped"
