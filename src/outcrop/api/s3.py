"""S3 requests: verified and authorized here, then passed on to the object store under its own key.

Says who asks, what for (s3_actions.py) and whether they may, has the body checked (s3_body.py), and
hands what was understood to the backend (s3_backend.py), whose answers are put right where S3's are
others (s3_answers.py). Listings are made here (s3_listing.py). Bodies are streamed both ways.
Source: Amazon S3 API Reference, "Common request headers", "Error responses".
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio.to_thread
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from outcrop.api.s3_actions import (
    S3Call,
    check_new_bucket,
    delete_permission,
    needed_permissions,
    read_call,
)
from outcrop.api.s3_answers import answer, check_call
from outcrop.api.s3_backend import (
    S3Services,
    location_body,
    location_reply,
    pass_on,
    read_bucket,
)
from outcrop.api.s3_body import (
    Upload,
    check_parts,
    open_upload,
    read_body,
    read_location,
)
from outcrop.api.s3_deletion import read_deletion
from outcrop.api.s3_listing import LISTINGS, answer_listing, read_listing
from outcrop.api.signed import signed_request
from outcrop.errors import ApiError, InternalServerException, ObjectStoreError
from outcrop.identity.authorize import authorize_all
from outcrop.identity.principals import Principal, authenticate
from outcrop.wire import serialize, sigv4
from outcrop.wire.signature import Signature, SignedRequest, header_names, header_values
from outcrop.wire.sigv4 import SigningKey

logger = logging.getLogger("outcrop.gateway")

UPLOADS = frozenset({"PutObject", "UploadPart"})
"""The operations whose body is data, streamed and of any size."""


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
    signed = signed_request(request)
    verified = await anyio.to_thread.run_sync(_verify, services, signed, trace)
    call = verified.call
    if call.operation in LISTINGS and not services.settings.s3_endpoint_url:
        listing = read_listing(call.operation, call.bucket, call.query)
        read = functools.partial(read_bucket, services, call.bucket)
        return Response(await answer_listing(listing, read), media_type="application/xml")
    await check_call(services, call)
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
    if call.operation == "DeleteObjects" and isinstance(content, bytes):
        return await _delete_objects(services, call, content, _address(request))
    upstream = await pass_on(services, request.method, call, content)
    if call.operation == "GetBucketLocation" and upstream.is_success:
        await upstream.aclose()
        return location_reply(services.settings.region)
    if call.operation == "HeadBucket":
        upstream.headers["x-amz-bucket-region"] = services.settings.region
    return await answer(services, call, upstream, _address(request))


async def _delete_objects(
    services: S3Services, call: S3Call, content: bytes, address: str
) -> Response:
    deletion = read_deletion(content)
    if not deletion.objects:
        return Response(deletion.answer(b""), media_type="application/xml")
    upstream = await pass_on(services, "POST", deletion.call(call), deletion.body(content))
    if not deletion.refused or not upstream.is_success:
        return await answer(services, call, upstream, address)
    return Response(deletion.answer(await upstream.aread()), media_type="application/xml")


def _address(request: Request) -> str:
    """Return where the client reaches the service."""
    return f"{request.url.scheme}://{request.headers['host']}"


# --- may they ------------------------------------------------------------------------------------


def _verify(services: S3Services, signed: SignedRequest, trace: _Trace) -> _Verified:
    """Say who asks for what, and refuse what they may not; reads the database."""
    signature = sigv4.read_signature(signed)
    if signature is None:
        raise _denied()
    headers = {name: ",".join(header_values(signed, name)) for name in header_names(signed)}
    _check_scope(signature, headers, services.settings.all_regions)
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


def _check_scope(signature: Signature, headers: dict[str, str], regions: tuple[str, ...]) -> None:
    if signature.security_token or "x-amz-security-token" in headers:
        raise ApiError(
            "The provided token is malformed or otherwise invalid. Temporary credentials are not "
            "offered here: unset AWS_SESSION_TOKEN.",
            code="InvalidToken",
            http_status=400,
        )
    # Version 2 names no region. One store is there for all of the others.
    if signature.kind != "presigned-v2" and signature.region not in regions:
        region = regions[0]
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
        wanted = [
            delete_permission(call.bucket, item.key, item.version_id)
            for item in read_deletion(content).objects
        ]
        with services.engine.connect() as connection:
            authorize_all(connection, verified.principal, wanted)
    elif call.operation == "CompleteMultipartUpload":
        check_parts(content)
    elif call.operation == "CreateBucket":
        location, regions = read_location(content), services.settings.all_regions
        if location not in ("", *regions):
            raise ApiError(
                f"The {location} location constraint is incompatible for the region specific "
                f"endpoint this request was sent to: this service is in {', '.join(regions)}.",
                code="IllegalLocationConstraintException",
                http_status=400,
            )
        return location_body(services.backend.region)
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


def _error(request: Request, error: ApiError, request_id: str) -> Response:
    error.members.setdefault("Resource", request.url.path)
    reply = serialize.serialize_error("s3", error, request_id)
    return Response(reply.body, reply.status, reply.headers)
