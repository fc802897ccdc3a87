"""The nouns of the data room: what a line of a data file becomes on its way to training."""

from __future__ import annotations

from dataclasses import dataclass

BETWEEN_BLOCKS = "\n\n"
"""What stands between the content blocks of one turn, in training and in serving."""


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
