"""The OpenAI-style door: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.

Takes a bearer key and a body in OpenAI's form to the models that InvokeModel asks, by the same ids,
permissions and model servers, and the answer back, whole or as server-sent events. Bodies are read
in openai_requests.py and written in openai_answers.py.

Source: OpenAI API Reference; its Python client decides what an error, a stream and its end are.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import anyio
import anyio.to_thread
from sqlalchemy import Connection
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from outcrop.api import handlers, invocation_logs, runtime, targets
from outcrop.api.context import RequestContext, Services
from outcrop.api.signed import signed_request
from outcrop.errors import (
    AccessDeniedException,
    ApiError,
    ServiceUnavailableException,
    ValidationException,
)
from outcrop.identity.api_keys import authenticate_api_key, bearer_key
from outcrop.identity.authorize import load_policies
from outcrop.identity.policy import decide
from outcrop.identity.principals import Principal
from outcrop.ids import foundation_model_arn
from outcrop.serve import tool_use as tools
from outcrop.serve.prompt_formats import openai_answers as answers
from outcrop.serve.prompt_formats.openai_requests import Ask, model_id, parse_chat, parse_completion
from outcrop.serve.request import Generation, TokenEvent
from outcrop.store import deployments, models, profiles, throughputs
from outcrop.store.imported_models import list_imported_models
from outcrop.store.rows import Page
from outcrop.wire.document import read_json_object
from outcrop.wire.serialize import retry_headers
from outcrop.wire.signature import SignedRequest

logger = logging.getLogger("outcrop.gateway")

FIRST_PART = "v1"
"""First part of the paths that are answered here."""
ENDING = "The service is ending. Ask again."
MAX_AT_ONCE = 16
"""Answers of one request that are asked for at the same time."""
MODELS_A_PAGE = 1000
ANSWERING = ("Active", "InService", "Updating")
"""States of models, throughputs and deployments in which they are listed."""

Listing = Callable[..., Page[Any]]
Take = Callable[[int, TokenEvent | Generation], Awaitable[None]]
"""Is given each event of an answer, with the answer's number."""


@dataclass(frozen=True)
class _Work:
    """A request that is authenticated, read and resolved."""

    context: RequestContext
    target: targets.Target
    ask: Ask
    reply: answers.Reply
    entry: invocation_logs.Entry | None
    """What is logged of it; None where nothing is."""


