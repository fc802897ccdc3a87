"""Converse, ConverseStream and CountTokens: one form of conversation for every model."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from outcrop.api import tools
from outcrop.api.asked import asks, target_of
from outcrop.api.context import Output, RequestContext, StreamEvent, begun
from outcrop.api.runtime import GUARDRAILS, check_ways, count, generate, milliseconds
from outcrop.api.streaming import pieces
from outcrop.api.targets import Target
from outcrop.errors import ValidationException
from outcrop.serve.prompt_formats import NativeRequest, parse_body
from outcrop.serve.prompt_formats.converse import (
    REASONS,
    check_paths,
    parse_converse,
    response_fields,
)
from outcrop.serve.prompt_formats.tools import converse_block_events, converse_content
from outcrop.serve.request import Generation

NOT_SUPPORTED = {
    "guardrailConfig": GUARDRAILS,
    "outputConfig": "This model doesn't support the outputConfig field. Remove outputConfig and "
    "try again.",
    "promptVariables": "promptVariables is for prompts of Prompt management, which are not offered "
    "by this service. Remove promptVariables and try again.",
}
"""Members that change what is answered, and why they are refused."""


@asks("InvokeModel")
async def converse(context: RequestContext, params: dict[str, Any]) -> Output:
    """Answer a conversation in one piece."""
    started = time.perf_counter()
    target, native = await _read(context, params, "InvokeModel")
    (generation,) = await generate(context, target, native)
    message = {"role": "assistant", "content": converse_content(generation)}
    return Output(
        {
            "output": {"message": message},
            **_stopped(target, native, generation, params),
            **_metadata(generation, started, params),
        }
    )


@asks("InvokeModelWithResponseStream")
async def converse_stream(context: RequestContext, params: dict[str, Any]) -> Output:
    """Answer a conversation as the answer is made.

    What is refused before its first piece is refused as Converse refuses it.
    """
    started = time.perf_counter()
    target, native = await _read(context, params, "InvokeModelWithResponseStream")
    events = _events(context, target, native, params, started)
    return Output({}, stream=await begun(events))


@asks("CountTokens")
async def count_tokens(context: RequestContext, params: dict[str, Any]) -> Output:
    """Count the tokens of a body or a conversation, by the renderer of training and serving."""
    target = await target_of(context, params["modelId"], "CountTokens")
    source = params["input"]
    if "invokeModel" in source:
        native = parse_body(target.base, source["invokeModel"]["body"], streamed=True)
    else:
        _refuse_what_is_not_supported(source["converse"])
        native = parse_converse(target.base, source["converse"])
    native = await tools.checked(context.services.settings, target.weights, native)
    return Output({"inputTokens": await count(context, target, native)})


async def _read(
    context: RequestContext, params: dict[str, Any], action: str
) -> tuple[Target, NativeRequest]:
    target = await target_of(context, params["modelId"], action)
    _refuse_what_is_not_supported(params)
    latency = params.get("performanceConfig", {}).get("latency")
    tier = params.get("serviceTier", {}).get("type")
    check_ways(context, params["modelId"], latency, tier)
    check_paths(params.get("additionalModelResponseFieldPaths", ()))
    native = parse_converse(target.base, params)
    return target, await tools.checked(context.services.settings, target.weights, native)


def _refuse_what_is_not_supported(params: dict[str, Any]) -> None:
    for name, reason in NOT_SUPPORTED.items():
        if params.get(name):
            raise ValidationException(reason)


async def _events(
    context: RequestContext,
    target: Target,
    native: NativeRequest,
    params: dict[str, Any],
    started: float,
) -> AsyncGenerator[StreamEvent, None]:
    async with aclosing(pieces(context, target, native)) as found:
        async for piece in found:
            if piece.is_first:
                yield "messageStart", {"role": "assistant"}
            for event in converse_block_events(piece.blocks):
                yield event
            if piece.done is not None:
                yield "messageStop", _stopped(target, native, piece.done, params)
                yield "metadata", _metadata(piece.done, started, params)


def _stopped(
    target: Target, native: NativeRequest, generation: Generation, params: dict[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {"stopReason": REASONS[generation.finish_reason]}
    paths = params.get("additionalModelResponseFieldPaths", ())
    fields = response_fields(target.base, native, generation, paths) if paths else {}
    return found | ({"additionalModelResponseFields": fields} if fields else {})


def _metadata(generation: Generation, started: float, params: dict[str, Any]) -> dict[str, Any]:
    echoed = ("performanceConfig", "serviceTier")
    return {
        "usage": {
            "inputTokens": generation.input_tokens,
            "outputTokens": generation.output_tokens,
            "totalTokens": generation.input_tokens + generation.output_tokens,
        },
        "metrics": {"latencyMs": milliseconds(started)},
        **{name: params[name] for name in echoed if name in params},
    }
