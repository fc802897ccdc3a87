"""Turns of families whose bodies carry messages: content blocks to text, roles to an order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from outcrop.data.records import Message
from outcrop.serve.prompt_formats.schema import Field, check, refuse

TEXT = Field("string", required=True)


def text_of(block: Any, path: str, ignored: tuple[str, ...] = ()) -> str:
    """Return the text of a content block `{"text": ...}`.

    Args:
        path: where the block is, for the error.
        ignored: keys that may stand beside the text.
    Raises:
        ValidationException: the block is something else; an image or tool is named.
    """
    if not isinstance(block, dict):
        refuse(f"{path}: expected type: JSONObject")
    others = sorted(key for key in block if key not in ("text", *ignored))
    if others and "text" not in block:
        refuse(f"{path}: content of type {others[0][:80]} is not supported by this model")
    text: str = check(
        {key: value for key, value in block.items() if key not in ignored}, {"text": TEXT}
    )["text"]
    return text


def join_turns(turns: Iterable[Message], system: str) -> tuple[Message, ...]:
    """Put the system text first and join turns of one role that follow each other.

    Where the last turn is the assistant's, the model goes on with it.

    Raises:
        ValidationException: the first turn is not the user's, or a turn is empty.
    """
    joined = [
        Message(role, "\n".join(turn.text for turn in group))
        for role, group in groupby(turns, key=lambda turn: turn.role)
    ]
    if joined[0].role != "user":
        refuse('#/messages: the first message must use the "user" role')
    for place, turn in enumerate(joined):
        if not turn.text:
            refuse(f"#/messages/{place}/content: text must not be empty")
    head = (Message("system", system),) if system else ()
    return (*head, *joined)
