"""Converse, ConverseStream and CountTokens: one form of conversation for every model."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from outcrop.api.asked import asks, target_of
from outcrop.api.context import Output, RequestContext, StreamEvent, begun
from outcrop.api.runtime import count, generate, milliseconds
from outcrop.api.streaming import pieces
from outcrop.api.targets import Target
from outcrop.serve import tool_use as tools
from outcrop.serve.invocation import (
    converse_answer,
    metadata,
    read_converse,
    refuse_what_is_not_supported,
    stopped,
)
from outcrop.serve.prompt_formats import NativeRequest, parse_body
from outcrop.serve.prompt_formats.converse import parse_converse
from outcrop.serve.prompt_formats.tools import converse_block_events


@asks("InvokeModel")
async def converse(context: RequestContext, params: dict[str, Any]) -> Output:
    """Answer a conversation in one piece."""
    started = time.perf_counter()
    target, native = await _read(context, params, "InvokeModel")
    (generation,) = await generate(context, target, native)
    return Output(converse_answer(target.base, native, generation, params, milliseconds(started)))


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
        refuse_what_is_not_supported(source["converse"])
        native = parse_converse(target.base, source["converse"])
    native = await tools.checked(context.services.settings, target.weights, native)
    return Output({"inputTokens": await count(context, target, native)})


async def _read(
    context: RequestContext, params: dict[str, Any], action: str
) -> tuple[Target, NativeRequest]:
    target = await target_of(context, params["modelId"], action)
    native = read_converse(target.base, params, params["modelId"], context.region)
    return target, await tools.checked(context.services.settings, target.weights, native)


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
                yield "messageStop", stopped(target.base, native, piece.done, params)
                yield "metadata", metadata(piece.done, params, milliseconds(started))
