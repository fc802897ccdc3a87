"""Inputs against the constraints of their shapes."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.model import Shape

from outcrop.errors import ValidationException
from outcrop.wire.model import service_model
from outcrop.wire.validate import validate

ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
CREATE: dict[str, Any] = {
    "jobName": "job-1",
    "customModelName": "model-1",
    "roleArn": ROLE,
    "baseModelIdentifier": "amazon.titan-text-express-v1:0:8k",
    "trainingDataConfig": {"s3Uri": "s3://bucket/train.jsonl"},
    "outputDataConfig": {"s3Uri": "s3://bucket/output/"},
    "hyperParameters": {"epochCount": "1"},
}


def _shape(name: str, service: str = "bedrock") -> Shape:
    return service_model(service).shape_for(name)


def _refused(shape: Shape, params: dict[str, Any]) -> str:
    with pytest.raises(ValidationException) as caught:
        validate(shape, params)
    return caught.value.message


def _create(**changes: Any) -> str:
    params = {key: value for key, value in (CREATE | changes).items() if value is not None}
    return _refused(_shape("CreateModelCustomizationJobRequest"), params)


def test_a_valid_input_passes() -> None:
    validate(_shape("CreateModelCustomizationJobRequest"), CREATE)


def test_the_wording_is_that_of_aws() -> None:
    assert _create(jobName=None) == (
        "1 validation error detected: Value null at 'jobName' failed to satisfy constraint: "
        "Member must not be null"
    )
    assert _create(jobName="a b") == (
        "1 validation error detected: Value 'a b' at 'jobName' failed to satisfy constraint: "
        "Member must satisfy regular expression pattern: "
        "[a-zA-Z0-9](-*[a-zA-Z0-9\\+\\-\\.])*"
    )
    assert _create(jobName="a" * 64) == (
        f"1 validation error detected: Value '{'a' * 64}' at 'jobName' failed to satisfy "
        "constraint: Member must have length less than or equal to 63"
    )
    assert _create(customizationType="TUNING").startswith(
        "1 validation error detected: Value 'TUNING' at 'customizationType' failed to satisfy "
        "constraint: Member must satisfy enum value set: [FINE_TUNING, CONTINUED_PRE_TRAINING, "
    )
    message = _create(jobName="", roleArn="x")
    assert message.startswith("3 validation errors detected: ")
    assert "Member must have length greater than or equal to 1" in message
    assert message.count("; Value '") == 2


def test_nested_members_are_named_by_their_path() -> None:
    assert "at 'trainingDataConfig.s3Uri'" in _create(trainingDataConfig={"s3Uri": "x"})
    assert "Value null at 'outputDataConfig.s3Uri'" in _create(outputDataConfig={})
    tags = [{"key": "a", "value": "b"}, {"key": "", "value": "b"}]
    assert "at 'jobTags.2.member.key'" in _create(jobTags=tags)
    assert "Value null at 'jobTags.1.member' " in _create(jobTags=[None])
    assert "Value null at 'hyperParameters.a' " in _create(hyperParameters={"a": None})
    subnets = {"subnetIds": ["subnet!"], "securityGroupIds": ["sg-1"]}
    assert "Value 'subnet!' at 'vpcConfig.subnetIds.1.member'" in _create(vpcConfig=subnets)


def test_lists_and_maps_have_their_sizes() -> None:
    message = _create(validationDataConfig={"validators": [{"s3Uri": "s3://bucket/x"}] * 11})
    assert "at 'validationDataConfig.validators' failed" in message
    assert "Member must have length less than or equal to 10" in message
    subnets: dict[str, Any] = {"subnetIds": [], "securityGroupIds": ["sg-1"]}
    assert "length greater than or equal to 1" in _create(vpcConfig=subnets)
    metadata = _shape("ConverseRequest", "bedrock-runtime").members["requestMetadata"]
    assert "'.key'" in _refused(metadata, {"é": "x"})
    assert "length greater than or equal to 1" in _refused(metadata, {})


def test_numbers_have_their_range() -> None:
    shape = _shape("ListModelCustomizationJobsRequest")
    assert _refused(shape, {"maxResults": 0}).endswith(
        "Value '0' at 'maxResults' failed to satisfy constraint: Member must have value greater "
        "than or equal to 1"
    )
    assert "Member must have value less than or equal to 1000" in _refused(
        shape, {"maxResults": 1001}
    )
    config = _shape("InferenceConfiguration", "bedrock-runtime")
    assert "at 'temperature'" in _refused(config, {"temperature": 1.5})
    validate(config, {"temperature": 1, "topP": 0.5, "maxTokens": 1})


def test_a_union_has_exactly_one_member() -> None:
    shape = _shape("CountTokensInput", "bedrock-runtime")
    body = {"invokeModel": {"body": b"x"}}
    validate(shape, body)
    assert "found none" in _refused(shape, {})
    assert "found invokeModel, converse" in _refused(shape, body | {"converse": {}})
    assert "[invokeModel, converse]" in _refused(shape, {})


@pytest.mark.parametrize(
    ("shape", "value", "kind"),
    [
        ("JobName", 5, "string"),
        ("CustomizationType", b"x", "string"),
        ("MaxResults", "5", "integer"),
        ("MaxResults", True, "integer"),
        ("TagList", {}, "list"),
        ("ModelCustomizationHyperParameters", [], "map"),
        ("VpcConfig", "x", "structure"),
        ("Timestamp", "2026-01-01", "timestamp"),
    ],
)
def test_a_value_of_another_type_is_refused(shape: str, value: Any, kind: str) -> None:
    assert f"Member must be of type {kind}" in _refused(_shape(shape), value)


def test_documents_are_free_and_times_are_times() -> None:
    fields = _shape("ConverseRequest", "bedrock-runtime").members["additionalModelRequestFields"]
    validate(fields, {"anything": [None, {"at": 1}]})
    validate(_shape("Timestamp"), datetime.now(UTC))  # type: ignore[arg-type]


def test_sensitive_values_and_bytes_are_not_quoted() -> None:
    body = _shape("InvokeModelRequest", "bedrock-runtime")
    message = _refused(body, {"modelId": "!", "body": "not bytes"})
    assert "Value at 'body' failed" in message
    assert "not bytes" not in message


def test_messages_stay_short_whatever_is_sent() -> None:
    tags = [{"key": "é" * 5000, "value": "b" * 100_000}] * 3000
    started = time.perf_counter()
    message = _create(jobTags=tags, jobName="a" * 1_000_000)
    assert time.perf_counter() - started < 2
    assert len(message) < 10_000
    assert "and 599" in message
    assert "..." in message


def test_a_value_that_is_too_long_is_refused_before_it_is_matched() -> None:
    started = time.perf_counter()
    message = _create(jobName="-" * 25_000_000)
    assert time.perf_counter() - started < 1
    assert "pattern" not in message


def test_a_pattern_that_no_reader_knows_does_not_refuse_everything() -> None:
    shape = Shape("New", {"type": "string", "pattern": "(?=a)x"})
    validate(shape, "anything")  # type: ignore[arg-type]
