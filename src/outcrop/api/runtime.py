"""InvokeModel: from a model id and a native body to the model server and back.

Asks for the model server of what the id stands for (targets.py), waits for it where it has to be
loaded, and passes the request on. Weights and tokens are the server's business. Streams
(streaming.py) and Converse (converse.py) take the same way.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from outcrop.api.asked import asks, target_of
from outcrop.api.context import Output, RequestContext
from outcrop.api.targets import Target
from outcrop.errors import (
    ApiError,
    ModelNotReadyException,
    ModelTimeoutException,
    ServingError,
    ValidationException,
)
from outcrop.serve import tool_use as tools
from outcrop.serve.client import ModelClient
from outcrop.serve.invocation import GUARDRAILS, check_ways, generation_request
from outcrop.serve.prompt_formats import NativeRequest, format_body, parse_body
from outcrop.serve.request import Generation, GenerationRequest, Owner, TokenEvent
from outcrop.serve.whereabouts import (
    FIRST_LOOK_SECONDS,
    LONGEST_LOOK_SECONDS,
    find_server,
    is_touch_due,
)
from outcrop.store.rows import TokenUsage
from outcrop.wire.document import read_json
from outcrop.wire.model import service_model
from outcrop.wire.validate import validate

T = TypeVar("T")


@asks("InvokeModel")
async def invoke_model(context: RequestContext, params: dict[str, Any]) -> Output:
    """Answer a request in the body format of the model's family.

    The token counts come in headers, as clients read them there; they are counted, not estimated.
    """
    started = time.perf_counter()
    target = await target_of(context, params["modelId"], "InvokeModel")
    refuse_what_is_not_offered(context, params)
    native = parse_body(target.base, params.get("body", b""))
    native = await tools.checked(context.services.settings, target.weights, native)
    generations = await generate(context, target, native)
    body = format_body(target.base, native, generations)
    return Output(
        {"body": body, "contentType": "application/json", **echoed(params)},
        {
            "X-Amzn-Bedrock-Invocation-Latency": str(milliseconds(started)),
            "X-Amzn-Bedrock-Input-Token-Count": str(generations[0].input_tokens),
            "X-Amzn-Bedrock-Output-Token-Count": str(sum(g.output_tokens for g in generations)),
        },
    )


async def count(context: RequestContext, target: Target, native: NativeRequest) -> int:
    """Return how many tokens the prompt has, by the renderer that training and serving use.

    Raises as `generate`.
    """
    told = native.tool_use.tools if native.tool_use else ()
    if isinstance(native.raw_prompt, tuple):
        return len(native.raw_prompt)  # tokens already
    prompt = native.raw_prompt
    return await _with_server(
        context, target.weights, lambda client: client.count(native.messages, told, prompt)
    )


def milliseconds(since: float) -> int:
    """Return the whole milliseconds since an instant of `time.perf_counter`."""
    return int(1000 * (time.perf_counter() - since))


async def generate(
    context: RequestContext, target: Target, native: NativeRequest
) -> list[Generation]:
    """Have the model server answer; several times where the body asks for several answers.

    Raises:
        ModelNotReadyException: the server was not up in time; botocore asks again by itself.
        ModelTimeoutException: the answer took longer than `invoke_timeout_seconds`.
        ModelErrorException: the server ended while it answered, or cannot be started.
    """
    request = _generation_request(context, target, native)

    async def ask(client: ModelClient) -> list[Generation]:
        found = []
        for number in range(native.num_generations):
            last: TokenEvent | Generation | None = None
            # Read to its end: what an iteration leaves behind is closed at some later time only.
            events = client.stream(request, pieces=False)
            async for event in _counted(context, target, events, number == 0):
                last = event
            assert isinstance(last, Generation)
            found.append(tools.with_calls(native, last))
        return found

    return await _with_server(context, target.weights, ask)


async def stream(
    context: RequestContext,
    target: Target,
    native: NativeRequest,
    *,
    with_prompt: bool = True,
) -> AsyncGenerator[TokenEvent | Generation, None]:
    """Yield one answer as the model server makes it; the last event is the Generation.

    What is refused is refused before the first event. Closing the generator early
    (`contextlib.aclosing`) cancels the request in the model server. Time that its reader takes
    between events does not count as the model's.

    Args:
        with_prompt: whether the prompt counts as used; of several answers to one, the first only.
    Raises:
        ApiError: as `generate`, and as the model server refuses the request; after the first
            event too, where the server ends or the answer takes too long.
    """
    request = _generation_request(context, target, native)
    seconds = context.services.settings.invoke_timeout_seconds

    async def begin(
        client: ModelClient,
    ) -> tuple[AsyncGenerator[TokenEvent | Generation, None], TokenEvent | Generation, float]:
        started = time.monotonic()
        events = _counted(context, target, client.stream(request), with_prompt)
        return events, await anext(events), seconds - (time.monotonic() - started)

    events, event, left = await _with_server(context, target.weights, begin)
    async with aclosing(events):
        yield event
        while not isinstance(event, Generation):
            # Around each event, not around all: a cancel scope may not lie across a yield.
            asked = time.monotonic()
            try:
                with anyio.fail_after(max(0.0, left)):
                    event = await anext(events)
            except TimeoutError:
                raise _too_slow(seconds) from None
            left -= time.monotonic() - asked
            yield event


async def _counted(
    context: RequestContext,
    target: Target,
    events: AsyncGenerator[TokenEvent | Generation, None],
    with_prompt: bool,
) -> AsyncGenerator[TokenEvent | Generation, None]:
    """Pass an answer on, and count its tokens at its end, however that comes."""
    last: TokenEvent | Generation | None = None
    try:
        async with aclosing(events):
            async for event in events:
                last = event
                yield event
    finally:
        if last is not None:
            context.tally.input_tokens += last.input_tokens if with_prompt else 0
            context.tally.output_tokens += last.output_tokens
            context.services.usage.count(
                context.account,
                context.region,
                target.model_arn,
                target.throughput.arn if target.throughput else "",
                TokenUsage(
                    requests=int(with_prompt),
                    input_tokens=last.input_tokens if with_prompt else 0,
                    output_tokens=last.output_tokens,
                ),
                endpoint_arn=target.endpoint_arn,
            )


def _generation_request(
    context: RequestContext, target: Target, native: NativeRequest
) -> GenerationRequest:
    throughput = target.throughput
    return generation_request(
        native,
        adapter=str(target.artifact) if target.artifact else None,
        adapter_digest=target.digest,
        owner=Owner(
            account=context.account,
            model=target.model_arn,
            reservation=throughput.id if throughput else None,
            units=throughput.model_units if throughput else 0,
        ),
    )


async def _with_server(
    context: RequestContext, weights: str, ask: Callable[[ModelClient], Awaitable[T]]
) -> T:
    """Ask the weights' model server, which is started where it does not run.

    A server that was ended between the look at its row and the request (it was idle, or it
    crashed) has done nothing yet, so the request waits for the next one, until the time is up.
    """
    settings = context.services.settings
    deadline = time.monotonic() + settings.model_start_seconds
    while True:
        client = await _ready_client(context, weights, deadline)
        try:
            with anyio.fail_after(settings.invoke_timeout_seconds):
                return await ask(client)
        except TimeoutError:
            raise _too_slow(settings.invoke_timeout_seconds) from None
        except ServingError:
            if time.monotonic() >= deadline:
                raise ModelNotReadyException(
                    "The model server does not answer. Try again."
                ) from None
            await anyio.sleep(LONGEST_LOOK_SECONDS)


async def _ready_client(context: RequestContext, weights: str, deadline: float) -> ModelClient:
    services = context.services
    client = services.model_clients.get(weights)
    # Its server answers as long as it keeps a connection open; its row is looked at when its use is
    # to be written. That saves a hand-over to a thread.
    if (
        client is not None
        and client.is_connected
        and not is_touch_due(services.settings, weights, services.touched)
    ):
        return client
    pause = FIRST_LOOK_SECONDS
    while True:
        address = await anyio.to_thread.run_sync(_look_for_server, context, weights)
        if address is not None:
            return services.model_client(weights, address)
        if time.monotonic() + pause > deadline:
            raise ModelNotReadyException(
                "The model is being loaded and will be ready to serve soon. Try again."
            )
        await anyio.sleep(pause)
        pause = min(2 * pause, LONGEST_LOOK_SECONDS)


def _look_for_server(context: RequestContext, weights: str) -> Path | None:
    """Return where the weights' server listens; None where it is not up, and so is wanted."""
    services = context.services
    row = find_server(services.settings, services.engine, weights, services.touched)
    return None if row is None or row.address is None else Path(row.address)