class Answer:
    """The answer to one request, as an ASGI application."""

    def __init__(self, services: Services, request_id: str) -> None:
        self._services = services
        self._request_id = request_id
        self._status = 0
        self._caller = "-"
        self._send: Send = _unset
        self._entry: invocation_logs.Entry | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and write the request's line in the log, which has nothing of its body."""
        started = time.perf_counter()
        request = Request(scope, receive)
        self._send = send
        try:
            await self._answer(request)
        except ApiError as error:
            await self._refuse(error)
        except ClientDisconnect:
            self._status = 499  # for the log, as in handlers.py
        except anyio.get_cancelled_exc_class():  # the gateway ends, and waits no longer
            with anyio.CancelScope(shield=True):
                await self._refuse(ServiceUnavailableException(ENDING))
            raise
        except Exception as error:
            logger.exception("%s failed", self._request_id)
            await self._refuse(handlers.our_fault(error, self._request_id))
        logger.info(
            "%s %s %s %d %s %.1f ms",
            *(self._request_id, request.method, request.url.path, self._status, self._caller),
            1000 * (time.perf_counter() - started),
        )

    async def _answer(self, request: Request) -> None:
        body = await handlers.read_body(request, self._services.settings.max_body_bytes)
        signed = signed_request(request)
        # One hand-over to a thread for all that reads the database, as in handlers.py.
        done = await anyio.to_thread.run_sync(self._prepare, signed, body)
        if not isinstance(done, _Work):
            await self._send_whole(200, done)
        elif done.ask.stream:
            await handlers.while_connected(request, self._stream_logged(done))
        else:
            await self._send_whole(200, await handlers.while_connected(request, _whole(done)))

    def _prepare(self, signed: SignedRequest, body: bytes) -> _Work | dict[str, Any]:
        """Authenticate, read and resolve; returns the whole answer where no model is asked."""
        principal = self._authenticate(signed)
        self._caller = principal.arn
        path = signed.raw_path.removeprefix(f"/{FIRST_PART}").strip("/")
        first, _, identifier = path.partition("/")
        if first == "models":
            _check_method(signed, "GET")
            context = self._context(principal, "InvokeModel")
            return _model(context, unquote(identifier)) if identifier else _models(context)
        parse = {"chat/completions": parse_chat, "completions": parse_completion}.get(path)
        if parse is None:
            raise ApiError(
                f"Invalid URL ({signed.method} {signed.raw_path[:200]}). Offered are POST "
                "/v1/chat/completions, POST /v1/completions and GET /v1/models.",
                code="UnknownOperationException",
                http_status=404,
                members={"code": "unknown_url"},
            )
        _check_method(signed, "POST")
        value = read_json_object(body)
        name = model_id(value)
        operation = "InvokeModel"
        if value.get("stream") is True:
            operation = "InvokeModelWithResponseStream"
        context = self._context(principal, operation)
        target = _resolve(context, name, operation)
        kind: answers.Kind = "chat" if parse is parse_chat else "text"
        return _Work(
            context,
            target,
            _checked(context, target, parse(target.base, value)),
            answers.Reply(kind, name),
            invocation_logs.begin(self._services.invocation_log, context, {"modelId": name}, body),
        )

    def _authenticate(self, signed: SignedRequest) -> Principal:
        key = bearer_key(dict(signed.headers).get("authorization", ""))
        with self._services.engine.connect() as connection:
            principal = authenticate_api_key(connection, key) if key else None
        if principal is not None:
            return principal
        what = "The API key is not known here" if key else "The request has no API key"
        raise AccessDeniedException(
            f"{what}. Send `Authorization: Bearer KEY`; `outcrop env --bearer` prints the key that "
            "the first start made.",
            code="UnrecognizedClientException",
            http_status=401,
            members={"code": "invalid_api_key"},
        )

    def _context(self, principal: Principal, operation: str) -> RequestContext:
        return RequestContext(
            services=self._services,
            request_id=self._request_id,
            account=principal.account,
            region=self._services.settings.region,
            principal=principal,
            service="bedrock-runtime",
            operation=operation,
            received_at=datetime.now(UTC),
        )

    # --- sending ---------------------------------------------------------------------------------

    async def _stream_logged(self, work: _Work) -> None:
        if work.entry is not None:
            work.entry.is_stream = True
        self._entry = work.entry
        async with invocation_logs.following(work.entry):
            await self._stream(work)

    async def _stream(self, work: _Work) -> None:
        """Send the answers as they come. What is refused before the first token has its status.

        Several answers are asked for at once, and one of them may be refused when another has begun
        already. So nothing is sent before each of them has begun.
        """
        ask, reply = work.ask, work.reply
        ended: dict[int, Generation] = {}
        sent: dict[int, int] = {}
        not_begun = set(range(len(ask.requests)))
        held: list[tuple[int, TokenEvent | Generation]] = []

        async def take(index: int, event: TokenEvent | Generation) -> None:
            not_begun.discard(index)
            held.append((index, event))
            if not not_begun:
                for one in held:
                    await send(*one)
                held.clear()

        async def send(index: int, event: TokenEvent | Generation) -> None:
            prompt = ask.prompts[index]
            done = isinstance(event, Generation)
            if isinstance(event, Generation):
                event = answers.with_prompt(event, prompt, prompt_only=ask.prompt_only)
            elif prompt is None or ask.prompt_only:
                return  # nothing may be sent before the prompt's text, or nothing is wanted
            if index not in sent:
                sent[index] = len(prompt or "")
                if reply.kind == "chat" or prompt:
                    head = answers.text_chunk(reply, index, prompt or "", first=True)
                    await self._send_event(head, ask)
            # The end of an answer is in no event but the last, which has the whole text.
            text = event.text[sent[index] :] if done else event.text
            if text:
                sent[index] += len(text)
                await self._send_event(answers.text_chunk(reply, index, text), ask)
            if isinstance(event, Generation):
                ended[index] = event
                if calls := answers.calls_chunk(reply, index, event):
                    await self._send_event(calls, ask)
                await self._send_event(answers.last_chunk(reply, index, event), ask)

        await _ask_all(work, take)
        if ask.include_usage:
            generations = [ended[index] for index in range(len(ask.requests))]
            counts = answers.usage_chunk(reply, generations, ask.choices_each)
            await self._send_part(answers.event(counts))
        await self._send_part(answers.END_OF_STREAM, more=False)

    async def _send_event(self, chunk: dict[str, Any], ask: Ask) -> None:
        if ask.include_usage:
            chunk["usage"] = None  # says that one will come
        if self._entry is not None:
            self._entry.chunks.append(chunk)
        await self._send_part(answers.event(chunk))

    async def _send_part(self, body: bytes, *, more: bool = True) -> None:
        if not self._status:
            headers = {"content-type": "text/event-stream; charset=utf-8"}
            await self._begin(200, {**headers, "cache-control": "no-cache"})
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def _refuse(self, error: ApiError) -> None:
        status, body = answers.error(error)
        if self._status:  # the stream has begun, so its last event says how it ended
            await self._send_part(answers.event(body), more=False)
        else:
            hints = {name.lower(): text for name, text in retry_headers(error).items()}
            headers = {**answers.error_headers(status), **hints}
            if "allow" in error.members:
                headers["allow"] = str(error.members["allow"])
            await self._send_whole(status, body, headers)

    async def _send_whole(
        self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        head = {"content-type": "application/json", "content-length": str(len(body))}
        await self._begin(status, {**head, **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        named = {**headers, "x-request-id": self._request_id}
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            }
        )


async def _unset(message: Any) -> None:
    raise AssertionError("an answer is sent once it is called")


async def _whole(work: _Work) -> dict[str, Any]:
    async with invocation_logs.following(work.entry):
        answer = await _ask_whole(work)
        if work.entry is not None:
            work.entry.answer = lambda: answer
    return answer


async def _ask_whole(work: _Work) -> dict[str, Any]:
    ask = work.ask
    ended: dict[int, Generation] = {}

    async def take(index: int, event: TokenEvent | Generation) -> None:
        if isinstance(event, Generation):
            ended[index] = answers.with_prompt(
                event, ask.prompts[index], prompt_only=ask.prompt_only
            )

    await _ask_all(work, take)
    generations = [ended[index] for index in range(len(ask.requests))]
    return answers.whole(work.reply, generations, ask.choices_each)


async def _ask_all(work: _Work, take: Take) -> None:
    """Ask for all answers, several at the same time, and hand over their events one at a time.

    Raises:
        ApiError: as `runtime.stream`, for any of them; the others are given up.
    """
    one = anyio.Lock()
    room = anyio.Semaphore(MAX_AT_ONCE)

    async def ask(index: int) -> None:
        request = work.ask.requests[index]
        is_first = index % work.ask.choices_each == 0  # of the answers to its prompt
        answer = runtime.stream(work.context, work.target, request, with_prompt=is_first)
        async with room, aclosing(answer) as events:
            async for event in tools.scanned(request, events):
                async with one:
                    await take(index, event)

    try:
        async with anyio.create_task_group() as group:
            for index in range(len(work.ask.requests)):
                group.start_soon(ask, index)
    except BaseExceptionGroup as failed:
        raise _first(failed) from failed


def _first(failed: BaseExceptionGroup[BaseException]) -> BaseException:
    error = failed.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _check_method(signed: SignedRequest, allowed: str) -> None:
    if signed.method != allowed:
        raise ApiError(
            f"Not allowed to {signed.method} on {signed.raw_path[:200]}; use {allowed}.",
            code="UnknownOperationException",
            http_status=405,
            members={"allow": allowed, "code": "method_not_supported"},
        )


def _checked(context: RequestContext, target: targets.Target, ask: Ask) -> Ask:
    """Make sure that the model can be told of the tools."""
    settings = context.services.settings
    try:
        requests = [tools.check(settings, target.weights, one) for one in ask.requests]
    except ValidationException as error:
        members: dict[str, object] = {"param": "tools", "code": "unsupported_parameter"}
        raise ValidationException(error.message, members=members) from None
    return replace(ask, requests=tuple(requests))


def _resolve(context: RequestContext, identifier: str, operation: str) -> targets.Target:
    """Find the model, which is refused in OpenAI's way where it cannot be asked: 404."""
    try:
        return targets.resolve(context, identifier, operation)
    except ValidationException as error:
        raise ValidationException(
            error.message, http_status=404, members={"param": "model", "code": "model_not_found"}
        ) from error


def _models(context: RequestContext) -> dict[str, Any]:
    """List what the caller may ask: base models, custom models, throughputs in service,
    deployments and inference profiles.
    """
    with context.services.engine.connect() as connection:
        return {"object": "list", "data": _entries(connection, context)}


def _model(context: RequestContext, identifier: str) -> dict[str, Any]:
    """Describe one model, named in any way in which it can be asked."""
    target = _resolve(context, identifier, "InvokeModel")
    with context.services.engine.connect() as connection:
        listed = {item["id"]: item for item in _entries(connection, context)}
    # A context-suffixed id of a base model is not in the list.
    return listed.get(target.model_id) or answers.model(identifier, 0, target.base.provider_name)


def _entries(connection: Connection, context: RequestContext) -> list[dict[str, Any]]:
    policies = load_policies(connection, context.principal)

    def may_ask(arn: str) -> bool:
        return decide(policies, "bedrock:InvokeModel", arn) == "Allow"

    found = [
        # When a base model was made is not known, and 0 says so.
        answers.model(base.model_id, 0, base.provider_name)
        for base in context.services.catalog.models
        if may_ask(foundation_model_arn(context.region, base.model_id))
    ]
    listings: list[Listing] = [
        throughputs.list_throughputs,
        deployments.list_deployments,
        profiles.list_profiles,
    ]
    if context.services.settings.invoke_custom_models:
        listings.insert(0, models.list_models)
    listings.insert(0, list_imported_models)
    for listing in listings:
        position: tuple[int, str] | None = None
        while True:
            page = listing(
                *(connection, context.account, context.region),
                limit=MODELS_A_PAGE,
                after=position,
            )
            found += [
                answers.model(item.arn, int(item.created_at.timestamp()), item.account)
                for item in page.items
                if getattr(item, "status", "Active") in ANSWERING and may_ask(item.arn)
            ]
            position = page.next
            if position is None:
                break
    return found
