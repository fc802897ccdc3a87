"""What every family's body is turned into, and its answer made of: the forms the rest knows."""

from __future__ import annotations

from dataclasses import dataclass

from outcrop.data.records import Message
from outcrop.serve.request import Generation, SamplingParams


@dataclass(frozen=True)
class NativeRequest:
    """The body of a request, taken apart."""

    messages: tuple[Message, ...]
    sampling: SamplingParams
    prompt: str = ""
    """The prompt as sent, for families that repeat it in the answer."""
    num_generations: int = 1
    """Answers that are wanted, each drawn anew."""
    raw_prompt: str | tuple[int, ...] | None = None
    """What the model goes on with as it stands, instead of messages: `GenerationRequest.prompt`."""
    in_pieces: bool | None = None
    """Whether the body itself wants its answer in pieces; None where its family does not say."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer that is streamed."""

    text: str
    """Text that no piece before had; may be empty."""
    input_tokens: int
    output_tokens: int
    """Tokens drawn so far."""
    number: int = 0
    """Which of several answers, from 0."""
    is_first: bool = False
    done: Generation | None = None
    """The whole answer, in its last piece."""
