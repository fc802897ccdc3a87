"""Rules over all records together: the same twice, nearly the same, and contradictions.

Records are told apart by the hashes in `Columns`. A near duplicate has words nearly like those of an
earlier record, before the answer and in it; short answers must be the same, because a word makes
another label of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outcrop.data.columns import Columns
from outcrop.data.shingles import resemblance

MAX_PAIRS_OF_ONE = 8
"""Records of a band's bucket that each one is compared with: the first and the ones before it."""


@dataclass(frozen=True)
class Twin:
    """A record and the one that it repeats or contradicts, by their places in the columns."""

    record: int
    twin: int


def groups(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Yield the places, rising, of keys that stand more than once.

    Args:
        keys: [record] or [record, 2].
    """
    order, starts, ends = _runs(keys)
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]


def first_of(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each record the place of the first with the same key."""
    order, starts, ends = _runs(keys)
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], ends - starts)
    return first


def exact_duplicates(content: NDArray[np.uint64]) -> list[Twin]:
    """Return every record that says what an earlier one says."""
    first = first_of(content)
    return [Twin(int(place), int(first[place])) for place in np.flatnonzero(first < _places(first))]


def conflicts(columns: Columns, places: NDArray[np.int64]) -> list[Twin]:
    """Return records with the prompt of an earlier one and another completion.

    Args:
        places: the records to look at, none of them an exact duplicate.
    """
    places = places[(columns.prompt[places] != 0) & (columns.completion[places] != 0)]
    found = []
    for group in groups(columns.prompt[places]):
        members = places[group]
        completions = columns.completion[members]
        for place in np.flatnonzero(completions != completions[0]):
            found.append(Twin(int(members[place]), int(members[0])))
    return found


def near_pairs(
    columns: Columns, places: NDArray[np.int64], threshold: float
) -> Iterator[tuple[int, int]]:
    """Yield (earlier, later) records that say nearly the same, each pair once.

    Args:
        places: the records to look at, rising, none of them an exact duplicate of another.
        threshold: share of their runs of words that they have in common, at least.
    """
    candidates = _candidates(columns, places)
    for earlier, later in candidates:
        if _is_near(columns, int(earlier), int(later), threshold):
            yield int(earlier), int(later)


def _is_near(columns: Columns, one: int, other: int, threshold: float) -> bool:
    if columns.completion[one] != columns.completion[other]:
        answers = columns.completion_sketch
        first, second = answers.row(one), answers.row(other)
        if not len(first) or not len(second) or resemblance(first, second) < threshold:
            return False
    if columns.prompt[one] == columns.prompt[other]:
        return True
    prompts = columns.prompt_sketch
    return resemblance(prompts.row(one), prompts.row(other)) >= threshold


def _candidates(columns: Columns, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [pair, 2] places of records that share a band, sorted, each pair once."""
    places = places[columns.prompt[places] != 0]
    pairs = []
    for band in range(columns.bands.shape[1]):
        order, starts, ends = _runs(columns.bands[places, band])
        start_of = np.repeat(starts, ends - starts)
        here = np.arange(len(order))
        for back in range(1, MAX_PAIRS_OF_ONE):
            later = here[here - back >= start_of]
            pairs.append(np.stack((order[later - back], order[later]), axis=1))
        far = here[here - MAX_PAIRS_OF_ONE >= start_of]
        pairs.append(np.stack((order[start_of[far]], order[far]), axis=1))
    if not pairs:
        return np.empty((0, 2), np.int64)
    found = np.concatenate(pairs)
    found = found[np.lexsort((found[:, 0], found[:, 1]))]
    is_new = np.ones(len(found), bool)
    is_new[1:] = (found[1:] != found[:-1]).any(axis=1)
    return places[found[is_new]]


def _runs(
    keys: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Sort keys; return (order, starts, ends) of the runs of equal ones, each run rising."""
    if keys.ndim == 2:
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        changes = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    else:
        order = np.argsort(keys, kind="stable")
        changes = keys[order][1:] != keys[order][:-1]
    bounds = np.concatenate(([0], np.flatnonzero(changes) + 1, [len(order)]))
    if not len(order):
        bounds = np.zeros(1, np.int64)
    return order, bounds[:-1], bounds[1:]


def _places(array: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.arange(len(array))
