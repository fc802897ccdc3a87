"""botocore as the oracle: what its client sends we read, and what we send its client reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from botocore.exceptions import EventStreamError
from botocore.model import OperationModel, Shape
from tests.protocol.values import Values
from tests.protocol.wires import OPERATIONS, Frames, receive, send

from outcrop.errors import ApiError
from outcrop.wire.eventstream import event_message, exception_message
from outcrop.wire.model import service_model, stream_member
from outcrop.wire.parse import parse_query_request, parse_request
from outcrop.wire.route import match
from outcrop.wire.serialize import serialize_error, serialize_output
from outcrop.wire.validate import validate

FILLINGS = [(0.0, 1), (0.3, 2), (0.7, 2), (1.0, 1)]
"""Shares of optional members that are present, and how often each is tried."""

STREAMED = [
    (service, name)
    for service, name in OPERATIONS
    if stream_member(service_model(service).operation_model(name), output=True)
]


def _operation(service: str, name: str) -> OperationModel:
    return service_model(service).operation_model(name)


def _without_empty(shape: Shape, value: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what HTTP cannot tell from absent: an empty payload."""
    payload = shape.serialization.get("payload")
    return {key: item for key, item in value.items() if key != payload or item != b""}


def _can_be_sent(service: str, value: Any) -> bool:
    """Say whether a protocol can tell a value from an absent one: forms have no empty structure."""
    if service != "sts":
        return True
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value != {} and all(_can_be_sent(service, item) for item in items)


SENDABLE = [pair for pair in OPERATIONS if pair[1] != "InvokeModelWithBidirectionalStream"]
"""All but the one whose input is an event stream, which botocore cannot send."""


@pytest.mark.parametrize(("service", "name"), SENDABLE)
def test_what_botocore_sends_is_read_back(service: str, name: str) -> None:
    operation = _operation(service, name)
    for optional, count in FILLINGS:
        for number in range(count):
            values = Values((service, name, optional, number), optional)
            shape = operation.input_shape
            drawn = values.draw(shape) if shape is not None else {}
            params = {name: item for name, item in drawn.items() if _can_be_sent(service, item)}
            if shape is not None and not set(shape.required_members) <= params.keys():
                continue
            sent = send(operation, params)
            if service == "sts":
                found, parsed = parse_query_request(service_model("sts"), sent.body)
                assert found.name == name
            else:
                route = match(sent.method, sent.raw_path)
                assert (route.service, route.operation.name) == (service, name)
                parsed = parse_request(
                    route, query=sent.query, headers=sent.headers, body=sent.body
                )
            if shape is None:
                assert parsed == {}
                continue
            assert parsed == _without_empty(shape, params)
            validate(shape, parsed)


def test_the_operation_botocore_cannot_send_is_routed_and_parsed() -> None:
    path = "/model/arn%3Aaws%3Aa%2Fb/invoke-with-bidirectional-stream"
    route = match("POST", path)
    assert route.operation.name == "InvokeModelWithBidirectionalStream"
    parsed = parse_request(route, query="", headers={}, body=b"\x00\x01 not JSON")
    assert parsed == {"modelId": "arn:aws:a/b"}


@pytest.mark.parametrize(("service", "name"), OPERATIONS)
def test_what_we_send_botocore_reads_back(service: str, name: str) -> None:
    operation = _operation(service, name)
    for optional, count in FILLINGS:
        for number in range(count):
            values = Values((service, name, "out", optional, number), optional)
            shape = operation.output_shape
            output = values.draw(shape) if shape is not None else {}
            reply = serialize_output(operation, output | {"noSuchMember": 1}, "request-1")
            assert reply.status == operation.http.get("responseCode", 200)
            streamed = stream_member(operation, output=True)
            parsed = receive(operation, reply, stream=Frames(b"") if streamed else None)
            metadata = parsed.pop("ResponseMetadata")
            assert metadata["HTTPStatusCode"] == reply.status
            assert metadata["RequestId"] == "request-1"
            if streamed:
                assert list(parsed.pop(streamed)) == []
            payload = shape.serialization.get("payload") if shape is not None else None
            if payload and not streamed and shape.members[payload].type_name == "blob":
                parsed[payload] = parsed[payload].read()
            assert parsed == output


