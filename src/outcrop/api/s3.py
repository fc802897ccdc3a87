"""S3 requests: verified and authorized here, then passed on to the object store under its own key.

Turns a client's request into one for the backend, and the backend's answer into the client's. Both
bodies are streamed. The backend sees only what was understood: the query's and the headers' known
parts, re-encoded and signed with the internal key. What an operation means is in s3_actions.py,
what happens to a body in s3_body.py.
Source: Amazon S3 API Reference, "Common request headers", "Error responses".
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

import anyio.to_thread
import httpx
from sqlalchemy import Engine
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from outcrop.api.s3_actions import (
    S3Call,
    check_key,
    check_new_bucket,
    delete_permission,
    needed_permissions,
    read_call,
)
from outcrop.api.s3_body import (
    Upload,
    open_upload,
    read_body,
    read_deleted_objects,
    read_location,
)
from outcrop.errors import ApiError, InternalServerException, ObjectStoreError
from outcrop.identity.authorize import authorize_all
from outcrop.identity.principals import Principal, authenticate
from outcrop.objects.client import Backend, backend
from outcrop.settings import Settings
from outcrop.wire import serialize, sigv4
from outcrop.wire.signature import Signature, SignedRequest, header_names, header_values
from outcrop.wire.sigv4 import SigningKey

logger = logging.getLogger("outcrop.gateway")

UPLOADS = frozenset({"PutObject", "UploadPart"})
"""The operations whose body is data, streamed and of any size."""

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
_NOT_PASSED_BACK_PREFIXES = (b"seaweed-", b"x-seaweedfs-", b"access-control-")


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


@dataclass(frozen=True)
class _Verified:
    """A request whose signature and permissions are checked."""

    call: S3Call
    principal: Principal
    signature: Signature
    key: SigningKey


class _Body:
    """A request's body; a client that waits for `100 Continue` sends it when it is asked for."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self.begun = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.begun = True
        async for piece in self._request.stream():
            yield piece


@dataclass
class _Trace:
    """What is known of a request so far, for its line in the log."""

    operation: str = "-"
    caller: str = "-"


async def s3_request(request: Request, services: S3Services, request_id: str) -> Response:
    """Answer one S3 request, signed or not.

    Whatever goes wrong becomes S3's XML error: a user's mistake with its reason, ours as
    InternalError with the request id, under which the log has the traceback.
    """
    started = time.perf_counter()
    trace = _Trace(f"{request.method} {request.url.path}")
    response: Response
    body = _Body(request)
    try:
        response = await _answer(request, services, body, trace)
    except ApiError as error:
        response = _error(request, error, request_id)
    except ClientDisconnect:
        # Nobody is left to read it; the upload to the backend was cut off with the client's.
        response = Response(status_code=400)
    except (httpx.TransportError, ObjectStoreError) as error:
        logger.warning("%s: the object store does not answer: %r", request_id, error)
        unavailable = ApiError(
            "The object store does not answer. Please try again.",
            code="ServiceUnavailable",
            http_status=503,
        )
        response = _error(request, unavailable, request_id)
    except Exception:
        logger.exception("%s failed", request_id)
        message = (
            "We encountered an internal error. Please try again. "
            f"The service's log has the reason under request {request_id}."
        )
        response = _error(request, InternalServerException(message), request_id)
    response.headers["x-amz-request-id"] = request_id
    if "expect" in request.headers and not body.begun:
        # The client was never told to send its body, so what comes next is not that body.
        response.headers["connection"] = "close"
    logger.info(
        "%s s3:%s %d %s %.1f ms",
        request_id,
        trace.operation,
        response.status_code,
        trace.caller,
        1000 * (time.perf_counter() - started),
    )
    return response


