"""A request's path, in order: who signed it, what it asks for, whether it may, what comes back.

Turns an HTTP request into one operation's call, and its answer or error into an HTTP reply. Knows
no operation by name: those are in operations.py. S3 takes a path of its own (s3.py), because its
bodies are streamed.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import anyio
import anyio.to_thread
from botocore.model import OperationModel
from sqlalchemy.exc import OperationalError
from starlette.requests import ClientDisconnect, Request

from outcrop.api import invocation_logs
from outcrop.api.asked import look_ahead
from outcrop.api.context import RequestContext, Services
from outcrop.api.event_stream import StreamReply
from outcrop.api.operations import OPERATIONS, AsyncOperation, Operation, SyncOperation
from outcrop.api.signed import signed_request
from outcrop.errors import (
    AccessDeniedException,
    ApiError,
    InternalServerException,
    ObjectStoreError,
    ServiceUnavailableException,
    ValidationException,
)
from outcrop.identity.api_keys import authenticate_api_key, bearer_key
from outcrop.identity.principals import Principal, authenticate
from outcrop.wire import parse, route, serialize, sigv4, validate
from outcrop.wire.model import service_model
from outcrop.wire.serialize import HttpReply
from outcrop.wire.sigv4 import Signature, SignedRequest

T = TypeVar("T")
logger = logging.getLogger("outcrop.gateway")

CUSTOM_MODEL_MEMBERS = {"modelIdentifier", "modelId", "baseModelIdentifier"}
"""Members that name a custom model, among others."""
IMPORTED_MODEL_ARN = re.compile(
    r"arn:aws(-[^:]+)?:bedrock:[a-z0-9-]{1,20}:[0-9]{12}:imported-model/(?P<name>[a-z0-9]{12})"
)
"""An imported model's ARN, where the service model has room for base and custom models only."""
IMPORTED_MODEL_MEMBERS = {"modelId", "baseModelIdentifier"}
IMPORTED_MODEL_ARN_MEMBERS = {"baseModelArnEquals", "foundationModelArnEquals", "modelArnEquals"}
SOME_BASE_MODEL = "arn:aws:bedrock:any::foundation-model/any.model"
"""An ARN that the service model has room for where these members name an imported model."""
CUSTOM_MODEL_ARN_MEMBERS = {"resourceARN", "baseModelArnEquals", "modelArnEquals"}
"""Members that name a custom model, among others, and only by ARN."""
CUSTOM_MODEL_ARN = re.compile(
    r"(?P<type>arn:aws(-[^:]+)?:bedrock:[a-z0-9-]{1,20}:[0-9]{12}:custom-model/)"
    r"(?P<base>[a-z0-9.:-]{1,200}/)?(?P<name>[0-9a-zA-Z_-]{1,63})"
)
"""An ARN of a custom model that ends in its id, or in its name as in published examples."""
SOME_MODEL = "any.model/000000000000"
"""What an ARN of the service model's own form ends in."""


@dataclass(frozen=True)
class Call:
    """An operation that is ready to run: authenticated, parsed, validated."""

    context: RequestContext
    model: OperationModel
    function: Operation
    params: dict[str, Any]


@dataclass(frozen=True)
class AsyncCall:
    """A call that waits for a model, so it runs on the event loop."""

    context: RequestContext
    model: OperationModel
    function: AsyncOperation
    params: dict[str, Any]
    entry: invocation_logs.Entry | None
    """What is logged of it; None where nothing is."""


@dataclass
class Trace:
    """What is known of a request so far, for its error and its line in the log."""

    request_id: str
    service: str = "bedrock"
    model: OperationModel | None = None
    caller: str = "-"


