"""botocore's side of the wire: what its clients send, and how they read an answer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from botocore.awsrequest import HeadersDict, create_request_object, prepare_request_dict
from botocore.model import OperationModel
from botocore.parsers import create_parser
from botocore.serialize import create_serializer

from outcrop.wire.model import SERVICES, service_model
from outcrop.wire.serialize import HttpReply

OPERATIONS = [
    (service, name) for service in SERVICES for name in service_model(service).operation_names
]
"""Every operation of every service, by service and name."""


@dataclass(frozen=True)
class Sent:
    """A request as it arrives at the server."""

    method: str
    raw_path: str
    query: str
    headers: dict[str, str]
    body: bytes


def send(operation: OperationModel, params: Mapping[str, Any]) -> Sent:
    """Let botocore validate and serialize a call, down to the bytes of the request."""
    protocol = operation.service_model.metadata["protocol"]
    request = create_serializer(protocol, include_validation=True).serialize_to_request(
        dict(params), operation
    )
    prepare_request_dict(request, "http://127.0.0.1:7070", user_agent="test")
    prepared = create_request_object(request).prepare()
    url = urlsplit(prepared.url)
    body = prepared.body or b""
    if isinstance(body, str):
        body = body.encode("utf-8")
    elif not isinstance(body, (bytes, bytearray)):
        body = body.read()
    headers = {
        key.lower(): value.decode("utf-8") if isinstance(value, bytes) else str(value)
        for key, value in prepared.headers.items()
    }
    return Sent(prepared.method, url.path, url.query, headers, bytes(body))


def receive(operation: OperationModel, reply: HttpReply, *, stream: Any = None) -> dict[str, Any]:
    """Let botocore parse an answer as its client would, errors included."""
    parser = create_parser(operation.service_model.metadata["protocol"])
    if stream is None and operation.has_streaming_output and reply.status < 300:
        stream = io.BytesIO(reply.body)  # its client leaves a blob payload to the caller to read
    response = {
        "status_code": reply.status,
        "headers": HeadersDict(reply.headers),
        "body": reply.body if stream is None else stream,
        "context": {"operation_name": operation.name},
    }
    parsed: dict[str, Any] = parser.parse(response, operation.output_shape)
    if reply.status >= 300:
        code = parsed.get("Error", {}).get("Code")
        shape = operation.service_model.shape_for_error_code(code)
        if shape is not None:
            parsed.update(parser.parse(response, shape))
    return parsed


class Frames:
    """Bytes of an event stream as urllib3 would hand them over."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def stream(self) -> Any:
        """Yield the bytes in awkward pieces."""
        for start in range(0, len(self.data), 7):
            yield self.data[start : start + 7]

    def close(self) -> None:
        """Nothing to close."""
