"""Find stop sequences in text that comes in pieces, and hold back what may still become one.

Knows neither tokens nor models; imports no torch. Whole characters are the tokenizer's business
(`models/tokenizer.py: IncrementalDecoder`).
"""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Finds the first stop sequence in text that comes in pieces.

    The one that is complete first counts, and of two that end together the longer; so where the
    text was cut into pieces makes no difference.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            (released, found): text that no stop sequence can reach any more, and the stop sequence
            that ended the text, or None. After one was found nothing may be added.
        """
        self._held += text
        found = self._first()
        if found is not None:
            start, stop = found
            released, self._held = self._held[:start], ""
            return released, stop
        keep = self._may_begin()
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(released) :]
        return released, None

    def finish(self) -> str:
        """Return the text that was held back: it became no stop sequence."""
        released, self._held = self._held, ""
        return released

    def _first(self) -> tuple[int, str] | None:
        places = [(self._held.find(stop), stop) for stop in self._stop]
        ends = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _may_begin(self) -> int:
        """Length of the longest end of the held text that some stop sequence begins with."""
        for length in range(min(len(self._held), self._longest - 1), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop if len(stop) > length):
                return length
        return 0
