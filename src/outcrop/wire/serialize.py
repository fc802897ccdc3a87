"""An operation's output, or its error, to an HTTP reply.

Writes the members the model names and no others: as JSON, headers, raw payload, or XML for the
query protocol of STS. Errors take the form of the service that was called, S3's included. Knows no
operation by name.
Source: Smithy 2.0, "AWS restJson1 protocol" and "AWS query protocol"; Amazon S3 API Reference,
"REST error responses".
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import cache
from typing import Any
from xml.sax.saxutils import escape

from botocore.model import OperationModel, Shape

from outcrop.errors import ApiError
from outcrop.wire.model import error_shape, is_document, service_model, wire_name

EVENT_STREAM_TYPE = "application/vnd.amazon.eventstream"


@dataclass(frozen=True)
class HttpReply:
    """What goes back to the client, free of any web framework."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def serialize_output(
    operation: OperationModel,
    output: Mapping[str, Any],
    request_id: str,
    *,
    extra_headers: Mapping[str, str] | None = None,
) -> HttpReply:
    """Return the reply for an operation that succeeded.

    Members the model does not name, and members that are None, are left out. Where the output is an
    event stream, the body is empty: the frames follow it (eventstream.py).

    Args:
        output: members by their name in the model; times must be aware datetimes.
        extra_headers: headers the model does not name; they win over those it does.
    Raises:
        TypeError, ValueError: a value cannot be written as its shape: a fault of ours.
    """
    if operation.service_model.metadata["protocol"] == "query":
        reply = _query_reply(operation, output, request_id)
        reply.headers.update(extra_headers or {})
        return reply
    status = int(operation.http.get("responseCode", 200))
    headers = {"x-amzn-RequestId": request_id}
    shape = operation.output_shape
    if shape is None:
        return HttpReply(status, headers | dict(extra_headers or {}))
    payload = shape.serialization.get("payload")
    document: dict[str, Any] = {}
    for name, member in shape.members.items():
        value = output.get(name)
        if value is None:
            continue
        location = member.serialization.get("location")
        if location == "header":
            headers[wire_name(member, name)] = _header(member, value)
        elif location == "headers":
            prefix = wire_name(member, name)
            headers |= {prefix + key: _header(member.value, item) for key, item in value.items()}
        elif location == "statusCode":
            status = int(value)
        elif payload is None:
            document[wire_name(member, name)] = to_json(member, value)
    if payload is None:
        body, content_type = dump_json(document), "application/json"
    else:
        body, content_type = _payload(shape.members[payload], output.get(payload))
    if "content-type" not in {name.lower() for name in headers}:
        headers["Content-Type"] = content_type
    for name, value in (extra_headers or {}).items():
        headers = {key: old for key, old in headers.items() if key.lower() != name.lower()}
        headers[name] = _safe_header(name, value)
    return HttpReply(status, headers, body)


def serialize_error(
    service: str, error: ApiError, request_id: str, operation: OperationModel | None = None
) -> HttpReply:
    """Return the reply for an operation that failed, in the protocol of `service`.

    Args:
        service: one of `wire.model.SERVICES`, or `s3`. Any other is answered like `bedrock`.
        operation: the one that failed, where it is known; its model then lists the error's members.
    """
    if service == "s3":
        return _s3_error(error, request_id)
    if service == "sts":
        return _query_error(service, error, request_id)
    headers = {
        "x-amzn-RequestId": request_id,
        "x-amzn-ErrorType": error.code,
        "Content-Type": "application/json",
        **retry_headers(error),
    }
    document: dict[str, Any] = {"message": error.message}
    shape = (
        error_shape(service, error.code)
        if operation is None
        else operation.service_model.shape_for_error_code(error.code)
    )
    for name, member in shape.members.items() if shape is not None else ():
        value = error.members.get(name)
        if value is not None and name.lower() != "message":
            document[wire_name(member, name)] = to_json(member, value)
    return HttpReply(error.http_status, headers, dump_json(document))


def retry_headers(error: ApiError) -> dict[str, str]:
    """Return what tells a client when to ask again, where an error knows it.

    Source: botocore 1.44, retries/standard.py, reads the first, in milliseconds; its legacy mode
    reads neither. RFC 9110, section 10.2.3, has the second, in seconds.
    """
    seconds = error.members.get("retryAfterSeconds")
    if not isinstance(seconds, float | int):
        return {}
    return {
        "x-amz-retry-after": str(math.ceil(1000 * seconds)),
        "Retry-After": str(math.ceil(seconds)),
    }


# --- JSON --------------------------------------------------------------------------------------


def to_json(shape: Shape, value: Any) -> Any:
    """Return `value` as what json.dumps() writes for `shape`.

    Raises:
        TypeError: the value is not of the shape's type.
    """
    return _writer(shape)(value)