async def _answer(request: Request, services: S3Services, body: _Body, trace: _Trace) -> Response:
    signed = _signed_request(request)
    verified = await anyio.to_thread.run_sync(_verify, services, signed, trace)
    call = verified.call
    content: Upload | bytes = b""
    if call.operation in UPLOADS:
        if call.key.endswith("/") and int(call.headers.get("content-length", "0")):
            raise ApiError(
                "An object whose key ends in / marks a folder and cannot have content here.",
                code="InvalidRequest",
                http_status=400,
            )
        content = await open_upload(
            aiter(body), call.headers, verified.signature.payload_hash, verified.key
        )
    elif request.method in ("PUT", "POST"):
        content = await read_body(
            aiter(body), call.headers, verified.signature.payload_hash, verified.key
        )
        content = await anyio.to_thread.run_sync(_check_content, services, verified, content)
    upstream = await _send(services, request.method, call, content)
    if call.operation == "GetBucketLocation" and upstream.is_success:
        await upstream.aclose()
        return _location(services.settings.region)
    if call.operation == "HeadBucket":
        upstream.headers["x-amz-bucket-region"] = services.settings.region
    if upstream.status_code == 400 and isinstance(content, Upload) and content.headers:
        return await _explain_digest(upstream)
    return _PassedOn(upstream, upstream.aiter_raw())


# --- may they ------------------------------------------------------------------------------------


def _signed_request(request: Request) -> SignedRequest:
    raw_path = request.scope.get("raw_path") or request.scope["path"].encode()
    return SignedRequest(
        method=request.method,
        raw_path=raw_path.split(b"?")[0].decode("latin-1"),
        raw_query=request.scope["query_string"].decode("latin-1"),
        headers=[
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw
        ],
    )


def _verify(services: S3Services, signed: SignedRequest, trace: _Trace) -> _Verified:
    """Say who asks for what, and refuse what they may not; reads the database."""
    signature = sigv4.read_signature(signed)
    if signature is None:
        raise _denied()
    headers = {name: ",".join(header_values(signed, name)) for name in header_names(signed)}
    _check_scope(signature, headers, services.settings.region)
    with services.engine.connect() as connection:
        found = authenticate(connection, signature.access_key_id)
        if found is None:
            raise ApiError(
                "The AWS Access Key Id you provided does not exist in our records.",
                code="InvalidAccessKeyId",
                http_status=403,
                members={"AWSAccessKeyId": signature.access_key_id},
            )
        principal, secret = found
        key = sigv4.verify(signed, signature, secret, body_sha256=None, now=datetime.now(UTC))
        trace.caller = principal.arn
        call = read_call(signed.method, signed.raw_path, signed.raw_query, headers)
        trace.operation = call.operation
        # Buckets are not yet kept apart by account, so only the account that owns them all may ask.
        owners = {
            services.settings.account,
            headers.get("x-amz-expected-bucket-owner", principal.account),
            headers.get("x-amz-source-expected-bucket-owner", principal.account),
        }
        if owners != {principal.account}:
            raise _denied()
        if call.operation != "DeleteObjects":
            authorize_all(connection, principal, needed_permissions(call))
    if call.operation == "CreateBucket":
        check_new_bucket(call.bucket)
    return _Verified(call, principal, signature, key)


def _check_scope(signature: Signature, headers: dict[str, str], region: str) -> None:
    if signature.security_token or "x-amz-security-token" in headers:
        raise ApiError(
            "The provided token is malformed or otherwise invalid. Temporary credentials are not "
            "offered here: unset AWS_SESSION_TOKEN.",
            code="InvalidToken",
            http_status=400,
        )
    # Version 2 names no region.
    if signature.kind != "presigned-v2" and signature.region != region:
        what, code = "The authorization header is malformed", "AuthorizationHeaderMalformed"
        if signature.kind == "presigned":
            what = "Error parsing the X-Amz-Credential parameter"
            code = "AuthorizationQueryParametersError"
        raise ApiError(
            f"{what}; the region '{signature.region}' is wrong; expecting '{region}'",
            code=code,
            http_status=400,
            members={"Region": region},
        )


