"""The nouns of the data room: what a line of a data file becomes on its way to training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    text: str


@dataclass(frozen=True)
class Record:
    """One line of a data file, understood; the last message is the assistant's."""

    messages: tuple[Message, ...]
    file: str
    """The file as its owner named it, such as `s3://bucket/train.jsonl`."""
    line: int
    """Counts from 1."""


@dataclass(frozen=True)
class Example:
    """A record as token ids, ready to be trained on or evaluated."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the token is an answer's or ends one; as long as `input_ids`."""