def _too_slow(seconds: float) -> ModelTimeoutException:
    return ModelTimeoutException(
        f"The model did not answer within {seconds} s. Ask for fewer tokens, or raise "
        "invoke_timeout_seconds."
    )


def refuse_what_is_not_offered(context: RequestContext, params: dict[str, Any]) -> None:
    """Check what InvokeModel's headers ask for, streamed or not.

    Raises:
        ValidationException: a guardrail, another media type, a latency or a tier that this service
            does not have, or metadata that cannot be kept; the message names it.
    """
    if params.get("guardrailIdentifier"):
        raise ValidationException(GUARDRAILS)
    accept = params.get("accept", "application/json")
    if accept not in ("application/json", "*/*"):
        raise ValidationException(f"accept is {accept!r}; this service answers application/json.")
    check_ways(
        *(params["modelId"], context.region),
        *(params.get("performanceConfigLatency"), params.get("serviceTier")),
    )
    if "requestMetadata" in params:
        _check_metadata(params["requestMetadata"])


def echoed(params: dict[str, Any]) -> dict[str, Any]:
    """Return the members of InvokeModel's answer that say how it was served: as asked for."""
    names = ("performanceConfigLatency", "serviceTier")
    return {name: params[name] for name in names if name in params}


def _check_metadata(text: str) -> None:
    """Check a header's JSON as Converse's member of the same name is checked."""
    try:
        metadata = read_json(text.encode("utf-8"))
    except ApiError as error:
        raise ValidationException(f"requestMetadata is not JSON: {error.message}") from None
    shape = service_model("bedrock-runtime").operation_model("Converse").input_shape
    validate(shape, {"modelId": "any", "requestMetadata": metadata})
