"""Which records repeat others: the same, nearly the same, or one of a validation or test file.

Turns the contents of records, in their order, into pairs of places. Two records are the same where
all that is said in them is; nearly the same as `near.py` has it, with the same words in the answer.
16 bytes a record are kept besides those of the index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outcrop.data.near import NearIndex
from outcrop.data.schemas import Content

DIGEST_BYTES = 16
_BATCH_RECORDS = 1024


@dataclass(frozen=True)
class Repeat:
    """A record that is to be left out, and the one that stays; by their places, from 0."""

    place: int
    twin: int
    is_same: bool
    """Whether it says the same to the character; otherwise nearly."""


class Records:
    """What records say, one after the other. Use it in a `with` block of its index."""

    def __init__(self, index: NearIndex) -> None:
        self._index = index
        self._digests = bytearray()
        self._prompts: list[str] = []
        self._answers: list[str] = []

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def add(self, content: Content) -> None:
        """Add a record."""
        prompt, answer = said(content)
        self._digests += digest(content)
        self._prompts.append(prompt)
        self._answers.append(answer)
        if len(self._prompts) == _BATCH_RECORDS:
            self._flush()

    def _flush(self) -> None:
        if self._prompts:
            self._index.add_texts(self._prompts, self._answers)
            self._prompts, self._answers = [], []

    def repeats(self, num_own: int, *, same: bool = True, near: bool = True) -> list[Repeat]:
        """Return the records that repeat an earlier one, in order.

        Args:
            num_own: of the first so many records; the others do not count.
            same, near: which kinds are looked for. Without `same`, a record that is the same as
                another is none that is nearly the same either.
        """
        self._flush()
        first = self._first_of_same(range(num_own))
        twins = {place: int(first[place]) for place in range(num_own) if int(first[place]) < place}
        found = [Repeat(place, twin, True) for place, twin in twins.items()] if same else []
        if near:
            for place, twin in self._index.twins(of=range(num_own)).items():
                if place not in twins:
                    found.append(Repeat(place, twins.get(twin, twin), False))
        return sorted(found, key=lambda repeat: repeat.place)

    def leaks(self, num_own: int, *, near: bool = True) -> list[Repeat]:
        """Return those of the first `num_own` records that the others have too."""
        self._flush()
        others = range(num_own, len(self))
        if not len(others):
            return []
        first = self._first_of_same(range(len(self)), preferred=num_own)
        found = {
            place: Repeat(place, int(first[place]), True)
            for place in range(num_own)
            if int(first[place]) >= num_own
        }
        if near:
            for place, twin in self._index.twins(of=range(num_own), among=others).items():
                found.setdefault(place, Repeat(place, twin, False))
        return [found[place] for place in sorted(found)]

    def _first_of_same(self, places: range, preferred: int = 0) -> NDArray[np.int64]:
        """Return for each record the first with the same digest.

        Args:
            preferred: records from this place on come before all others.
        """
        keys = np.frombuffer(bytes(self._digests[: places.stop * DIGEST_BYTES]), np.uint64)
        keys = keys.reshape(-1, 2)
        places_of = np.arange(len(keys))
        rank = np.where(places_of >= preferred, places_of, places_of + len(keys))
        order = np.lexsort((rank, keys[:, 1], keys[:, 0]))
        changes = (keys[order][1:] != keys[order][:-1]).any(axis=1)
        starts = np.flatnonzero(np.concatenate(([True], changes))[: len(order)])
        first = np.empty(len(keys), np.int64)
        first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(order))))
        return first


def said(content: Content) -> tuple[str, str]:
    """Return (what stands before the answer, the answer); a document has no answer."""
    if content.text is not None:
        return content.text, ""
    messages = content.messages
    if not messages:
        return "", ""
    answered = messages[-1].role == "assistant"
    before = messages[:-1] if answered else messages
    return "\n".join(message.text for message in before), messages[-1].text if answered else ""


def digest(content: Content) -> bytes:
    """Return DIGEST_BYTES that stand for all that a record says."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for role, text in _parts(content):
        encoded = text.encode("utf-8", "surrogatepass")
        found.update(f"{role} {len(encoded)} ".encode())
        found.update(encoded)
    return found.digest()


def _parts(content: Content) -> Sequence[tuple[str, str]]:
    if content.text is not None:
        return (("text", content.text),)
    return [(message.role, message.text) for message in content.messages]
