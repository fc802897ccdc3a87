"""Rules over all records together: the same twice, nearly the same, contradictions, and leaks.

Records are told apart by the hashes in `Columns`. A near duplicate has words nearly like those
of an earlier record before the answer, and the same words in it: a word makes another label of a
short answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outcrop.data.columns import Columns
from outcrop.data.near import NearIndex, label_hashes

NO_ANSWER = label_hashes([""])[0]
"""The hash of an answer that is not there."""


@dataclass(frozen=True)
class Twin:
    """A record and the one that it repeats or contradicts, by their places in the columns."""

    record: int
    twin: int


@dataclass(frozen=True)
class Leak:
    """A record that is also in a file that it must not be in."""

    record: int
    twin: int
    is_same: bool
    """Whether it is there as it stands; otherwise (nearly) the same prompt is."""


def exact_duplicates(columns: Columns, places: range) -> list[Twin]:
    """Return every record that says what an earlier one says.

    Args:
        places: the records of one role.
    """
    first = _first_of(columns.content[places.start : places.stop])
    later = np.flatnonzero(first < np.arange(len(first)))
    return [Twin(places.start + int(place), places.start + int(first[place])) for place in later]


def near_duplicates(
    columns: Columns, places: range, index: NearIndex, exact: list[Twin]
) -> list[Twin]:
    """Return records that say nearly what an earlier one says, and not exactly.

    Args:
        places: the records of one role.
        index: the runs of words of all records, in the order of the columns.
        exact: what `exact_duplicates` returned.
    """
    same = {pair.record: pair.twin for pair in exact}
    found = index.twins(of=places)
    near = {}
    for record, twin in sorted(found.items()):
        if record in same or twin < places.start:
            continue
        near[record] = same.get(twin, twin)
    return [Twin(record, twin) for record, twin in near.items()]


def conflicts(columns: Columns, places: range, exact: list[Twin]) -> list[Twin]:
    """Return records with the prompt of an earlier one and another completion.

    Args:
        places: the records of one role.
        exact: what `exact_duplicates` returned.
    """
    part = slice(places.start, places.stop)
    prompts, completions = columns.prompt[part], columns.completion[part]
    first = _first_of(prompts)
    differs = (completions != completions[first]) & (prompts != 0)
    differs &= (completions != NO_ANSWER) & (completions[first] != NO_ANSWER)
    same = {pair.record for pair in exact}
    return [
        Twin(places.start + int(place), places.start + int(first[place]))
        for place in np.flatnonzero(differs)
        if places.start + int(place) not in same
    ]


def leaks(columns: Columns, of: range, among: range, index: NearIndex) -> list[Leak]:
    """Return the records of one role that another role's files have too.

    Args:
        of: the records that should not be there, such as those of training.
        among: the records that they are compared with, such as those of the test.
    """
    if not len(of) or not len(among):
        return []
    found: dict[int, Leak] = {}
    for keys, is_same in ((columns.content, True), (columns.prompt, False)):
        there = keys[among.start : among.stop]
        here = keys[of.start : of.stop]
        first = _first_of(np.concatenate((there, here)))[len(there) :]
        is_leak = first < len(there)
        if not is_same:
            is_leak &= here != 0
        for place in np.flatnonzero(is_leak):
            record = of.start + int(place)
            found.setdefault(record, Leak(record, among.start + int(first[place]), is_same))
    for record, twin in index.twins(of=of, among=among).items():
        found.setdefault(record, Leak(record, twin, False))
    return [found[record] for record in sorted(found)]


def _first_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each record the place of the first with the same key.

    Args:
        keys: [record] or [record, 2].
    """
    if keys.ndim == 2:
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        changes = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    else:
        order = np.argsort(keys, kind="stable")
        changes = keys[order][1:] != keys[order][:-1]
    starts = np.flatnonzero(np.concatenate(([True], changes))[: len(order)])
    sizes = np.diff(np.concatenate((starts, [len(order)])))
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], sizes)
    return first
