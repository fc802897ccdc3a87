"""A request inside the engine."""

from __future__ import annotations

import time

from outcrop.errors import ApiError
from outcrop.serve.backend import Memory
from outcrop.serve.interface import Deliver
from outcrop.serve.pages import PageTable
from outcrop.serve.request import GenerationRequest
from outcrop.serve.sequence import TokenSequence


class Task:
    """What the engine keeps of a request until it ends."""

    def __init__(
        self, request: GenerationRequest, sequence: TokenSequence, deliver: Deliver
    ) -> None:
        self.request, self.sequence, self.deliver = request, sequence, deliver
        self.started = time.monotonic()
        self.last_token: float | None = None
        self.cancelled = False
        self.refusal: ApiError | None = None
        """Why it has to end before it was begun."""
        self.num_charged = 0
        """Tokens of its prompt that were taken into account."""
        self.table = PageTable()
        self.memory = Memory()

    @property
    def scope(self) -> bytes:
        """What its keys and values depend on beside its tokens."""
        return f"of {self.request.adapter or 'the base'}".encode()

    @property
    def num_left(self) -> int:
        """Tokens that are to be computed before the next one can be drawn."""
        return len(self.sequence.ids) - self.sequence.num_computed

    def num_scores(self, length: int) -> int:
        """Return of how many of its next tokens the scores are wanted."""
        if self.sequence.wants_prompt_scores and self.sequence.output_tokens == 0:
            return length
        return int(length == self.num_left)

    def is_late(self) -> bool:
        """Return whether its time is up."""
        limit = self.request.timeout_seconds
        return limit is not None and time.monotonic() - self.started > limit
