"""Frames; whole streams are read by botocore in tests/protocol."""

from __future__ import annotations

import struct
import zlib

import pytest
from botocore.eventstream import EventStreamBuffer
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError, ModelStreamErrorException
from outcrop.wire.eventstream import (
    MAX_PAYLOAD_BYTES,
    encode_event,
    event_message,
    exception_message,
    lists_error,
)
from outcrop.wire.model import service_model

STREAM = service_model("bedrock-runtime").operation_model("InvokeModelWithResponseStream")


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    ),
    st.binary(max_size=1000),
)
def test_a_frame_reads_back_and_its_sums_are_right(headers: dict[str, str], payload: bytes) -> None:
    frame = encode_event(headers, payload)
    total, head = struct.unpack("!II", frame[:8])
    assert total == len(frame)
    assert len(frame) == 16 + head + len(payload)
    assert struct.unpack("!I", frame[8:12])[0] == zlib.crc32(frame[:8])
    assert struct.unpack("!I", frame[-4:])[0] == zlib.crc32(frame[:-4])
    buffer = EventStreamBuffer()
    buffer.add_data(frame)
    (message,) = list(buffer)
    assert message.headers == headers
    assert message.payload == payload


def test_what_does_not_fit_a_frame_is_refused() -> None:
    for headers in ({"": "x"}, {"n" * 256: "x"}, {"n": "x" * 32768}):
        with pytest.raises(ValueError, match="too long"):
            encode_event(headers, b"")
    with pytest.raises(ValueError, match="payload"):
        encode_event({}, bytes(MAX_PAYLOAD_BYTES + 1))
    with pytest.raises(KeyError):
        event_message(STREAM, "noSuchEvent", {})
    with pytest.raises(ValueError, match="no event stream"):
        event_message(service_model("bedrock").operation_model("GetCustomModel"), "chunk", {})


def test_a_chunk_is_base64_in_json() -> None:
    buffer = EventStreamBuffer()
    buffer.add_data(event_message(STREAM, "chunk", {"bytes": b"hi", "p": "unmodelled"}))
    (message,) = list(buffer)
    assert message.payload == b'{"bytes":"aGk="}'
    assert message.headers == {
        ":event-type": "chunk",
        ":message-type": "event",
        ":content-type": "application/json",
    }


def test_an_error_of_the_stream_carries_its_members() -> None:
    error = ModelStreamErrorException("Broke.", members={"originalStatusCode": 500, "other": 1})
    buffer = EventStreamBuffer()
    buffer.add_data(exception_message(STREAM, error))
    (message,) = list(buffer)
    assert message.payload == b'{"message":"Broke.","originalStatusCode":500}'
    assert message.headers[":exception-type"] == "modelStreamErrorException"


def test_a_stream_lists_its_own_errors_and_no_other() -> None:
    converse = service_model("bedrock-runtime").operation_model("ConverseStream")
    for code in ("ModelStreamErrorException", "ThrottlingException", "ValidationException"):
        assert lists_error(STREAM, code)
        assert lists_error(converse, code)
    assert lists_error(STREAM, "ModelTimeoutException")
    assert not lists_error(converse, "ModelTimeoutException")
    assert not lists_error(STREAM, "ModelErrorException")
    assert not lists_error(STREAM, "PayloadPart")


def test_an_endless_message_is_cut_to_what_a_header_holds() -> None:
    buffer = EventStreamBuffer()
    buffer.add_data(exception_message(STREAM, ApiError("é" * 40_000, code="Strange")))
    (message,) = list(buffer)
    assert message.headers[":error-code"] == "Strange"
    assert set(message.headers[":error-message"]) == {"é"}
