"""What every family's body is turned into: the one form the rest of the service knows."""

from __future__ import annotations

from dataclasses import dataclass

from outcrop.data.records import Message
from outcrop.serve.request import SamplingParams


@dataclass(frozen=True)
class NativeRequest:
    """An InvokeModel body, taken apart."""

    messages: tuple[Message, ...]
    sampling: SamplingParams
    prompt: str = ""
    """The prompt as sent, for families that repeat it in the answer."""
    num_generations: int = 1
    """Answers that are wanted, each drawn anew."""
