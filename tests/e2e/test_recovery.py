"""Whatever process is killed, nothing is lost, nothing is published twice, nobody has to ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable

import pytest
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError
from tests.e2e.service import (
    LLAMA,
    PUBLISHED,
    STOP_SECONDS,
    TITAN,
    Service,
    ask_base,
    in_service,
    new_bucket,
    wait_for,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

ATTEMPT, WORKER, MODEL_SERVER = "outcrop.jobs.attempt", "outcrop worker", "outcrop model-server"
GATEWAY = "outcrop gateway"
VALIDATION_METRICS = "validation_artifacts/validation_metrics.csv"
SOME_STEPS = {**PUBLISHED, "epochCount": "6"}  # 18 steps: time to be killed in


def _models(service: Service) -> list[str]:
    listed = service.client("bedrock").list_custom_models()
    return [item["modelArn"] for item in listed["modelSummaries"]]


def _artifacts(service: Service) -> list[str]:
    folder = service.data_dir / "models" / "custom"
    return [str(path) for path in folder.rglob("adapter_config.json")]


def _check_completed_once(service: Service, arn: str) -> None:
    job = service.wait_for_job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    assert _models(service) == [job["outputModelArn"]]
    assert len(_artifacts(service)) == 1
    assert service.progress(arn)["attempt"] > 1


def test_jobs_survive_the_death_of_attempt_and_worker(own_service: Service) -> None:
    bucket = new_bucket(own_service, "kept")
    arn = own_service.create_job(bucket, "kept", hyperParameters=SOME_STEPS)
    own_service.wait_for_step(arn)
    os.kill(own_service.process(ATTEMPT).pid, signal.SIGKILL)
    wait_for(lambda: own_service.progress(arn)["attempt"] == 2, 300.0, "the second attempt")
    own_service.process(ATTEMPT)
    os.kill(own_service.process(WORKER).pid, signal.SIGKILL)
    _check_completed_once(own_service, arn)
    assert own_service.progress(arn)["attempt"] == 3


def test_a_killed_job_ends_in_the_bytes_of_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    service = Service(
        tmp_path_factory.mktemp("exact") / "data",
        OUTCROP_JOB_SLOTS="1",
        OUTCROP_CHECKPOINT_SECONDS="1",
    )
    service.start()
    try:
        bucket = new_bucket(service, "exact")
        arns = [
            service.create_job(bucket, name, hyperParameters=SOME_STEPS)
            for name in ("whole", "killed")
        ]
        service.wait_for_job(arns[0])
        killed = arns[1].rpartition("/")[2]
        for attempt in (1, 2):
            folder = service.data_dir / "work" / killed / str(attempt) / "checkpoints"
            wait_for(lambda: next(folder.glob("step-*"), None), 300.0, str(folder))  # noqa: B023
            os.kill(service.process(ATTEMPT).pid, signal.SIGKILL)
        job = service.wait_for_job(arns[1])
        assert job["status"] == "Completed", job.get("failureMessage")
        assert service.progress(arns[1])["attempt"] == 3
        log = next((service.data_dir / "logs" / "jobs").glob(f"{killed}*")).read_text()
        assert log.count("going on after step") == 2

        adapters = (service.data_dir / "models" / "custom").rglob("adapter_model.safetensors")
        assert len({file.read_bytes() for file in adapters}) == 1
        for name in ("training_artifacts/step_wise_training_metrics.csv", VALIDATION_METRICS):
            found = {_output(service, bucket, arn, name) for arn in arns}
            assert len(found) == 1
        # The attempt cleans up after it has ended its job, so a moment later.
        left = service.data_dir / "work" / killed
        wait_for(lambda: None if left.exists() else "gone", 30.0, f"{left} to be gone")
    finally:
        service.stop()


def _output(service: Service, bucket: str, arn: str, name: str) -> bytes:
    job = service.job(arn)
    prefix = job["outputDataConfig"]["s3Uri"].partition(f"s3://{bucket}/")[2].strip("/")
    key = f"{prefix}/model-customization-job-{arn.rpartition('/')[2]}/{name}"
    body: bytes = service.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
    return body


def test_jobs_survive_the_death_of_the_whole_service(own_service: Service) -> None:
    bucket = new_bucket(own_service, "kept")
    arn = own_service.create_job(bucket, "kept", hyperParameters=SOME_STEPS)
    own_service.wait_for_step(arn)
    attempt = own_service.process(ATTEMPT).pid
    own_service.kill()
    wait_for(lambda: not _lives(attempt), 10.0, "the attempt to end with the service")
    own_service.start()
    _check_completed_once(own_service, arn)


def test_jobs_go_on_after_an_orderly_stop_and_start(
    own_service: Service, record_property: Callable[[str, object], None]
) -> None:
    bucket = new_bucket(own_service, "kept")
    arn = own_service.create_job(bucket, "kept", hyperParameters=SOME_STEPS)
    throughput = in_service(own_service, "kept", f"{TITAN}:0:8k")
    own_service.wait_for_step(arn)
    attempt, pid = own_service.process(ATTEMPT).pid, own_service.pid
    seconds = own_service.stop()
    record_property("seconds from SIGTERM to the end", round(seconds, 2))
    assert seconds < STOP_SECONDS
    assert not _lives(attempt)
    assert not _lives(pid)
    assert own_service.start() < 60.0
    _check_completed_once(own_service, arn)
    found = own_service.client("bedrock").get_provisioned_model_throughput(
        provisionedModelId=throughput
    )
    assert found["status"] == "InService"
    objects = own_service.client("s3").list_objects_v2(Bucket=bucket)["Contents"]
    assert {"train.jsonl", "validation.jsonl"} <= {item["Key"] for item in objects}


def test_a_killed_gateway_comes_back_where_its_clients_look_for_it(own_service: Service) -> None:
    pid = own_service.process(GATEWAY).pid
    os.kill(pid, signal.SIGKILL)

    def answers() -> bool:
        try:
            return bool(own_service.client("sts").get_caller_identity())
        except (ConnectionClosedError, EndpointConnectionError):
            return False

    wait_for(answers, 30.0, "the gateway to answer on the port that it chose at first")
    assert own_service.process(GATEWAY).pid != pid


def test_an_idle_model_server_is_unloaded_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    idle = Service(tmp_path_factory.mktemp("idle") / "data", OUTCROP_MODEL_IDLE_SECONDS="1")
    idle.start()
    try:
        assert idle.processes(MODEL_SERVER) == [], "nothing is loaded before it is asked for"
        before = ask_base(idle)
        wait_for(lambda: not idle.processes(MODEL_SERVER), 30.0, "the model server to be unloaded")
        assert ask_base(idle) == before
        body = json.dumps({"prompt": "Hello", "max_gen_len": 2})
        runtime = idle.client("bedrock-runtime", attempts=8)
        assert runtime.invoke_model(modelId=LLAMA, body=body)["body"].read()
    finally:
        idle.stop()


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that only waits to be reaped does not."""
    found = subprocess.run(("ps", "-o", "stat=", "-p", str(pid)), capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")
