"""Find texts that say nearly the same as an earlier one, among a million of them.

Texts come as the hashes of their runs of words (`shingles.py`). Runs that many texts have in
common, such as those of an instruction that stands in every prompt, say nothing about a text and
are left out. What is left is sketched (MinHash, by rensa) and put into buckets (locality-sensitive
hashing); texts that meet in a bucket are candidates. A candidate is a twin only if the share of
runs that both have, of the runs that either has, really is the threshold or more: it is counted on
the runs, not estimated, so a text is never called a twin because of a sketch.

The answer depends on the texts and their order alone. Memory is MEMORY_BYTES a text; the runs lie
in a temporary file without a name, 4 bytes a run, about 0.7 KB for a text of 1 KB.

Source: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and
Ullman, "Mining of Massive Datasets", section 3.4, for the buckets.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import BinaryIO, cast

import numpy as np
import rensa
from numpy.typing import NDArray

from outcrop.data.shingles import normalized, shingles, text_of
from outcrop.errors import SettingsError

DEFAULT_THRESHOLD = 0.85
"""Share of their runs that near duplicates have in common. A word put into a text of twenty words
is found; another question about the same paragraph is not, unless it is nearly as long."""
MIN_THRESHOLD = 0.5
"""LIMIT: below that, most texts of one kind would be candidates for one another."""

MEMORY_BYTES = 150
"""Of memory that a text needs, at most: 150 MB for a million."""

COMMON_SHARE = 0.2
"""A run that stands in more than this share of the texts, in COMMON_LEAST at least, is left out."""
COMMON_LEAST = 20
_SAMPLE_TEXTS = 4096
"""Texts, spread evenly, in which common runs are looked for."""

_BATCH_TEXTS = 4096
_RUN_BYTES = 4
_SEED = 42
_NEIGHBOURS = 4
"""A text is compared with the first few of its bucket and with the few before it: a bucket of texts
that have only their sketch in common does not cost the square of its size."""

# (lowest threshold, buckets a text is in, values of the sketch that name a bucket). Of texts that
# resemble each other just as the threshold demands, fewer than 1 in 200 pairs meet in no bucket.
_LAYOUTS = ((0.8, 20, 6), (0.65, 32, 4), (MIN_THRESHOLD, 42, 3))

_Ints = NDArray[np.int64]
_Hashes = NDArray[np.uint32]


class NearIndex:
    """Texts in order, and which of them say nearly the same. Use it in a `with` block."""

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        """Begin without texts.

        Args:
            threshold: MIN_THRESHOLD to 1; 1 asks for the same runs, whatever their order.
        Raises:
            SettingsError: the threshold is outside of that.
        """
        self.threshold = check_threshold(threshold)
        self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="outcrop-near-"))  # noqa: SIM115
        self._sizes: list[NDArray[np.int32]] = []
        self._labels: list[NDArray[np.uint64]] = []
        self._num_texts = 0
        self._kept: tuple[_Runs, NDArray[np.uint32]] | None = None

    def __enter__(self) -> NearIndex:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._num_texts

    def add_texts(self, texts: Sequence[str], labels: Sequence[str] | None = None) -> None:
        """Add texts as they stand, and what was answered to each: see `add`."""
        hashes, ends = shingles([normalized(text) for text in texts])
        self.add(hashes, ends, None if labels is None else label_hashes(labels))

    def add(
        self,
        hashes: NDArray[np.uint64],
        ends: _Ints,
        labels: NDArray[np.uint64] | None = None,
    ) -> None:
        """Add texts, which are numbered from 0 in the order they come in.

        Args:
            hashes, ends: as `shingles.shingles` returns them.
            labels: of each text, a hash of what must be the same in a twin, such as
                `label_hashes` of the completions; None where nothing must.
        """
        keys, counts = _distinct(hashes, ends)
        self._file.write(keys.tobytes())
        self._sizes.append(counts.astype(np.int32))
        same = np.zeros(len(ends), np.uint64) if labels is None else labels
        self._labels.append(same.astype(np.uint64))
        self._num_texts += len(ends)

    def twins(
        self,
        *,
        of: range | None = None,
        among: range | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[int, int]:
        """Return for each text that has a twin the first such twin.

        Without `among`, a twin is an earlier text that has no twin itself: so if all texts with a
        twin are left out, nothing that was left out stands for another. Of texts without words
        none is a twin.

        Args:
            of: the texts that are asked for, a range of step 1; None means all.
            among: where a twin may stand, whether before or after; a range that shares nothing
                with `of`.
            progress: called with the number of texts sketched so far.
        """
        if self._num_texts < 2:
            return {}
        runs, buckets = self._sketched(progress)
        labels = np.concatenate(self._labels)
        asked = of or range(self._num_texts)
        found: dict[int, int] = {}
        for text, other in self._candidates(runs, buckets, labels, asked, among):
            if text in found or (among is None and other in found):
                continue
            if _resemblance(runs.own(text), runs.own(other)) >= self.threshold:
                found[text] = other
        return found

    def groups(self, *, progress: Callable[[int], None] | None = None) -> NDArray[np.int64]:
        """Return for each text the first text of its group.

        Texts are in one group where one is a twin of the other, or both are of a third, and so on;
        whatever is in two groups is not nearly the same.

        Args:
            progress: as `twins` has it.
        """
        first = np.arange(self._num_texts)
        if self._num_texts < 2:
            return first

        def root(text: int) -> int:
            while first[text] != text:
                first[text] = first[first[text]]
                text = int(first[text])
            return text

        runs, buckets = self._sketched(progress)
        labels = np.concatenate(self._labels)
        everything = range(self._num_texts)
        for text, other in self._candidates(runs, buckets, labels, everything, None):
            one, two = root(text), root(other)
            if one != two and _resemblance(runs.own(text), runs.own(other)) >= self.threshold:
                first[max(one, two)] = min(one, two)
        return np.array([root(text) for text in range(self._num_texts)], np.int64)

    def _sketched(self, progress: Callable[[int], None] | None) -> tuple[_Runs, NDArray[np.uint32]]:
        """Return the runs of all texts and their buckets, which are made once."""
        if self._kept is None or len(self._kept[0].sizes) != self._num_texts:
            runs = _Runs(self._file, np.concatenate(self._sizes))
            num_bands, rows = next(
                (bands, rows) for least, bands, rows in _LAYOUTS if self.threshold >= least
            )
            self._kept = (runs, _buckets(runs, num_bands, rows, progress))
        return self._kept

    def _candidates(
        self,
        runs: _Runs,
        buckets: NDArray[np.uint32],
        labels: NDArray[np.uint64],
        of: range,
        among: range | None,
    ) -> Iterator[tuple[int, int]]:
        """Yield pairs (text, possible twin), by text and then by twin, each once."""
        label = (labels ^ (labels >> np.uint64(32))).astype(np.uint32)
        codes = np.empty(0, np.int64)
        for bucket in buckets:
            text, other = _neighbours(bucket ^ label, among)
            kept = (text >= of.start) & (text < of.stop)
            kept &= (labels[text] == labels[other]) & runs.is_comparable(
                text, other, self.threshold
            )
            codes = np.union1d(codes, text[kept] * self._num_texts + other[kept])
        for code in codes:
            yield divmod(int(code), self._num_texts)


class _Runs:
    """The runs of each text, those that many have in common left out."""

    def __init__(self, file: BinaryIO, sizes: NDArray[np.int32]) -> None:
        file.flush()
        self.sizes = sizes
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._file = file
        self._common = self._find_common()
        self._own_sizes = np.zeros(len(sizes), np.int32)

    def own(self, text: int) -> _Hashes:
        """Return the runs of one text, in rising order."""
        end = int(self._ends[text])
        found = self._read(end - int(self.sizes[text]), end)
        kept = found[~_is_in(found, self._common)]
        return kept if len(kept) else found

    def batches(self) -> Iterator[tuple[_Hashes, _Ints]]:
        """Yield the runs of all texts, some texts at a time, and where each ends."""
        for start in range(0, len(self.sizes), _BATCH_TEXTS):
            sizes = self.sizes[start : start + _BATCH_TEXTS].astype(np.int64)
            last = int(self._ends[min(start + _BATCH_TEXTS, len(self.sizes)) - 1])
            found = self._read(last - int(sizes.sum()), last)
            text = np.repeat(np.arange(len(sizes)), sizes)
            own = ~_is_in(found, self._common)
            own |= (np.bincount(text[own], minlength=len(sizes)) == 0)[text]
            counts = np.bincount(text[own], minlength=len(sizes))
            self._own_sizes[start : start + len(sizes)] = counts
            yield found[own], np.cumsum(counts)

    def is_comparable(self, text: _Ints, other: _Ints, threshold: float) -> NDArray[np.bool_]:
        """Return whether both have words, and numbers of runs that allow the threshold."""
        one, two = self._own_sizes[text], self._own_sizes[other]
        least = np.minimum(one, two)
        # A hair less, so that no rounding refuses what the count itself would take.
        return np.asarray((least > 0) & (least >= (threshold - 1e-9) * np.maximum(one, two)))

    def _read(self, first: int, last: int) -> _Hashes:
        """Return some runs by their places. A mapped file would count as memory, all of it."""
        content = os.pread(self._file.fileno(), (last - first) * _RUN_BYTES, first * _RUN_BYTES)
        return np.frombuffer(content, np.uint32)

    def _find_common(self) -> _Hashes:
        step = max(1, len(self.sizes) // _SAMPLE_TEXTS)
        chosen = np.arange(0, len(self.sizes), step)
        ends = self._ends[chosen].tolist()
        parts = [
            self._read(end - size, end)
            for end, size in zip(ends, self.sizes[chosen].tolist(), strict=True)
        ]
        hashes, counts = np.unique(np.concatenate(parts), return_counts=True)
        return np.asarray(hashes[(counts >= COMMON_LEAST) & (counts > COMMON_SHARE * len(chosen))])


def label_hashes(labels: Sequence[str]) -> NDArray[np.uint64]:
    """Return one hash of the words of each text, in their order; texts of the same words share it.

    Of a text without words its characters count.
    """
    found = np.empty(len(labels), np.uint64)
    for place, label in enumerate(labels):
        said = normalized(label) or label.strip()
        digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        found[place] = int.from_bytes(digest, "little")
    return found


def check_threshold(threshold: float) -> float:
    """Return the threshold.

    Raises:
        SettingsError: it is not from MIN_THRESHOLD to 1.
    """
    if not MIN_THRESHOLD <= threshold <= 1:  # also refuses NaN
        raise SettingsError(
            f"The threshold for near duplicates is {threshold}; it is {MIN_THRESHOLD} to 1."
        )
    return threshold


def _distinct(hashes: NDArray[np.uint64], ends: _Ints) -> tuple[_Hashes, _Ints]:
    """Return the different hashes of each text in 32 bits and rising order, and how many."""
    text = text_of(ends).astype(np.uint64)
    keys = np.sort((text << np.uint64(32)) | (hashes >> np.uint64(32)))
    keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)]]
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(ends))
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32), counts


def _buckets(
    runs: _Runs, num_bands: int, rows: int, progress: Callable[[int], None] | None
) -> NDArray[np.uint32]:
    """Return the buckets of the texts: for each band, the number of each text's bucket."""
    buckets = np.empty((num_bands, len(runs.sizes)), np.uint32)
    odd = np.arange(1, 2 * rows, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    start = 0
    for hashes, ends in runs.batches():
        offsets = np.concatenate(([0], ends)).astype(np.uint64)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            hashes.astype(np.uint64), offsets, num_bands * rows, _SEED
        )
        digests = np.array(matrix.to_rows(), np.uint64).reshape(len(ends), num_bands, rows)
        named = (digests * (odd | np.uint64(1))).sum(axis=2, dtype=np.uint64)
        buckets[:, start : start + len(ends)] = (named >> np.uint64(32)).astype(np.uint32).T
        start += len(ends)
        if progress:
            progress(start)
    return buckets