@cache
def _writer(shape: Shape) -> Callable[[Any], Any]:
    """Return what writes values of a shape, made once for each.

    A list of 1,000 jobs has 23,000 values: to look at the shape for each took twice as long.
    """
    kind = shape.type_name
    if kind == "string":
        return lambda value: value if isinstance(value, str) else _mismatch(value, str, shape)
    if kind == "structure":
        return (lambda value: value) if is_document(shape) else _structure_writer(shape)
    if kind == "list":
        write = _writer(shape.member)
        return lambda value: [write(item) for item in value]
    if kind == "map":
        return _map_writer(shape)
    if kind == "timestamp":
        form = shape.serialization.get("timestampFormat", "unixtimestamp")
        return _iso_8601 if form == "iso8601" else lambda value: _time(value, form)
    if kind == "blob":
        return lambda value: base64.b64encode(value).decode("ascii")
    if kind == "boolean":
        return lambda value: value if isinstance(value, bool) else _mismatch(value, bool, shape)
    if kind in ("integer", "long"):
        return lambda value: (
            value
            if isinstance(value, int) and not isinstance(value, bool)
            else _mismatch(value, int, shape)
        )
    assert kind in ("float", "double"), f"{shape.name} is of a new type"
    return lambda value: _number(float(value))


def _structure_writer(shape: Shape) -> Callable[[Any], Any]:
    members: list[tuple[str, str, Callable[[Any], Any]]] = []

    def write(value: Any) -> dict[str, Any]:
        if not members:  # at the first use, because a shape may hold itself
            members.extend(
                (name, wire_name(member, name), _writer(member))
                for name, member in shape.members.items()
            )
        return {
            on_wire: write_member(item)
            for name, on_wire, write_member in members
            if (item := value.get(name)) is not None
        }

    return write


def _map_writer(shape: Shape) -> Callable[[Any], Any]:
    write_key, write_value = _writer(shape.key), _writer(shape.value)
    return lambda value: {
        write_key(key): write_value(item) for key, item in value.items() if item is not None
    }


def _mismatch(value: Any, wanted: type, shape: Shape) -> Any:
    raise TypeError(
        f"{shape.name} must be {wanted.__name__}, not {type(value).__name__}: {value!r:.100}"
    )


def dump_json(document: Any) -> bytes:
    """Return JSON without white space, in UTF-8."""
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        "utf-8"
    )


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _time(value: Any, form: str) -> str | float:
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise TypeError(f"a time must be an aware datetime, not {value!r:.100}")
    value = value.astimezone(UTC)
    if form == "iso8601":
        return _iso_8601(value)
    if form == "rfc822":
        return format_datetime(value.replace(microsecond=0), usegmt=True)
    seconds: float = value.timestamp()
    return int(seconds) if seconds.is_integer() else seconds


def _iso_8601(value: Any) -> str | float:
    if isinstance(value, datetime) and value.tzinfo is UTC:
        return value.isoformat()[: -len("+00:00")] + "Z"
    return _time(value, "iso8601")


def _payload(shape: Shape, value: Any) -> tuple[bytes, str]:
    if shape.serialization.get("eventstream"):
        return b"", EVENT_STREAM_TYPE
    if shape.type_name == "blob":
        return bytes(value or b""), "application/octet-stream"
    if shape.type_name == "string":
        return (value or "").encode("utf-8"), "text/plain"
    return dump_json({} if value is None else to_json(shape, value)), "application/json"


def _header(shape: Shape, value: Any) -> str:
    if shape.serialization.get("jsonvalue"):
        return base64.b64encode(dump_json(value)).decode("ascii")
    if shape.type_name == "list":
        return ",".join(_header(shape.member, item) for item in value)
    if shape.type_name == "timestamp":
        return str(_time(value, shape.serialization.get("timestampFormat", "rfc822")))
    written = to_json(shape, value)
    if isinstance(written, bool):
        return "true" if written else "false"
    return _safe_header(shape.name, str(written))


_HEADER_TEXT = re.compile(r"[\t -~\u0080-\u00ff]*")


def _safe_header(name: str, value: str) -> str:
    if not _HEADER_TEXT.fullmatch(value):
        raise ValueError(f"the header {name} cannot hold {value!a:.100}")
    return value


# --- XML: the query protocol, and S3's errors ----------------------------------------------------

