"""Render a prompt with tools: what a model may call, what it called and what came back.

As in `render.py`, a template never sees what stands in messages: marks stand in their place, and
the contents are encoded apart. The descriptions of tools and what calls were given are shown to it,
because templates walk through them; control tokens in those are marks as well, so that they stay
plain characters. A text that a template writes into JSON comes back as JSON's own spelling of it.

Differs from the plain prompt in one point: what the template says by itself about the model stays,
because it stands in the same turn as the tools.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outcrop.data.records import Message, Tool, ToolCall
from outcrop.errors import DataError
from outcrop.models.tokenizer import Tokenizer

FIRST_MARK = 0x100000
NUM_MARKS = 0x8000
"""Messages and control tokens of one prompt; as many characters after them mean the same inside
JSON."""
SHOWN = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + 2 * NUM_MARKS - 3)}]")
_RAW = re.compile(f"[{chr(FIRST_MARK)}-{chr(FIRST_MARK + NUM_MARKS - 3)}]")
ID_LENGTH = 9
"""Characters of a call's id in a prompt. Source: Mistral's template refuses any other length."""

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], bool], str]
"""(messages, tools, whether an answer is asked for) -> the template's text."""


def spelt_in_json(text: str) -> str:
    """Return a text of JSON in which marks say that they stand in JSON."""
    return _RAW.sub(lambda found: chr(ord(found[0]) + NUM_MARKS), text)


def render_tool_prompt(
    render: Render,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    start: str,
) -> list[int]:
    """Return what a model is given so that it answers, or goes on with the assistant's last text.

    Args:
        start: what the answer begins with, as the template would write it.
    Raises:
        DataError: the template refuses these messages or does not show one of them, or a text is
            not encodable.
    """
    marks = _Marks(tokenizer)
    told = [_message(message, marks) for message in messages]
    named = [_tool(tool, marks) for tool in tools]
    if messages[-1].role == "assistant":
        text = render(told, named, False)
        last = told[-1]["content"]
        if last in text and last:
            text = text[: text.index(last) + 1]
    else:
        text = _opened(render, told, named, marks)
    marks.check_shown(text)
    try:
        return marks.encode(text + start)
    except ValueError as error:
        raise DataError(
            f"A message or a tool cannot be encoded: {error}.", code="lone_surrogate", file=""
        ) from None


def _opened(
    render: Render,
    told: list[dict[str, Any]],
    named: list[dict[str, Any]],
    marks: _Marks,
) -> str:
    """Return the text up to where the model begins to write, as `Renderer._prompt_text` does."""
    opened = render(told, named, True)
    mark = marks.of("x")
    try:
        answered = render([*told, {"role": "assistant", "content": mark}], named, False)
    except DataError:  # it takes no answer here, yet it did open one
        return opened
    before = answered[: answered.index(mark)] if mark in answered else opened
    glue = before.removeprefix(opened)
    return opened if before.startswith(opened) and not glue.strip() else before


class _Marks:
    """Characters for private use that stand for texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._contents: list[int] = []
        words = sorted(tokenizer.added_tokens, key=len, reverse=True)
        self._unsafe = re.compile("|".join([SHOWN.pattern, *map(re.escape, words)]))

    def of(self, text: str) -> str:
        """Return the mark of a text; "" for no text, which templates look for."""
        if not text:
            return ""
        if len(self._texts) == NUM_MARKS - 2:
            raise _refused(f"A prompt with tools has at most {NUM_MARKS - 2} texts.")
        self._texts.append(text)
        return chr(FIRST_MARK + len(self._texts) - 1)

    def without_control(self, value: Any) -> Any:
        """Return a JSON value with marks in the place of what would be read as control tokens."""
        if isinstance(value, str):
            return self._unsafe.sub(lambda found: self.of(found[0]), value)
        if isinstance(value, Mapping):
            return {
                self.without_control(key): self.without_control(item) for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.without_control(item) for item in value]
        return value

    def content(self, text: str) -> str:
        """Return the mark of a message's text, which must be shown."""
        mark = self.of(text)
        self._contents += [ord(mark) - FIRST_MARK] if mark else []
        return mark

    def check_shown(self, text: str) -> None:
        """Refuse a text that lacks a message's, or shows it twice."""
        found = Counter((ord(mark) - FIRST_MARK) % NUM_MARKS for mark in SHOWN.findall(text))
        if any(found[index] != 1 for index in self._contents):
            raise _refused(
                "The model's chat template does not show every text of this conversation with "
                "tools once. Some templates show no text beside a call: leave it out."
            )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for found in SHOWN.finditer(text):
            ids += self._scaffold(text[start : found.start()])
            place = ord(found[0]) - FIRST_MARK
            content = self._texts[place % NUM_MARKS]
            if place >= NUM_MARKS:
                content = json.dumps(content, ensure_ascii=False)[1:-1]
            ids += self._tokenizer.encode(content)
            start = found.end()
        return ids + self._scaffold(text[start:])

    def _scaffold(self, text: str) -> list[int]:
        return self._tokenizer.encode_scaffold(text) if text else []


def _message(message: Message, marks: _Marks) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": marks.content(message.text)}
    if message.calls:
        told["tool_calls"] = [_call(call, marks) for call in message.calls]
    if message.call_id is not None:
        told["tool_call_id"] = short_id(message.call_id)
    return told


def _call(call: ToolCall, marks: _Marks) -> dict[str, Any]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {
        "id": short_id(call.id),
        "type": "function",
        "function": marks.without_control(function),
    }


def _tool(tool: Tool, marks: _Marks) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": marks.without_control(function)}


def short_id(call_id: str) -> str:
    """Return the id under which a prompt names a call: the same for the same call."""
    digest = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()
    return digest[:ID_LENGTH]


def _refused(message: str) -> DataError:
    return DataError(message, code="refused_by_template", file="")