@pytest.mark.parametrize(("service", "name"), OPERATIONS)
def test_every_modelled_error_arrives_typed(service: str, name: str) -> None:
    operation = _operation(service, name)
    for shape in operation.error_shapes:
        values = Values((service, name, shape.name), 1.0)
        members = values.draw(shape)
        members.pop("message", None)
        code = shape.metadata["error"].get("code", shape.name)
        status = shape.metadata["error"]["httpStatusCode"]
        error = ApiError('It "broke": <ünïcode> & more\n', code=code, http_status=status)
        error.members.update(members)
        reply = serialize_error(service, error, "request-2", operation)
        parsed = receive(operation, reply)
        assert parsed["Error"]["Code"] == code
        assert parsed["Error"]["Message"].strip() == error.message.strip()
        assert parsed["ResponseMetadata"]["RequestId"] == "request-2"
        assert parsed["ResponseMetadata"]["HTTPStatusCode"] == status
        assert {key: parsed[key] for key in members} == members


@pytest.mark.parametrize("service", ["bedrock", "bedrock-runtime", "sts", "outcrop"])
def test_errors_that_no_model_lists_arrive_with_their_code(service: str) -> None:
    operation = _operation(*next(pair for pair in OPERATIONS if pair[0] == service))
    error = ApiError("Not here.", code="NotImplemented", http_status=501)
    parsed = receive(operation, serialize_error(service, error, "request-3"))
    assert parsed["Error"]["Code"] == "NotImplemented"
    assert parsed["Error"]["Message"] == "Not here."
    assert parsed["ResponseMetadata"] == parsed["ResponseMetadata"] | {
        "HTTPStatusCode": 501,
        "RequestId": "request-3",
    }


@pytest.mark.parametrize(("service", "name"), STREAMED)
def test_every_event_of_a_stream_arrives_in_order(service: str, name: str) -> None:
    operation = _operation(service, name)
    streamed = stream_member(operation, output=True)
    assert streamed is not None
    shape = operation.output_shape.members[streamed]
    events: list[dict[str, Any]] = []
    for event, member in shape.members.items():
        if member.metadata.get("exception"):
            continue
        for optional in (0.0, 0.5, 1.0):
            values = Values((name, event, optional), optional)
            events.append({event: values.draw(member)})
    data = b"".join(
        event_message(operation, event, members)
        for item in events
        for event, members in item.items()
    )
    reply = serialize_output(operation, {}, "request-4")
    parsed = receive(operation, reply, stream=Frames(data))
    assert len(events) >= 3
    assert list(parsed[streamed]) == events


@pytest.mark.parametrize(("service", "name"), STREAMED)
def test_every_error_in_a_stream_ends_it_with_its_code(service: str, name: str) -> None:
    operation = _operation(service, name)
    streamed = stream_member(operation, output=True)
    assert streamed is not None
    shape = operation.output_shape.members[streamed]
    modelled = {
        member.name: event
        for event, member in shape.members.items()
        if member.metadata.get("exception")
    }
    assert "ModelStreamErrorException" in modelled
    for code in [*modelled, "SomethingUnheardOf"]:
        frame = exception_message(operation, ApiError("Bröken", code=code))
        parsed = receive(
            operation, serialize_output(operation, {}, "request-5"), stream=Frames(frame)
        )
        with pytest.raises(EventStreamError) as caught:
            list(parsed[streamed])
        assert caught.value.response["Error"]["Code"] == modelled.get(code, code)
        assert "Bröken" in str(caught.value)
