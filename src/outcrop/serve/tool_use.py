"""Tools: whether a model can be told of them, and what of its answer is a call.

The chat template of the model decides; it is read as text (models/templates.py). Knows no form of
body and no socket.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

import anyio.to_thread

from outcrop.errors import ValidationException
from outcrop.models.templates import tool_support_of
from outcrop.serve.prompt_formats.native import NativeRequest
from outcrop.serve.request import Generation, TokenEvent
from outcrop.serve.tool_calls import CallScanner, Found, joined, new_call_id, scan
from outcrop.settings import Settings

NOT_SUPPORTED = "This model doesn't support tool use."


async def checked(settings: Settings, weights: str, native: NativeRequest) -> NativeRequest:
    """Return the request with the form in which the model calls tools, where it has any.

    Args:
        weights: key of the base weights that are asked.
    Raises:
        ValidationException: the model's template knows of no tools, or of a form of calls that is
            not known here, or the conversation ends with what the model is to go on with although
            it must call a tool.
    """
    if native.tool_use is None:
        return native
    return await anyio.to_thread.run_sync(check, settings, weights, native)


def check(settings: Settings, weights: str, native: NativeRequest) -> NativeRequest:
    """Do the same in a thread that may read files. Raises as `checked`."""
    use = native.tool_use
    if use is None:
        return native
    support = tool_support_of(settings, weights)
    if not support.takes_tools:
        raise ValidationException(NOT_SUPPORTED)
    if support.format is None:
        raise ValidationException(
            f"{NOT_SUPPORTED} Its chat template takes tools, but in what form it writes calls is "
            "not known here; known are those of Hermes and Qwen, of Llama 3 and of Mistral."
        )
    if use.choice in ("any", "tool") and native.messages[-1].role == "assistant":
        raise ValidationException(
            f"The choice of tools is {use.choice}, and the conversation ends with an assistant "
            "message that the answer goes on with. Remove one of them and try again."
        )
    return replace(native, tool_use=replace(use, format=support.format))


def scanner(native: NativeRequest) -> CallScanner | None:
    """Return what takes an answer apart; None where no call is looked for."""
    use = native.tool_use
    if use is None or use.format is None or use.choice == "none" or not use.tools:
        return None
    made = CallScanner(
        use.format, [tool.name for tool in use.tools], partial(new_call_id, use.id_prefix)
    )
    if use.start:
        made.add(use.start)
    return made


def with_calls(native: NativeRequest, generation: Generation) -> Generation:
    """Return an answer in one piece with its content taken apart."""
    found = scanner(native)
    return generation if found is None else with_content(generation, scan(found, generation.text))


def with_content(generation: Generation, content: Sequence[Found]) -> Generation:
    """Return an answer whose content is known.

    An answer that ended by itself and has a call waits for the tool; any other reason stays.
    """
    text = "".join(item for item in content if isinstance(item, str))
    ended = generation.finish_reason == "stop"
    called = any(not isinstance(item, str) for item in content)
    return replace(
        generation,
        text=text,
        content=tuple(content),
        finish_reason="tool_calls" if ended and called else generation.finish_reason,
    )


async def scanned(
    native: NativeRequest, events: AsyncIterable[TokenEvent | Generation]
) -> AsyncIterator[TokenEvent | Generation]:
    """Yield an answer's events without the calls in their texts; the last one has its content."""
    found = scanner(native)
    content: list[Found] = []
    length = 0
    async for event in events:
        if found is None:
            yield event
            continue
        done = isinstance(event, Generation)
        text = event.text[length:] if done else event.text
        length += len(text)
        new = [*found.add(text), *(found.finish() if done else [])]
        content += new
        if isinstance(event, Generation):
            yield with_content(event, joined(content))
        else:
            text = "".join(item for item in new if isinstance(item, str))
            yield replace(event, text=text)
