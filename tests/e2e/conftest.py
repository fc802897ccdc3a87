"""One real service for all tests that change nothing of it, and what it takes a while to make."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from tests.e2e.service import PUBLISHED, Service, ask_base, in_service, job_request, new_bucket

_NUMBERS = itertools.count(1)


@dataclass(frozen=True)
class Tuned:
    """One completed job and what was seen on its way."""

    bucket: str
    request: dict[str, Any]
    arn: str
    created: dict[str, Any]
    """What GetModelCustomizationJob answered right after the creation."""
    base_answer: bytes
    """What the base model answered to `ask_base` before the job."""
    job: dict[str, Any]
    """What GetModelCustomizationJob answers at the end."""

    @property
    def folder(self) -> str:
        """The key below which the job wrote."""
        return f"out/model-customization-job-{self.arn.rpartition('/')[2]}/"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The shared service: one job at a time, whatever the machine has."""
    environment = {"OUTCROP_JOB_SLOTS": "1", "OUTCROP_INVOCATION_LOG_SECONDS": "1"}
    running = Service(tmp_path_factory.mktemp("service") / "data", **environment)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def own_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for one test that ends parts of it."""
    own = Service(tmp_path_factory.mktemp("own") / "data", OUTCROP_JOB_SLOTS="1")
    own.start()
    yield own
    if own.running:
        own.stop()


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"e2e-{next(_NUMBERS)}"


@pytest.fixture
def bucket(service: Service, name: str) -> str:
    """A bucket with training and validation records."""
    return new_bucket(service, f"{name}-bucket")


@pytest.fixture(scope="session")
def tuned(service: Service) -> Tuned:
    """One completed job of the published form on 24 short records."""
    bucket = new_bucket(service, "tuned-bucket")
    base_answer = ask_base(service)
    request = job_request(
        bucket,
        "tuned-job",
        customModelName="tuned-model",
        clientRequestToken="tuned-token",
        jobTags=[{"key": "team", "value": "geology"}],
        customModelTags=[{"key": "kind", "value": "first"}],
        hyperParameters={**PUBLISHED, "learningRate": "0.0001"},
    )
    arn = service.client("bedrock").create_model_customization_job(**request)["jobArn"]
    created = service.job(arn)
    job = service.wait_for_job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    return Tuned(bucket, request, arn, created, base_answer, job)


@pytest.fixture(scope="session")
def throughput(service: Service, tuned: Tuned) -> str:
    """The ARN of a throughput of the custom model that is InService."""
    return in_service(service, "tuned-throughput", tuned.job["outputModelArn"])


@pytest.fixture
def drop_throughput(service: Service) -> Iterator[Callable[[str], None]]:
    """Takes names of throughputs that are deleted when the test ends."""
    names: list[str] = []
    yield names.append
    bedrock = service.client("bedrock")
    for name in names:
        bedrock.delete_provisioned_model_throughput(provisionedModelId=name)
