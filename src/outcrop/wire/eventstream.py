"""Frames of `application/vnd.amazon.eventstream`.

Turns events and errors of a streamed output into the bytes that every AWS SDK reads. Knows no
operation by name, and nothing of when a frame is sent.
Source: Smithy 2.0, "Amazon Event Stream Specification".
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

from botocore.model import OperationModel, Shape

from outcrop.errors import ApiError
from outcrop.wire.model import stream_member, wire_name
from outcrop.wire.serialize import dump_json, to_json

MAX_PAYLOAD_BYTES = 16 * 1024 * 1024
"""The largest payload of one frame. botocore refuses a longer one (24 MiB in some versions)."""

_STRING = 7
_MAX_NAME_BYTES = 255
_MAX_VALUE_BYTES = 32767


def encode_event(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return one frame with string headers.

    Raises:
        ValueError: a header or the payload is longer than a frame can hold.
    """
    block = b"".join(_header(name, value) for name, value in headers.items())
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {len(payload)} bytes; {MAX_PAYLOAD_BYTES} fit a frame")
    prelude = struct.pack("!II", 16 + len(block) + len(payload), len(block))
    message = b"".join((prelude, struct.pack("!I", zlib.crc32(prelude)), block, payload))
    return message + struct.pack("!I", zlib.crc32(message))


def event_message(operation: OperationModel, event: str, members: Mapping[str, Any]) -> bytes:
    """Return the frame of one event of an operation's output stream.

    Args:
        event: the member of the stream's union, such as `contentBlockDelta`.
        members: the event's members by their name in the model.
    Raises:
        KeyError: the stream has no such event.
    """
    shape = _stream(operation).members[event]
    headers = {
        ":event-type": event,
        ":content-type": "application/json",
        ":message-type": "event",
    }
    return encode_event(headers, dump_json(to_json(shape, members)))


def lists_error(operation: OperationModel, code: str) -> bool:
    """Say whether an error is one of those that an operation's stream can end in."""
    return any(
        shape.metadata.get("exception") and shape.name == code
        for shape in _stream(operation).members.values()
    )


def exception_message(operation: OperationModel, error: ApiError) -> bytes:
    """Return the last frame of a stream that ends in an error.

    An error that the stream's model lists becomes an exception of its member's name; any other
    becomes an error frame with its code. botocore raises EventStreamError for both.
    """
    for name, shape in _stream(operation).members.items():
        if shape.metadata.get("exception") and shape.name == error.code:
            document: dict[str, Any] = {"message": error.message}
            for key, member in shape.members.items():
                value = error.members.get(key)
                if key != "message" and value is not None:
                    document[wire_name(member, key)] = to_json(member, value)
            headers = {
                ":exception-type": name,
                ":content-type": "application/json",
                ":message-type": "exception",
            }
            return encode_event(headers, dump_json(document))
    message = error.message.encode("utf-8")[:_MAX_VALUE_BYTES].decode("utf-8", "ignore")
    return encode_event(
        {":error-code": error.code, ":error-message": message, ":message-type": "error"}, b""
    )


def _stream(operation: OperationModel) -> Shape:
    name = stream_member(operation, output=True)
    if name is None:
        raise ValueError(f"the output of {operation.name} has no event stream")
    return operation.output_shape.members[name]


def _header(name: str, value: str) -> bytes:
    name_bytes, value_bytes = name.encode("utf-8"), value.encode("utf-8")
    if not 0 < len(name_bytes) <= _MAX_NAME_BYTES or len(value_bytes) > _MAX_VALUE_BYTES:
        raise ValueError(f"the header {name!r:.100} is too long for a frame")
    return b"".join(
        (
            bytes([len(name_bytes)]),
            name_bytes,
            bytes([_STRING]),
            struct.pack("!H", len(value_bytes)),
            value_bytes,
        )
    )
