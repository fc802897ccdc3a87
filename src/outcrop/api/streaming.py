"""InvokeModelWithResponseStream: an answer in the chunks of the model's family, as it is made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from outcrop.api.asked import asks, target_of
from outcrop.api.context import Output, RequestContext, StreamEvent, begun
from outcrop.api.runtime import (
    echoed,
    generate,
    milliseconds,
    refuse_what_is_not_offered,
    stream,
)
from outcrop.api.targets import Target
from outcrop.serve import tool_use as tools
from outcrop.serve.prompt_formats import FAMILIES, NativeRequest, Piece, dump, parse_body
from outcrop.serve.prompt_formats.native import Blocks
from outcrop.serve.request import Generation
from outcrop.serve.tool_calls import Found, joined

METRICS = "amazon-bedrock-invocationMetrics"
"""The key that the last chunk has besides its family's own."""


@asks("InvokeModelWithResponseStream")
async def invoke_model(context: RequestContext, params: dict[str, Any]) -> Output:
    """Answer a request in the body format of the model's family, in pieces.

    What is refused before the first piece is refused as InvokeModel refuses it.
    """
    started = time.perf_counter()
    target = await target_of(context, params["modelId"], "InvokeModelWithResponseStream")
    refuse_what_is_not_offered(context, params)
    native = parse_body(target.base, params.get("body", b""), streamed=True)
    native = await tools.checked(context.services.settings, target.weights, native)
    events = await begun(_chunks(context, target, native, started))
    return Output({"contentType": "application/json", **echoed(params)}, stream=events)


async def pieces(
    context: RequestContext, target: Target, native: NativeRequest, number: int = 0
) -> AsyncGenerator[Piece, None]:
    """Yield what is new of one answer, each time there is more; the last piece has it whole.

    Raises as `runtime.stream`.
    """
    length, is_first = 0, True
    scanner = tools.scanner(native)
    blocks = Blocks()
    content: list[Found] = []
    answer = stream(context, target, native, with_prompt=number == 0)
    async with aclosing(answer) as events:
        async for event in events:
            done = event if isinstance(event, Generation) else None
            text = done.text[length:] if done else event.text
            length += len(text)
            parts = blocks.open() if is_first and scanner is None else []
            if scanner is None:
                found: list[Found] = [text] if text else []
            else:
                found = [*scanner.add(text), *(scanner.finish() if done else [])]
                content += found
                text = "".join(item for item in found if isinstance(item, str))
            parts += blocks.add(found)
            if done is not None:
                parts += blocks.finish()
                done = done if scanner is None else tools.with_content(done, joined(content))
            yield Piece(
                *(text, event.input_tokens, event.output_tokens, number, is_first, done),
                blocks=tuple(parts),
            )
            is_first = False


async def _chunks(
    context: RequestContext, target: Target, native: NativeRequest, started: float
) -> AsyncGenerator[StreamEvent, None]:
    """Yield every chunk of every answer that is wanted; the last has the invocation's metrics."""
    family = FAMILIES[target.base.body_family]
    if native.in_pieces is False:  # the body wants a stream of one chunk
        generations = await generate(context, target, native)
        body = family.format(target.base, native, generations)
        yield _chunk(body | _metrics(generations, started, milliseconds(started)))
        return
    first_byte: int | None = None
    ended: list[Generation] = []
    for number in range(native.num_generations):
        async with aclosing(pieces(context, target, native, number)) as found:
            async for piece in found:
                if first_byte is None:
                    first_byte = milliseconds(started)
                chunks = family.chunks(target.base, native, piece)
                if piece.done is not None:
                    ended.append(piece.done)
                    if len(ended) == native.num_generations:
                        chunks[-1] |= _metrics(ended, started, first_byte)
                for chunk in chunks:
                    yield _chunk(chunk)


def _chunk(value: dict[str, Any]) -> StreamEvent:
    return "chunk", {"bytes": dump(value)}


def _metrics(generations: list[Generation], started: float, first_byte: int) -> dict[str, Any]:
    return {
        METRICS: {
            "inputTokenCount": generations[0].input_tokens,
            "outputTokenCount": sum(generation.output_tokens for generation in generations),
            "invocationLatency": milliseconds(started),
            "firstByteLatency": first_byte,
        }
    }
