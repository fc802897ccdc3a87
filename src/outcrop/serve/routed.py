"""Two engines as one: the first for what it takes, our own for the rest.

The second is started when something first needs it: a custom model with weights of its own, or an
adapter that the first cannot hold.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

from outcrop.data.records import Message, Tool
from outcrop.errors import ModelError
from outcrop.serve.histogram import Counts
from outcrop.serve.interface import Deliver, Engine, EngineStats
from outcrop.serve.request import GenerationRequest

logger = logging.getLogger("outcrop.model-server")


class Choosy(Engine, Protocol):
    """An engine that does not take every custom model."""

    def takes(self, artifact: str | None) -> bool:
        """Return whether it answers for a custom model.

        Raises:
            ModelError: the artifact cannot be read.
        """


class RoutedEngine:
    """See `interface.Engine`."""

    def __init__(self, first: Choosy, open_second: Callable[[], Engine]) -> None:
        """
        Args:
            open_second: starts the other engine, which takes everything.
        """
        self._first = first
        self._open_second = open_second
        self._second: Engine | None = None
        self._lock = threading.Lock()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        """See `Engine.submit`. Numbers of the first engine are even, those of the other odd."""
        if self._takes(request.adapter):
            return 2 * self._first.submit(request, deliver)
        return 2 * self._other().submit(request, deliver) + 1

    def cancel(self, number: int) -> None:
        """See `Engine.cancel`."""
        engine = self._second if number % 2 else self._first
        if engine is not None:
            engine.cancel(number // 2)

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        """See `Engine.count_tokens`."""
        return self._first.count_tokens(messages, tools, prompt)

    def stats(self) -> EngineStats:
        """See `Engine.stats`: the sums of both."""
        first = self._first.stats()
        if self._second is None:
            return first
        return _sum(first, self._second.stats())

    def close(self) -> None:
        """See `Engine.close`."""
        with self._lock:
            if self._second is not None:
                self._second.close()
        self._first.close()

    def _takes(self, artifact: str | None) -> bool:
        try:
            return self._first.takes(artifact)
        except ModelError:
            return True  # it says what is wrong, to the one request that asks

    def _other(self) -> Engine:
        with self._lock:
            if self._second is None:
                logger.info("a custom model needs our own engine beside vLLM; it is started")
                self._second = self._open_second()
            return self._second


def _sum(first: EngineStats, second: EngineStats) -> EngineStats:
    """Add two engines' figures; they are idle for as long as the one that worked last."""
    summed: dict[str, Any] = {}
    for item in fields(EngineStats):
        one, other = getattr(first, item.name), getattr(second, item.name)
        if isinstance(one, Counts):
            summed[item.name] = one if one.bounds != other.bounds else _sum_counts(one, other)
        elif item.name == "idle_seconds":
            summed[item.name] = min(one, other)
        elif isinstance(one, Mapping):
            summed[item.name] = one or other  # only our own engine has classes and reservations
        else:
            summed[item.name] = one + other
    return replace(first, **summed)


def _sum_counts(one: Counts, other: Counts) -> Counts:
    counts = tuple(map(sum, zip(one.counts, other.counts, strict=True)))
    return Counts(one.bounds, counts, one.total + other.total)
