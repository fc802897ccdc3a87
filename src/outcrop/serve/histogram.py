"""How often values fell below bounds: what a scraper makes quantiles of. Imports no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """A histogram at one moment."""

    bounds: tuple[float, ...]
    """Upper ones, inclusive, ascending; above the last one there is no bound."""
    counts: tuple[int, ...]
    """Values of each interval, one more than bounds."""
    total: float
    """Of all values."""


class Histogram:
    """Counts values. Written by one thread, read by any."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def counts(self) -> Counts:
        """Return what was counted."""
        return Counts(self._bounds, tuple(self._counts), self._total)
