"""The nouns of the data room: what a line of a data file becomes on its way to training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BETWEEN_BLOCKS = "\n\n"
"""What stands between the content blocks of one turn, in training and in serving."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may ask for."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the object that it takes."""


@dataclass(frozen=True)
class ToolCall:
    """A model asks for a tool."""

    id: str
    """By which the result is told apart."""
    name: str
    arguments: Mapping[str, Any]
    """A JSON object."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"; "tool" where it is the result of a call, which only prompts
    with tools have."""
    text: str
    calls: tuple[ToolCall, ...] = ()
    """What an assistant asks for after its text."""
    call_id: str | None = None
    """Of a result: the id of the call that it belongs to."""


@dataclass(frozen=True)
class Record:
    """One line of a data file, understood; the last message is the assistant's."""

    messages: tuple[Message, ...]
    file: str
    """The file as its owner named it, such as `s3://bucket/train.jsonl`."""
    line: int
    """Counts from 1."""


@dataclass(frozen=True)
class Document:
    """One line of raw text, for continued pre-training."""

    text: str
    file: str
    """As a record's."""
    line: int
    """Counts from 1."""


@dataclass(frozen=True)
class Example:
    """A record, or a piece of a document, as token ids, ready to be trained on or evaluated."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the token is to be learnt: an answer's or the end of one, or a document's; as
    long as `input_ids`."""