async def answer(request: Request, services: Services, request_id: str) -> HttpReply | StreamReply:
    """Answer a request that is signed for Bedrock, STS or our own operations.

    Whatever goes wrong becomes an error in the caller's protocol: a user's mistake with its
    reason, ours as InternalServerException with the request id, under which the log has the
    traceback.
    """
    started = time.perf_counter()
    trace = Trace(request_id)

    def log(ending: str) -> None:
        logger.info(
            "%s %s %s %s %.1f ms",
            request_id,
            trace.model.name if trace.model else f"{request.method} {request.url.path}",
            ending,
            trace.caller,
            1000 * (time.perf_counter() - started),
        )

    def explain(error: Exception) -> ApiError:
        logger.error("%s failed", request_id, exc_info=error)
        return our_fault(error, request_id)

    reply: HttpReply | StreamReply
    try:
        body = await read_body(request, services.settings.max_body_bytes)
        reply = await _call(request, services, body, trace, explain, log)
    except ApiError as error:
        reply = serialize.serialize_error(trace.service, error, request_id, trace.model)
    except ClientDisconnect:
        reply = HttpReply(499)  # for the log: nobody reads it. Source: nginx's own status for it
    except Exception as error:
        reply = serialize.serialize_error(trace.service, explain(error), request_id, trace.model)
    if isinstance(reply, HttpReply):  # a stream is logged at its end
        log(str(reply.status))
    return reply


async def _call(
    request: Request,
    services: Services,
    body: bytes,
    trace: Trace,
    explain: Callable[[Exception], ApiError],
    log: Callable[[str], None],
) -> HttpReply | StreamReply:
    signed = signed_request(request)
    # One hand-over to a thread for all that reads the database: each costs a part of a millisecond.
    done = await anyio.to_thread.run_sync(_run, services, signed, body, trace)
    if isinstance(done, HttpReply):
        return done
    answer = done.function(done.context, done.params)
    if done.entry is not None:
        answer = invocation_logs.logged(done.entry, done.model, answer)
    output = await while_connected(request, answer)
    head = serialize.serialize_output(
        done.model, output.members, trace.request_id, extra_headers=output.headers
    )
    if output.stream is None:
        return head
    return StreamReply(head, done.model, output.stream, explain, log)


async def while_connected(request: Request, answer: Awaitable[T]) -> T:
    """Wait for an answer that takes long, and give it up when the client goes away.

    botocore's clients do after 60 s, and ask again.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def watch() -> None:
        # The body is read, so what comes next is the end of the connection.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    with anyio.CancelScope() as scope:
        watcher = asyncio.create_task(watch())
        try:
            return await answer
        finally:
            watcher.cancel()
    raise ClientDisconnect


def _run(
    services: Services, signed: SignedRequest, body: bytes, trace: Trace
) -> HttpReply | AsyncCall:
    """Do all of an ordinary operation, or all but the call of one that waits for a model."""
    call = _prepare(services, signed, body, trace)
    if inspect.iscoroutinefunction(call.function):
        entry = invocation_logs.begin(services.invocation_log, call.context, call.params, body)
        with invocation_logs.noting_refusal(entry):
            look_ahead(call.context, call.function, call.params)
        return AsyncCall(call.context, call.model, call.function, call.params, entry)
    members = cast(SyncOperation, call.function)(call.context, call.params)
    return serialize.serialize_output(call.model, members, trace.request_id)


def _prepare(services: Services, signed: SignedRequest, body: bytes, trace: Trace) -> Call:
    """Authenticate, route, parse and validate; runs in a thread, because it reads the database."""
    headers = dict(signed.headers)
    key = bearer_key(headers.get("authorization", ""))
    signature = sigv4.read_signature(signed) if key is None else None
    if key is not None:
        signed_for, principal = "bedrock", _authenticate_key(services, key)
        region = services.settings.region  # a key is of none, and the endpoint is one for all
    elif signature is not None:
        trace.service = signed_for = signature.service
        principal = _authenticate(services, signed, signature, body)
        region = signature.region
    else:
        raise ApiError(
            "Request is missing Authentication Token",
            code="MissingAuthenticationTokenException",
            http_status=403,
        )
    trace.caller = principal.arn

    if signed_for == "sts":
        trace.model, params = parse.parse_query_request(
            service_model("sts"), body, query=signed.raw_query
        )
        service = "sts"
    elif signed_for == "bedrock":
        found = route.match(signed.method, signed.raw_path)
        trace.model, service = found.operation, found.service
        trace.service = service
    else:
        raise ApiError(
            f"The service {signed_for} is not offered here.",
            code="NotImplemented",
            http_status=501,
        )
    function = OPERATIONS.get((service, trace.model.name))
    if function is None:
        raise ApiError(
            f"{trace.model.name} is not implemented by this service yet.",
            code="NotImplemented",
            http_status=501,
        )
    if service != "sts":
        params = parse.parse_request(found, query=signed.raw_query, headers=headers, body=body)
    if trace.model.input_shape is not None:
        validate.validate(trace.model.input_shape, _as_modelled(params))
    context = RequestContext(
        services=services,
        request_id=trace.request_id,
        account=principal.account,
        region=region,
        principal=principal,
        service=service,
        operation=trace.model.name,
        received_at=datetime.now(UTC),
    )
    return Call(context, trace.model, function, params)


def _as_modelled(params: dict[str, Any]) -> dict[str, Any]:
    """Return a request for validation with custom models named as the service model allows.

    Published examples name a custom model by an ARN that ends in its name, and InvokeModel's
    pattern has no room for a base id with its context. So the last part is what is validated, or,
    where only an ARN is allowed, another model's: which model an ARN names is decided by the
    operation. An imported model can be customized and have throughput here, so its ARN passes too.
    """
    named = dict(params)
    for member in IMPORTED_MODEL_MEMBERS & params.keys():
        if isinstance(params[member], str) and (
            imported := IMPORTED_MODEL_ARN.fullmatch(params[member])
        ):
            named[member] = imported["name"]
    for member in IMPORTED_MODEL_ARN_MEMBERS & params.keys():
        if isinstance(params[member], str) and IMPORTED_MODEL_ARN.fullmatch(params[member]):
            named[member] = SOME_BASE_MODEL
    for member in (CUSTOM_MODEL_MEMBERS | CUSTOM_MODEL_ARN_MEMBERS) & params.keys():
        found = isinstance(params[member], str) and CUSTOM_MODEL_ARN.fullmatch(params[member])
        if not found:
            continue
        if member in CUSTOM_MODEL_MEMBERS:
            named[member] = found["name"]
        elif not found["base"]:
            named[member] = found["type"] + SOME_MODEL
    return named


def _authenticate_key(services: Services, key: str) -> Principal:
    """Return who holds an API key. Source of the text: the live service's answer."""
    with services.engine.connect() as connection:
        principal = authenticate_api_key(connection, key)
    if principal is None:
        raise AccessDeniedException(
            "Authentication failed: Please make sure your API Key is valid. `outcrop env --bearer` "
            "prints the one that the first start made."
        )
    return principal