def _check_content(services: S3Services, verified: _Verified, content: bytes) -> bytes:
    """Check what a body asks for, and return the body to pass on; reads the database."""
    call = verified.call
    if call.operation == "DeleteObjects":
        objects = read_deleted_objects(content)
        for item in objects:
            check_key(item.key)
        wanted = [delete_permission(call.bucket, item.key, item.version_id) for item in objects]
        with services.engine.connect() as connection:
            authorize_all(connection, verified.principal, wanted)
    elif call.operation == "CreateBucket":
        location, region = read_location(content), services.settings.region
        if location not in ("", region):
            raise ApiError(
                f"The {location} location constraint is incompatible for the region specific "
                f"endpoint this request was sent to: this service is in {region}.",
                code="IllegalLocationConstraintException",
                http_status=400,
            )
        return _location_request(services.backend.region)
    elif call.operation == "PutBucketEncryption" and b"aws:kms" in content:
        raise ApiError(
            "Encryption with keys of a key management service is not offered by this service yet. "
            "AES256 is.",
            code="NotImplemented",
            http_status=501,
        )
    return content


def _denied() -> ApiError:
    return ApiError("Access Denied", code="AccessDenied", http_status=403)


# --- to the backend and back ---------------------------------------------------------------------


async def _send(
    services: S3Services, method: str, call: S3Call, content: Upload | bytes
) -> httpx.Response:
    """Pass a call on; the answer's body is not read yet."""
    try:
        return await _send_to(services.backend, services.http, method, call, content)
    except httpx.ConnectError:
        # The embedded store may have been started again on another port. Nothing was sent so far.
        current = await anyio.to_thread.run_sync(backend, services.settings)
        if current.url == services.backend.url:
            raise
        return await _send_to(current, services.http, method, call, content)


async def _send_to(
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
    signature = sigv4.sign_headers(
        method,
        raw_path,
        call.raw_query,
        headers,
        access_key_id=place.access_key_id,
        secret_access_key=place.secret_access_key,
        region=place.region,
        service="s3",
        payload_hash=payload_hash,
        now=datetime.now(UTC),
    )
    # Objects come back as they were stored; not one of the client's own headers, so not signed.
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


class _PassedOn(StreamingResponse):
    """The backend's answer, streamed to the client."""

    def __init__(self, upstream: httpx.Response, content: AsyncIterator[bytes]) -> None:
        super().__init__(content, upstream.status_code)
        self._upstream = upstream
        self.raw_headers = [
            (name.lower(), value)
            for name, value in upstream.headers.raw
            if name.lower() not in _NOT_PASSED_BACK
            and not name.lower().startswith(_NOT_PASSED_BACK_PREFIXES)
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the backend's connection is given back whatever becomes of the client."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()


async def _explain_digest(upstream: httpx.Response) -> Response:
    """Answer as S3 does where a trailer's checksum was wrong; the backend blames Content-MD5."""
    parts = [part async for part in upstream.aiter_raw()]
    if b"<Code>InvalidDigest</Code>" in b"".join(parts):
        await upstream.aclose()
        raise ApiError(
            "The checksum in the trailer did not match the calculated checksum.",
            code="BadDigest",
            http_status=400,
        )

    async def again() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    return _PassedOn(upstream, again())


def _location_request(region: str) -> bytes:
    """Return the body that makes a bucket where the backend is; it has a region of its own."""
    if region == _DEFAULT_REGION:
        return b""
    return (
        '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<LocationConstraint>{escape(region)}</LocationConstraint></CreateBucketConfiguration>"
    ).encode()


def _location(region: str) -> Response:
    shown = "" if region == _DEFAULT_REGION else escape(region)
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<LocationConstraint xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{shown}'
        "</LocationConstraint>"
    )
    return Response(body, media_type="application/xml")


def _error(request: Request, error: ApiError, request_id: str) -> Response:
    error.members.setdefault("Resource", request.url.path)
    reply = serialize.serialize_error("s3", error, request_id)
    return Response(reply.body, reply.status, reply.headers)