_QUERY_CODES = {
    "AccessDeniedException": "AccessDenied",
    "IncompleteSignatureException": "IncompleteSignature",
    "InternalServerException": "InternalFailure",
    "InvalidSignatureException": "SignatureDoesNotMatch",
    "MissingAuthenticationTokenException": "MissingAuthenticationToken",
    "SerializationException": "MalformedQueryString",
    "ServiceUnavailableException": "ServiceUnavailable",
    "ThrottlingException": "Throttling",
    "UnknownOperationException": "InvalidAction",
    "UnrecognizedClientException": "InvalidClientTokenId",
    "ValidationException": "ValidationError",
}
"""Codes of the JSON services by what the query services call the same. Source: "Common Errors"."""

_S3_CODES = {
    "AccessDeniedException": "AccessDenied",
    "IncompleteSignatureException": "AuthorizationHeaderMalformed",
    "InternalServerException": "InternalError",
    "InvalidSignatureException": "SignatureDoesNotMatch",
    "MissingAuthenticationTokenException": "AccessDenied",
    "SerializationException": "InvalidRequest",
    "ServiceUnavailableException": "ServiceUnavailable",
    "ThrottlingException": "SlowDown",
    "UnrecognizedClientException": "InvalidAccessKeyId",
    "ValidationException": "InvalidRequest",
}
"""Codes of the JSON services by what S3 calls the same. Source: "List of error codes"."""

_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _query_reply(
    operation: OperationModel, output: Mapping[str, Any], request_id: str
) -> HttpReply:
    namespace = operation.service_model.metadata["xmlNamespace"]
    name = operation.name
    shape = operation.output_shape
    result = ""
    if shape is not None:
        wrapper = shape.serialization.get("resultWrapper", f"{name}Result")
        result = _element(wrapper, _xml_members(shape, output))
    metadata = _element("ResponseMetadata", _text_element("RequestId", request_id))
    body = f'<{name}Response xmlns="{namespace}">{result}{metadata}</{name}Response>'
    headers = {"x-amzn-RequestId": request_id, "Content-Type": "text/xml"}
    return HttpReply(int(operation.http.get("responseCode", 200)), headers, body.encode("utf-8"))


def _xml_members(shape: Shape, value: Mapping[str, Any]) -> str:
    return "".join(
        _xml(member, value[name], wire_name(member, name))
        for name, member in shape.members.items()
        if value.get(name) is not None
    )


def _xml(shape: Shape, value: Any, tag: str) -> str:
    if shape.type_name == "structure":
        return _element(tag, _xml_members(shape, value))
    if shape.type_name == "list":
        if shape.serialization.get("flattened"):
            return "".join(_xml(shape.member, item, tag) for item in value)
        inner = shape.member.serialization.get("name", "member")
        return _element(tag, "".join(_xml(shape.member, item, inner) for item in value))
    if shape.type_name == "map":
        key_tag = shape.key.serialization.get("name", "key")
        value_tag = shape.value.serialization.get("name", "value")
        entries = [
            _xml(shape.key, key, key_tag) + _xml(shape.value, item, value_tag)
            for key, item in value.items()
        ]
        if shape.serialization.get("flattened"):
            return "".join(_element(tag, entry) for entry in entries)
        return _element(tag, "".join(_element("entry", entry) for entry in entries))
    if shape.type_name == "timestamp":
        return _text_element(tag, str(_time(value, "iso8601")))
    written = to_json(shape, value)
    if isinstance(written, bool):
        written = "true" if written else "false"
    return _text_element(tag, str(written))


def _query_error(service: str, error: ApiError, request_id: str) -> HttpReply:
    namespace = service_model(service).metadata["xmlNamespace"]
    inner = (
        _text_element("Type", "Sender" if error.http_status < 500 else "Receiver")
        + _text_element("Code", _QUERY_CODES.get(error.code, error.code))
        + _text_element("Message", error.message)
    )
    body = (
        f'<ErrorResponse xmlns="{namespace}">{_element("Error", inner)}'
        f"{_text_element('RequestId', request_id)}</ErrorResponse>"
    )
    headers = {"x-amzn-RequestId": request_id, "Content-Type": "text/xml"}
    return HttpReply(error.http_status, headers, body.encode("utf-8"))


def _s3_error(error: ApiError, request_id: str) -> HttpReply:
    parts = {
        "Code": _S3_CODES.get(error.code, error.code),
        "Message": error.message,
        **{name: str(value) for name, value in error.members.items()},
        "RequestId": request_id,
    }
    parts.setdefault("Resource", "")
    inner = "".join(_text_element(name, text) for name, text in parts.items())
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{_element("Error", inner)}'
    headers = {"x-amz-request-id": request_id, "Content-Type": "application/xml"}
    return HttpReply(error.http_status, headers, body.encode("utf-8"))


def _element(tag: str, inner: str) -> str:
    return f"<{tag}>{inner}</{tag}>"


def _text_element(tag: str, text: str) -> str:
    return _element(tag, escape(_NOT_XML.sub("\ufffd", text)).replace("\r", "&#13;"))