def _neighbours(bucket: NDArray[np.uint32], among: range | None) -> tuple[_Ints, _Ints]:
    """Return pairs of texts in one bucket: (text, possible twin)."""
    order = np.argsort(bucket, kind="stable")
    named = bucket[order]
    place = np.arange(len(order))
    is_first = np.concatenate(([True], named[1:] != named[:-1]))
    start = np.maximum.accumulate(np.where(is_first, place, 0))
    if among is not None:
        return _across(order, start, among)
    texts, others = [], []
    for ahead in range(_NEIGHBOURS):
        for other in (start + ahead, place - 1 - ahead):
            kept = (other >= start) & (other < place)
            texts.append(order[kept])
            others.append(order[other[kept]])
    return np.concatenate(texts), np.concatenate(others)


def _across(order: _Ints, start: _Ints, among: range) -> tuple[_Ints, _Ints]:
    """As `_neighbours`, for twins that stand in a range: the first ones of the bucket."""
    is_there = (order >= among.start) & (order < among.stop)
    before = np.concatenate(([0], np.cumsum(is_there)))  # of those, how many stand before a place
    there = order[is_there]
    begin = before[start]
    last = np.concatenate((np.flatnonzero(np.diff(start)) + 1, [len(order)]))
    stop = before[np.repeat(last, np.diff(last, prepend=0))]
    texts, others = [], []
    for ahead in range(_NEIGHBOURS):
        kept = (begin + ahead < stop) & ~is_there
        texts.append(order[kept])
        others.append(there[(begin + ahead)[kept]])
    return np.concatenate(texts), np.concatenate(others)


def _is_in(hashes: _Hashes, common: _Hashes) -> NDArray[np.bool_]:
    if not len(common):
        return np.zeros(len(hashes), bool)
    place = np.minimum(np.searchsorted(common, hashes), len(common) - 1)
    return np.asarray(common[place] == hashes)


def _resemblance(one: _Hashes, other: _Hashes) -> float:
    """Return the share of runs that both have of those that either has; both are sorted."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
