"""Passing an understood S3 call on to the object store, and its answer back to the client.

Turns an `S3Call` into a request signed with the internal key: the path, the query and the headers
are written anew from what was understood, and nothing else of the client's request is sent. The
answer is streamed, without what is the backend's own affair. Knows no principal and no policy.
Source: Amazon S3 API Reference, "Common request headers", "Common response headers".
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import anyio.to_thread
import httpx
from sqlalchemy import Engine
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from outcrop.api.s3_actions import S3Call
from outcrop.api.s3_body import Upload
from outcrop.errors import ApiError
from outcrop.objects.client import Backend, backend
from outcrop.settings import Settings
from outcrop.wire import sigv4

_DEFAULT_REGION = "us-east-1"
_DEFAULT_CONTENT_TYPE = "binary/octet-stream"
_PASSED_ON = frozenset(
    {
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-md5",
        "content-type",
        "expires",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "range",
    }
)
"""Headers that mean something to S3, besides `x-amz-*`."""
_NOT_PASSED_ON = frozenset(
    {
        # Of the signature and the body, which are made anew.
        "x-amz-content-sha256",
        "x-amz-date",
        "x-amz-security-token",
        "x-amz-decoded-content-length",
        "x-amz-trailer",
        # About accounts, which the backend does not know; checked here.
        "x-amz-acl",
        "x-amz-expected-bucket-owner",
        "x-amz-source-expected-bucket-owner",
        "x-amz-request-payer",
        # Written anew from what was understood.
        "x-amz-copy-source",
    }
)
_BODY_DIGESTS = frozenset(
    {
        "content-md5",
        "content-type",
        "x-amz-sdk-checksum-algorithm",
        "x-amz-checksum-crc32",
        "x-amz-checksum-crc32c",
        "x-amz-checksum-crc64nvme",
        "x-amz-checksum-sha1",
        "x-amz-checksum-sha256",
    }
)
_NOT_PASSED_BACK = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"upgrade",
        b"server",
        b"date",
        b"vary",
        b"x-amz-request-id",
        b"x-amz-id-2",
    }
)
_NOT_PASSED_BACK_PREFIXES = (
    b"seaweed-",
    b"x-seaweedfs-",
    b"access-control-",
    # The store shows each tag of an object in a header; S3 tells only how many there are.
    b"x-amz-tagging-",
)
_TAGGING_COUNT = b"x-amz-tagging-count"


class S3Services(Protocol):
    """What S3 requests need of the gateway's services."""

    @property
    def settings(self) -> Settings:
        """The operator's settings."""

    @property
    def engine(self) -> Engine:
        """The database."""

    @property
    def backend(self) -> Backend:
        """Where the objects are."""

    @property
    def http(self) -> httpx.AsyncClient:
        """Connections to there; without a time limit on transfers."""


async def pass_on(
    services: S3Services, method: str, call: S3Call, content: Upload | bytes
) -> httpx.Response:
    """Pass a call on; the answer's body is not read yet."""
    try:
        return await _send(services.backend, services.http, method, call, content)
    except httpx.ConnectError:
        # The embedded store may have been started again on another port. Nothing was sent so far.
        current = await anyio.to_thread.run_sync(backend, services.settings)
        if current.url == services.backend.url:
            raise
        return await _send(current, services.http, method, call, content)


async def read_bucket(
    services: S3Services, bucket: str, query: tuple[tuple[str, str], ...]
) -> bytes:
    """Return what the store answers to a GET of a bucket.

    Raises:
        ApiError: the store's own error.
    """
    call = S3Call("", bucket, "", query, {})
    upstream = await pass_on(services, "GET", call, b"")
    try:
        body = await upstream.aread()
    finally:
        await upstream.aclose()
    if not upstream.is_success:
        raise store_error(upstream.status_code, body)
    return body


