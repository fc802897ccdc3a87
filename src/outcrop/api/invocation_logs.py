"""What is logged of an invocation: the request, the answer or its error, who asked, what it took.

Follows one call from its beginning to its end, streams too, and hands one record over to the spool
(log_spool.py). Knows nothing of places and of delivery.

Source: user guide, "Monitor model invocation using CloudWatch Logs and Amazon S3": the record's
members and the switches for text, images and embeddings.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from botocore.model import OperationModel

from outcrop.api.context import EventStream, Output, RequestContext, StreamEvent
from outcrop.api.log_spool import InvocationLog, Pending
from outcrop.data.schemas import LOG_TYPE
from outcrop.errors import AccessDeniedException, ApiError
from outcrop.wire.serialize import to_json

LOGGED = ("InvokeModel", "InvokeModelWithResponseStream", "Converse", "ConverseStream")
"""Operations of bedrock-runtime whose calls are logged. CountTokens asks no model."""
SCHEMA_VERSION = "1.0"
JSON_TYPE = "application/json"
CLIENT_LEFT = "ClientDisconnected"
"""The errorCode of an answer that nobody waited for. Bedrock documents none for it."""
OUR_FAULT = "InternalServerException"
_SWITCHES = {
    "text": "textDataDeliveryEnabled",
    "image": "imageDataDeliveryEnabled",
    "video": "videoDataDeliveryEnabled",
    "audio": "audioDataDeliveryEnabled",
}


@dataclass
class Entry:
    """One call that is logged, from its beginning to its end."""

    log: InvocationLog
    config: Mapping[str, Any]
    """The account's configuration when the call came."""
    context: RequestContext
    model_id: str
    metadata: dict[str, str] | None
    body: bytes
    """The request's, as it was sent."""
    answer: Callable[[], Any] | None = None
    """Gives the answer as JSON; None where there is none. Called in the spool's thread."""
    chunks: list[Any] = field(default_factory=list)
    """What a stream has sent."""
    is_stream: bool = False
    latency_ms: int | None = None

    def pending(self, error_code: str | None) -> Pending:
        """Return the record, to be built where it holds up nobody."""
        size = len(self.body) + sum(len(str(chunk)) for chunk in self.chunks)
        return Pending(
            self.context.account, self.context.region, size, lambda: self._build(error_code)
        )

    def _build(self, error_code: str | None) -> dict[str, Any]:
        context = self.context
        asked: dict[str, Any] = {"inputContentType": JSON_TYPE}
        raw: dict[str, str] = {}
        try:
            body = json.loads(self.body or b"null", parse_constant=_refuse)
            delivers = self._delivers(body)
        except (ValueError, RecursionError):  # it was refused; what it was is kept as it is
            if self._delivers(None):
                raw["input"] = base64.b64encode(self.body).decode()
            asked["inputContentType"] = "application/octet-stream"
        else:
            if delivers:
                asked["inputBodyJson"] = body
        asked["inputTokenCount"] = context.tally.input_tokens
        answered: dict[str, Any] = {"outputContentType": JSON_TYPE}
        found = self.chunks if self.is_stream else self.answer() if self.answer else None
        if found is not None and found != [] and self._delivers(found):
            answered["outputBodyJson"] = found
        answered["outputTokenCount"] = context.tally.output_tokens
        record = {
            "timestamp": f"{context.received_at:%Y-%m-%dT%H:%M:%SZ}",
            "accountId": context.account,
            "identity": {"arn": context.principal.arn},
            "region": context.region,
            "requestId": context.request_id,
            "operation": context.operation,
            "modelId": self.model_id,
            **({"requestMetadata": self.metadata} if self.metadata else {}),
            **({"errorCode": error_code} if error_code else {}),
            **({} if self.latency_ms is None else {"latencyMs": self.latency_ms}),
            "input": asked,
            "output": answered,
            "schemaType": LOG_TYPE,
            "schemaVersion": SCHEMA_VERSION,
        }
        place = self.config["s3Config"]
        return {
            "bucket": place["bucketName"],
            "prefix": place.get("keyPrefix", ""),
            "at": context.received_at.isoformat(),
            "raw": raw,
            "record": record,
        }

    def _delivers(self, body: Any) -> bool:
        """Whether the configuration lets a body of these kinds of data out."""
        kinds = {"text"} | _kinds(body)
        return all(self.config.get(_SWITCHES[kind], True) for kind in kinds)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _kinds(value: Any) -> set[str]:
    """Return what a body holds besides text."""
    if isinstance(value, list):
        return set().union(*map(_kinds, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found = {kind for kind in _SWITCHES if kind != "text" and value.get(kind)}
    if value.get("images") or value.get("type") == "image":  # Llama's, and Claude's
        found.add("image")
    return found.union(*map(_kinds, value.values()))


def begin(
    log: InvocationLog | None, context: RequestContext, params: Mapping[str, Any], body: bytes
) -> Entry | None:
    """Return the entry of a call that is to be logged; None where it is not. Reads the database."""
    if log is None or context.service != "bedrock-runtime" or context.operation not in LOGGED:
        return None
    config = log.configuration(context.account, context.region)
    if config is None:
        return None
    return Entry(
        *(log, config, context, str(params.get("modelId", ""))),
        metadata=_metadata(params.get("requestMetadata")),
        body=body,
    )


def _metadata(value: object) -> dict[str, str] | None:
    """Return what the caller gave with a call: a header's JSON, or a member of Converse."""
    if isinstance(value, str):
        with suppress(ValueError):  # else the operation refuses it
            value = json.loads(value)
    return value if isinstance(value, dict) else None


@contextmanager
def noting_refusal(entry: Entry | None) -> Iterator[None]:
    """Log a call that is refused in a `with` block before anything is asked of a model."""
    try:
        yield
    except AccessDeniedException:
        raise
    except Exception as error:
        if entry is not None:
            entry.log.put(entry.pending(error.code if isinstance(error, ApiError) else OUR_FAULT))
        raise


async def logged(entry: Entry, model: OperationModel, answer: Awaitable[Output]) -> Output:
    """Wait for a call's answer and log how it ended; a stream is logged at its end.

    A call that the caller was not allowed is not logged: it is not part of what the account did.
    """
    try:
        output = await answer
    except AccessDeniedException:
        raise
    except BaseException as error:
        await _end(entry, error)
        raise
    if output.stream is not None:
        entry.is_stream = True
        events = _passed_on(entry, output.stream)
        # Begun here, so that closing it later closes what it reads.
        return replace(output, stream=EventStream(await anext(events), events))
    entry.answer = lambda: _as_json(model, output.members)
    latency = output.headers.get("X-Amzn-Bedrock-Invocation-Latency")
    if latency is None:
        latency = output.members.get("metrics", {}).get("latencyMs")
    entry.latency_ms = None if latency is None else int(latency)
    await entry.log.put_and_wait(entry.pending(None))
    return output


@asynccontextmanager
async def following(entry: Entry | None) -> AsyncIterator[None]:
    """Log at the end of a `with` block what the entry has by then, and how the block ended."""
    try:
        yield
    except BaseException as error:
        if entry is not None:
            await _end(entry, error)
        raise
    if entry is not None:
        await entry.log.put_and_wait(entry.pending(None))


async def _passed_on(entry: Entry, stream: EventStream) -> AsyncGenerator[StreamEvent, None]:
    try:
        async with aclosing(stream.rest):
            _note(entry, stream.first)
            yield stream.first
            async for event in stream.rest:
                _note(entry, event)
                yield event
    except BaseException as error:
        await _end(entry, error)
        raise
    await entry.log.put_and_wait(entry.pending(None))


async def _end(entry: Entry, error: BaseException) -> None:
    """Log a call that failed, or that nobody waited for."""
    if isinstance(error, ApiError):
        await entry.log.put_and_wait(entry.pending(error.code))
    elif isinstance(error, Exception):
        await entry.log.put_and_wait(entry.pending(OUR_FAULT))
    else:  # cancelled, or closed by its reader: nothing may be waited for here
        entry.log.put(entry.pending(CLIENT_LEFT))


def _note(entry: Entry, event: StreamEvent) -> None:
    name, members = event
    if name == "chunk":
        chunk = json.loads(members["bytes"])
        entry.chunks.append(chunk)
        metrics = chunk.get("amazon-bedrock-invocationMetrics", {})
        entry.latency_ms = metrics.get("invocationLatency", entry.latency_ms)
    else:
        entry.chunks.append({name: dict(members)})
        latency = members.get("metrics", {}).get("latencyMs")
        entry.latency_ms = entry.latency_ms if latency is None else latency


def _as_json(model: OperationModel, members: Mapping[str, Any]) -> Any:
    if "body" in members:
        return json.loads(members["body"])
    return to_json(
        model.output_shape, {name: value for name, value in members.items() if value is not None}
    )
