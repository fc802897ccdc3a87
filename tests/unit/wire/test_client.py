"""The boto3 client for our own operations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from outcrop.errors import SettingsError
from outcrop.wire.client import outcrop_client
from outcrop.wire.model import service_model

JOB = "arn:aws:bedrock:us-east-1:123456789012:model-customization-job/a.b:1:8k/abcabcabcabc"


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:7070",
    }.items():
        monkeypatch.setenv(name, value)


def _answer(body: bytes) -> tuple[Any, list[Any]]:
    """Return a handler that answers instead of the network, and the requests it saw."""
    seen: list[Any] = []

    class Raw:
        def stream(self, *_: object, **__: object) -> Any:
            yield body

    def handler(request: Any, **_: object) -> AWSResponse:
        seen.append(request)
        return AWSResponse(request.url, 200, {}, Raw())

    return handler, seen


@pytest.mark.usefixtures("_environment")
def test_it_calls_the_configured_endpoint_and_signs_for_bedrock() -> None:
    client = outcrop_client()
    handler, seen = _answer(b'{"jobArn":"a","status":"InProgress","queuePosition":2}')
    client.meta.events.register("before-send.outcrop.*", handler)
    answer = client.get_job_progress(jobIdentifier=JOB)
    assert (answer["status"], answer["queuePosition"]) == ("InProgress", 2)
    assert seen[0].url == (
        "http://127.0.0.1:7070/outcrop/v1/jobs/arn%3Aaws%3Abedrock%3Aus-east-1%3A123456789012%3A"
        "model-customization-job%2Fa.b%3A1%3A8k%2Fabcabcabcabc/progress"
    )
    assert b"/us-east-1/bedrock/aws4_request" in seen[0].headers["Authorization"]


@pytest.mark.usefixtures("_environment")
def test_events_are_paged() -> None:
    client = outcrop_client()
    handler, seen = _answer(b'{"events":[]}')
    client.meta.events.register("before-send.outcrop.*", handler)
    pages = client.get_paginator("list_job_events").paginate(
        jobIdentifier="job", PaginationConfig={"PageSize": 5}
    )
    assert pages.build_full_result() == {"events": []}
    assert seen[0].url.endswith("/outcrop/v1/jobs/job/events?maxResults=5")


@pytest.mark.usefixtures("_environment")
def test_metrics_are_paged_with_both_of_their_lists() -> None:
    client = outcrop_client()
    handler, seen = _answer(b'{"jobArn":"a","status":"Stopped","steps":[],"validations":[]}')
    client.meta.events.register("before-send.outcrop.*", handler)
    pages = client.get_paginator("get_job_metrics").paginate(
        jobIdentifier="job", sinceStep=7, PaginationConfig={"PageSize": 5}
    )
    assert pages.build_full_result() == {
        "jobArn": "a",
        "status": "Stopped",
        "steps": [],
        "validations": [],
    }
    assert seen[0].url.endswith("/outcrop/v1/jobs/job/metrics?sinceStep=7&maxResults=5")


@pytest.mark.usefixtures("_environment")
def test_without_an_endpoint_nothing_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL"):
        outcrop_client()
    client = outcrop_client(endpoint_url="http://127.0.0.1:1", region_name="eu-west-1")
    assert client.meta.endpoint_url == "http://127.0.0.1:1"


def test_our_model_has_the_shape_of_bedrocks() -> None:
    ours, bedrock = service_model("outcrop"), service_model("bedrock")
    assert ours.signing_name == bedrock.signing_name == "bedrock"
    assert set(ours.operation_names) >= {"GetJobMetrics", "GetJobProgress", "ListJobEvents"}
    for name in ours.operation_names:
        operation = ours.operation_model(name)
        assert operation.http["requestUri"].startswith("/outcrop/v1/")
        for shape in operation.error_shapes:
            theirs = bedrock.shape_for(shape.name)
            assert shape.metadata == theirs.metadata
            assert list(shape.members) == list(theirs.members)
        for shape in (operation.input_shape, operation.output_shape):
            assert all(member.documentation for member in shape.members.values())
    job, theirs = (
        ours.shape_for("JobIdentifier"),
        bedrock.shape_for("ModelCustomizationJobIdentifier"),
    )
    assert job.metadata == theirs.metadata


def test_the_room_imports_neither_torch_nor_boto3() -> None:
    code = (
        "import sys, outcrop.wire.parse, outcrop.wire.validate, outcrop.wire.serialize, "
        "outcrop.wire.eventstream, outcrop.wire.sigv4, outcrop.wire.chunked\n"
        "print(sorted({'torch', 'transformers', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