def store_error(status: int, body: bytes) -> ApiError:
    """Return an error of the store as one of ours."""
    try:
        found = {element.tag: element.text or "" for element in ElementTree.fromstring(body)}
    except ElementTree.ParseError:
        found = {}
    return ApiError(
        found.get("Message", ""),
        code=found.get("Code", "InternalError"),
        http_status=status,
    )


async def _send(
    place: Backend,
    http: httpx.AsyncClient,
    method: str,
    call: S3Call,
    content: Upload | bytes,
) -> httpx.Response:
    headers = _headers_to_pass_on(call)
    url = urlsplit(place.url)
    headers["host"] = url.netloc
    body: AsyncIterator[bytes] | bytes | None
    if isinstance(content, Upload):
        headers |= content.headers
        payload_hash, length, body = content.payload_hash, content.length, content.content
    else:
        payload_hash, length, body = hashlib.sha256(content).hexdigest(), len(content), content
    raw_path = url.path.rstrip("/") + call.raw_path
    to_sign = {
        name: value
        for name, value in headers.items()
        if name in ("host", "content-type", "content-md5") or name.startswith("x-amz-")
    }
    signature = sigv4.sign_headers(
        method,
        raw_path,
        call.raw_query,
        to_sign,
        access_key_id=place.access_key_id,
        secret_access_key=place.secret_access_key,
        region=place.region,
        service="s3",
        payload_hash=payload_hash,
        now=datetime.now(UTC),
    )
    # Objects come back as they were stored.
    headers |= {**signature, "accept-encoding": "identity", "user-agent": "outcrop"}
    if method in ("PUT", "POST"):
        headers["content-length"] = str(length)
    else:
        body = None
    target = raw_path + (f"?{call.raw_query}" if call.raw_query else "")
    request = http.build_request(
        method,
        place.url,
        headers=[
            (name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()
        ],
        content=body,
        extensions={"target": target.encode("ascii")},  # httpx would re-write the path
    )
    return await http.send(request, stream=True)


def _headers_to_pass_on(call: S3Call) -> dict[str, str]:
    headers = {
        name: value
        for name, value in call.headers.items()
        if name in _PASSED_ON or (name.startswith("x-amz-") and name not in _NOT_PASSED_ON)
    }
    if call.operation == "CreateBucket":
        # Its body is written anew, so a digest of the old one would be wrong.
        headers = {name: value for name, value in headers.items() if name not in _BODY_DIGESTS}
    codings = [item.strip() for item in headers.pop("content-encoding", "").split(",")]
    # aws-chunked says how the body travelled, which is over; the backend would keep it.
    kept = ",".join(item for item in codings if item and item.lower() != "aws-chunked")
    if kept:
        headers["content-encoding"] = kept
    if call.copy_source is not None:
        headers["x-amz-copy-source"] = str(call.copy_source)
    if call.operation in ("PutObject", "CreateMultipartUpload"):
        # S3's own default; the backend would guess from the content.
        headers.setdefault("content-type", _DEFAULT_CONTENT_TYPE)
    return headers


class PassedOn(StreamingResponse):
    """The backend's answer, streamed to the client."""

    def __init__(self, upstream: httpx.Response, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, upstream.status_code)
        self._upstream = upstream
        self.raw_headers = [
            (name.lower(), value)
            for name, value in upstream.headers.raw
            if name.lower() not in _NOT_PASSED_BACK
            and (
                name.lower() == _TAGGING_COUNT
                or not name.lower().startswith(_NOT_PASSED_BACK_PREFIXES)
            )
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the backend's connection is given back whatever becomes of the client."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()


def location_body(region: str) -> bytes:
    """Return the body that makes a bucket where the backend is; it has a region of its own."""
    if region == _DEFAULT_REGION:
        return b""
    return (
        '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<LocationConstraint>{escape(region)}</LocationConstraint></CreateBucketConfiguration>"
    ).encode()


def location_reply(region: str) -> Response:
    shown = "" if region == _DEFAULT_REGION else escape(region)
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{shown}'
        "</LocationConstraint>"
    )
    return Response(body, media_type="application/xml")
