"""The real service for tests: `outcrop serve` in a process of its own, and boto3 clients of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import botocore.session
from botocore.config import Config

import outcrop
from tests.assets.smollm2 import place_smollm2

START_SECONDS, STOP_SECONDS = 90.0, 15.0
OUTCROP = (sys.executable, "-m", "outcrop")
ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
T = TypeVar("T")


@dataclass
class Service:
    """A running service."""

    url: str
    data_dir: Path
    process: subprocess.Popen[str]
    log: Path
    variables: dict[str, str | None]
    """What `outcrop env` prints: to be set, or, where None, to be unset."""
    clients: list[Any] = field(default_factory=list)

    def client(self, name: str, *, attempts: int = 3) -> Any:
        """Return a boto3 client that speaks to the service, with so many attempts a call."""
        options = {
            "endpoint_url": self.url,
            "aws_access_key_id": self.variables["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": self.variables["AWS_SECRET_ACCESS_KEY"],
            "region_name": self.variables["AWS_REGION"],
            "config": Config(retries={"mode": "standard", "total_max_attempts": attempts}),
        }
        if name == "outcrop":
            made: Any = outcrop.client(**options)
        else:
            made = botocore.session.Session().create_client(name, **options)
        self.clients.append(made)
        return made

    def environment(self) -> dict[str, str]:
        """Return our own environment as it is after `eval "$(outcrop env)"`."""
        result = dict(os.environ)
        for name, value in self.variables.items():
            result.pop(name, None)
            if value is not None:
                result[name] = value
        return result

    def pid_of(self, part: str) -> int:
        """Return the process id of a part of the service, as its log says."""
        found = re.findall(rf"{part} started, pid (\d+)", self.log.read_text(encoding="utf-8"))
        assert found, f"{part} was never started"
        return int(found[-1])

    def stop(self, number: int = signal.SIGTERM) -> float:
        """End the service and return how many seconds that took."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        started = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
        return time.monotonic() - started


def start_service(data_dir: Path, *arguments: str, **settings: str) -> Service:
    """Start `outcrop serve` and wait until all of it answers.

    `settings` are set by their environment variables: `max_job_attempts="2"`.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    place_smollm2(data_dir)
    log = data_dir / "serve.log"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OUTCROP_")}
    set_here = {f"OUTCROP_{name.upper()}": value for name, value in settings.items()}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            (*OUTCROP, "serve", "--port", "0", "--data-dir", str(data_dir), *arguments),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=ours | set_here,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("ready "):
        process.kill()
        process.wait()
        process.stdout.close()
        raise AssertionError(f"the service did not start:\n{log.read_text(encoding='utf-8')}")
    answer = subprocess.run(
        (*OUTCROP, "env", "--data-dir", str(data_dir), "--shell", "json"),
        capture_output=True,
        text=True,
        check=True,
        env=ours,
    )
    return Service(line.split()[1], data_dir, process, log, json.loads(answer.stdout))


def until(look: Callable[[], T | None], seconds: float = 60.0, what: str = "it") -> T:
    """Look again and again until something other than None or False is found."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.1)


def write_records(path: Path, number: int, start: int = 0) -> Path:
    """Write records of a small task: the base model does not know these answers."""
    lines = [
        json.dumps({"prompt": f"Which shelf holds part {n}?", "completion": f"Shelf S-{n % 7}"})
        for n in range(start, start + number)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def job_request(name: str, bucket: str, **changes: Any) -> dict[str, Any]:
    """Return the published example's request for a job, with what a test changes in it."""
    request = {
        "customizationType": "FINE_TUNING",
        "jobName": name,
        "customModelName": f"{name}-model",
        "roleArn": ROLE,
        "baseModelIdentifier": "cohere.command-light-text-v14:7:4k",
        "hyperParameters": {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"},
        "trainingDataConfig": {"s3Uri": f"s3://{bucket}/train.jsonl"},
        "validationDataConfig": {"validators": [{"s3Uri": f"s3://{bucket}/validation.jsonl"}]},
        "outputDataConfig": {"s3Uri": f"s3://{bucket}/output"},
    }
    return request | changes


def wait_for_job(bedrock: Any, identifier: str, seconds: float = 200.0) -> dict[str, Any]:
    """Poll a job until it has ended and return its description."""

    def ended() -> dict[str, Any] | None:
        job: dict[str, Any] = bedrock.get_model_customization_job(jobIdentifier=identifier)
        return None if job["status"] in ("InProgress", "Stopping") else job

    return until(ended, seconds, f"the end of job {identifier}")


def wait_in_service(bedrock: Any, identifier: str, seconds: float = 90.0) -> dict[str, Any]:
    """Poll a provisioned throughput until it can be invoked and return its description."""

    def in_service() -> dict[str, Any] | None:
        found: dict[str, Any] = bedrock.get_provisioned_model_throughput(
            provisionedModelId=identifier
        )
        assert found["status"] != "Failed", found
        return found if found["status"] == "InService" else None

    return until(in_service, seconds, f"InService of {identifier}")


def invoke(runtime: Any, model_id: str, body: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Invoke a model; returns the body of the answer and the response's headers."""
    response = runtime.invoke_model(modelId=model_id, body=json.dumps(body))
    return json.loads(response["body"].read()), response["ResponseMetadata"]["HTTPHeaders"]


def titan(text: str, **config: Any) -> dict[str, Any]:
    """Return a Titan body: greedy and short unless told otherwise."""
    return {
        "inputText": text,
        "textGenerationConfig": {"temperature": 0, "maxTokenCount": 16} | config,
    }