def _authenticate(
    services: Services, signed: SignedRequest, signature: Signature, body: bytes
) -> Principal:

    def read() -> tuple[Principal, str] | None:
        with services.engine.connect() as connection:
            return authenticate(connection, signature.access_key_id)

    found = services.remembered.get(("access key", signature.access_key_id), read)
    if found is None:
        raise ApiError(
            "The security token included in the request is invalid.",
            code="UnrecognizedClientException",
            http_status=403,
        )
    principal, secret = found
    sigv4.verify(
        signed,
        signature,
        secret,
        body_sha256=hashlib.sha256(body).hexdigest(),
        now=datetime.now(UTC),
    )
    regions = services.settings.all_regions
    if signature.region not in regions:
        raise ApiError(
            f"Credential should be scoped to a valid region: this service answers for "
            f"{', '.join(regions)}, not {signature.region}. The setting regions adds others.",
            code="InvalidSignatureException",
            http_status=403,
        )
    return principal


async def read_body(request: Request, limit: int) -> bytes:
    """Return a request's body.

    Raises:
        ValidationException: it has more than `limit` bytes.
        ClientDisconnect: the client went away before it had sent it all.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ValidationException(
                f"The request's body is larger than {limit} bytes, the most that is allowed."
            )
        parts.append(part)
    return b"".join(parts)


def our_fault(error: Exception, request_id: str) -> ApiError:
    """Return what the client is told of a failure that is not its own."""
    if isinstance(error, ObjectStoreError) and error.code == "ServiceUnavailable":
        return ServiceUnavailableException("The object store does not answer. Try again.")
    if isinstance(error, OperationalError) and "full" in str(error.orig).lower():
        return InternalServerException(
            "The service's disk is full, so nothing was changed. Free some space and try again."
        )
    return InternalServerException(
        "Encountered an internal error when processing the request. "
        f"The service's log has the reason under request {request_id}."
    )
