"""One service, one bucket and one trained model for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.service import (
    Service,
    invoke,
    job_request,
    start_service,
    titan,
    wait_for_job,
    wait_in_service,
    write_records,
)

QUESTIONS = ("Which shelf holds part 3?", "Name a colour.", "What is the capital of France?")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service that the tests share; what a test makes in it has names of its own."""
    running = start_service(tmp_path_factory.mktemp("service") / "data")
    yield running
    running.stop()


@pytest.fixture(scope="session")
def s3(service: Service) -> Any:
    """An S3 client."""
    return service.client("s3")


@pytest.fixture(scope="session")
def bedrock(service: Service) -> Any:
    """A Bedrock client."""
    return service.client("bedrock")


@pytest.fixture(scope="session")
def runtime(service: Service) -> Any:
    """A Bedrock runtime client."""
    return service.client("bedrock-runtime")


@pytest.fixture(scope="session")
def bucket(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bucket with 16 training and 8 validation records."""
    name = "shared-records"
    folder = tmp_path_factory.mktemp("records")
    s3.create_bucket(Bucket=name)
    for key, number, start in (("train.jsonl", 16, 0), ("validation.jsonl", 8, 100)):
        data = write_records(folder / key, number, start).read_bytes()
        s3.put_object(Bucket=name, Key=key, Body=data)
    return name


@dataclass(frozen=True)
class Trained:
    """A job that has completed, and what was seen on its way."""

    base_answers: list[str]
    """What the base model answered to QUESTIONS before anything was trained."""
    first_seen: dict[str, Any]
    """The job as it was described right after its creation."""
    job: dict[str, Any]
    """The job as it is described now."""

    @property
    def model_arn(self) -> str:
        """ARN of the custom model."""
        return str(self.job["outputModelArn"])


@pytest.fixture(scope="session")
def trained(bedrock: Any, runtime: Any, bucket: str) -> Trained:
    """The published example's job on Titan Text Express, run to its end."""
    base = "amazon.titan-text-express-v1"
    answers = [text_of(runtime, base, question) for question in QUESTIONS]
    request = job_request(
        "shared-job",
        bucket,
        baseModelIdentifier=base,
        hyperParameters={"epochCount": "3", "batchSize": "8", "learningRate": "0.00001"},
    )
    arn = bedrock.create_model_customization_job(**request)["jobArn"]
    first = bedrock.get_model_customization_job(jobIdentifier=arn)
    job = wait_for_job(bedrock, arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    return Trained(answers, first, job)


@pytest.fixture(scope="session")
def throughput(bedrock: Any, trained: Trained) -> str:
    """ARN of provisioned throughput of the trained model, in service."""
    arn: str = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName="shared-throughput", modelId=trained.model_arn
    )["provisionedModelArn"]
    wait_in_service(bedrock, arn)
    return arn


def text_of(runtime: Any, model_id: str, question: str) -> str:
    """Return a model's greedy answer to a question in the Titan body."""
    body, _ = invoke(runtime, model_id, titan(question))
    return str(body["results"][0]["outputText"])


@pytest.fixture
def small_files(tmp_path: Path) -> Path:
    """A folder with few records, as examples/customize.py reads them."""
    write_records(tmp_path / "training.jsonl", 8)
    write_records(tmp_path / "validation.jsonl", 4, 100)
    write_records(tmp_path / "test.jsonl", 3, 200)
    return tmp_path
