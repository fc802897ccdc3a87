"""What a model server needs of an engine, whatever computes in it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from outcrop.data.records import Message, Tool
from outcrop.serve.histogram import Counts
from outcrop.serve.request import Event, GenerationRequest

Deliver = Callable[[Event], None]
"""Takes the events of one request, from the engine's thread."""


@dataclass(frozen=True)
class ClassStats:
    """What became of the requests of one class: provisioned, or on demand."""

    num_active: int
    num_waiting: int
    num_throttled: int
    """Requests that were refused since the start, because too much was asked."""
    served_tokens: int
    """Tokens computed for them: of prompts, and drawn. What was computed again counts once."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done and is doing."""

    num_active: int
    num_waiting: int
    num_requests: int
    """Finished in any way since the start, cancelled ones included."""
    input_tokens: int
    output_tokens: int
    base_bytes: int
    """Memory of the base's matrices; 0 where the engine does not tell."""
    num_own: int
    """Custom models in memory that have weights of their own."""
    own_bytes: int
    """Memory of those."""
    num_adapters: int
    """Adapters in memory."""
    adapter_bytes: int
    num_adapter_loads: int
    num_passes: int
    prefix_tokens: int
    """Tokens of prompts that were not computed, because another request had them."""
    num_preempted: int
    """How often a request gave its pages back to an older one."""
    num_pages: int
    num_pages_kept: int
    """That no request uses and that can be taken over."""
    num_pages_free: int
    page_bytes: int
    """Memory of the pages that hold something of use."""
    idle_seconds: float
    """Since the last request ended; 0 while there is one."""
    first_token_seconds: Counts
    """From a request's arrival to its first token."""
    token_seconds: Counts
    """From one token of an answer to the next."""
    pass_tokens: Counts
    """Tokens that a pass computed."""
    classes: Mapping[str, ClassStats] = field(default_factory=dict)
    """By `provisioned` and `on_demand`."""
    reservations: Mapping[str, float] = field(default_factory=dict)
    """By the id of a provisioned throughput: which part of what it may have ahead of its rate is
    used, 0 to 1; from 1 on its requests are refused."""
    full_batch_tokens_per_second: float = 0.0
    """What the machine answers with this model in a full batch; 0 where the engine does not say."""


class Engine(Protocol):
    """What a model server needs of an engine. Every method may be called from any thread."""

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """Take a request and return its number; events follow from another thread.

        Raises:
            ValidationException: the prompt and the answer do not fit the context.
            ThrottlingException: too many requests are waiting.
        """

    def cancel(self, number: int) -> None:
        """Give up a request before its next token; one that has ended is left alone."""

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        """Return how many tokens the prompt has.

        Args:
            prompt: a text as it stands, instead of messages; control tokens in it are such.

        Raises:
            ValidationException: the messages cannot be rendered.
        """

    def stats(self) -> EngineStats:
        """Return the figures of this moment."""

    def close(self) -> None:
        """End all requests with an error, and the engine."""
