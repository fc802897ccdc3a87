"""Split a data file into a training and a validation file.

Records that say (nearly) the same before the answer stay on one side, so that no validation loss
measures memory. Where completions are labels, each label is split in the same proportion. Which
record goes where follows from the seed and from what the records say: not from their order, and
not from names. Lines are copied as they stand.

The file is read twice. Memory is about 200 bytes a record.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from outcrop.data.checks.labels import are_labels
from outcrop.data.defects import Unusable
from outcrop.data.facts import DataFile
from outcrop.data.formats import read_content, record_error
from outcrop.data.near import DEFAULT_THRESHOLD, NearIndex
from outcrop.data.output import check_target, write_whole
from outcrop.data.read import empty_file, line_error, scan_lines
from outcrop.data.recognition import main_format
from outcrop.data.repeats import DIGEST_BYTES, digest, said
from outcrop.data.schemas import Content
from outcrop.errors import DataError

DEFAULT_SHARE = 0.1
"""Of the records, that go to validation."""
MAX_LABEL_CHARACTERS = 60
"""A longer completion is no label."""
MAX_LABELS = 2000

_BATCH_RECORDS = 1024


@dataclass(frozen=True)
class Split:
    """What went where."""

    num_training: int
    num_validation: int
    training_digest: str
    """SHA-256 of the content, in hex."""
    validation_digest: str
    num_groups: int
    """Groups of records that say nearly the same; of one record, mostly."""
    labels: Mapping[str, tuple[int, int]]
    """Label -> records in (training, validation), the most frequent first; empty where completions
    are no labels."""


def split_file(
    data: DataFile,
    training: Path,
    validation: Path,
    formats: Sequence[str],
    *,
    share: float = DEFAULT_SHARE,
    seed: int = 0,
    near_threshold: float = DEFAULT_THRESHOLD,
    packed: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Split:
    """Split one file.

    Args:
        data: opened twice.
        training, validation: where the two are written.
        formats: those that are taken, as `formats.formats_for` returns them; of several, only the
            one that most records have.
        share: of the records, for validation; above 0 and below 1. Met exactly where groups allow.
        seed: another one gives another split.
        near_threshold: as in near.NearIndex.
        packed: whether both are packed with gzip.
        force: whether files that are there may be replaced.
        progress: called with the number of records read so far, over both readings.
    Raises:
        DataError: a line cannot be used, or there are too few records to split, or an output
            cannot be written, or the file changed between the readings.
    """
    if not 0 < share < 1:  # also refuses NaN
        raise DataError(
            f"The share for validation is {share}; it is above 0 and below 1.",
            code="bad_share",
            file=data.name,
        )
    if training == validation:
        raise DataError(
            f"{training} is named for both parts. Name two files.",
            code="cannot_write",
            file=str(training),
        )
    sources = [] if data.name.startswith("s3://") else [Path(data.name)]
    for path in (training, validation):
        check_target(path, sources, force=force)
    formats = main_format(data, formats)
    records, content_digest = _look(data, formats, near_threshold, progress)
    chosen = choose(
        records.groups, records.labels, Fraction(str(share)), records.keys(seed), data.name
    )
    reading = hashlib.sha256()
    with (
        write_whole(training, packed=packed) as training_out,
        write_whole(validation, packed=packed) as validation_out,
    ):
        for place, (raw, _) in enumerate(_records(data, formats, reading)):
            out = validation_out if place < len(chosen) and chosen[place] else training_out
            out.write(raw + b"\n")
            if progress:
                progress(len(chosen) + place + 1)
        if reading.hexdigest() != content_digest:
            raise DataError(
                f"{data.name} changed while it was read. Split it again when nothing writes to it.",
                code="changed_while_read",
                file=data.name,
            )
        return Split(
            training_out.num_lines,
            validation_out.num_lines,
            training_out.digest.hexdigest(),
            validation_out.digest.hexdigest(),
            len(np.unique(records.groups)),
            _label_counts(records, chosen),
        )


@dataclass(frozen=True)
class _Records:
    """What is known of the records, in their order."""

    groups: NDArray[np.int64]
    """The first record of the group of each."""
    labels: NDArray[np.int32]
    """The number of each one's label; 0 where completions are no labels."""
    label_names: tuple[str, ...]
    digests: bytes
    """DIGEST_BYTES of each, one after the other."""

    def keys(self, seed: int) -> NDArray[np.uint64]:
        """Return a number for each record that looks drawn, and follows from what it says."""
        salt = str(seed).encode()
        found = (
            hashlib.blake2b(
                self.digests[start : start + DIGEST_BYTES], digest_size=8, key=salt
            ).digest()
            for start in range(0, len(self.digests), DIGEST_BYTES)
        )
        return np.frombuffer(b"".join(found), np.uint64)


def choose(
    groups: NDArray[np.int64],
    labels: NDArray[np.int32],
    share: Fraction,
    keys: NDArray[np.uint64],
    file: str = "",
) -> NDArray[np.bool_]:
    """Return which records go to validation.

    Groups stay whole. The number of records is the nearest to the share that whole groups reach,
    but for some record on each side; each label has its part of it, as near as can be, and keeps
    one group in training.

    Args:
        groups: [record] the number of each one's group.
        labels: [record] the number of each one's label; that of a group is its first record's.
        share: above 0 and below 1.
        keys: [record] numbers that decide the order groups are taken in; a group's is its least.
    Raises:
        DataError: there is only one group, or no record.
    """
    names, first, group_of, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    if len(names) < 2:
        raise DataError(
            f"{file} has {len(groups)} records, and they say nearly the same or are too few to "
            "split. At least two different ones are needed.",
            code="too_few_records",
            file=file,
        )
    least = np.full(len(names), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, group_of, keys)
    order = np.lexsort((np.arange(len(names)), least))
    group_label = labels[first]
    target = min(max(round(len(groups) * share), 1), len(groups) - 1)
    quotas = _quotas(labels, share, target)
    taken = np.zeros(len(names), bool)
    left = Counter(group_label.tolist())
    total = 0
    for group in order.tolist():
        label, size = int(group_label[group]), int(sizes[group])
        if size <= quotas[label] and left[label] > 1:
            taken[group] = True
            quotas[label] -= size
            left[label] -= 1
            total += size
    # What labels could not fill with whole groups, others may.
    for group in order.tolist():
        label, size = int(group_label[group]), int(sizes[group])
        if not taken[group] and total + size <= target and left[label] > 1:
            taken[group] = True
            left[label] -= 1
            total += size
    missing = target - total
    rest = [
        group for group in order.tolist() if not taken[group] and left[int(group_label[group])] > 1
    ]
    if not total or missing > 0:
        others = rest or [group for group in order.tolist() if not taken[group]]
        smallest = min(others, key=lambda group: int(sizes[group]), default=None)
        if (
            smallest is not None
            and taken.sum() + 1 < len(names)
            and (not total or int(sizes[smallest]) - missing < missing)
        ):
            taken[smallest] = True
    return np.asarray(taken[group_of])


def _quotas(labels: NDArray[np.int32], share: Fraction, target: int) -> dict[int, int]:
    """Divide the records for validation among the labels, by the largest remainders."""
    found, counts = np.unique(labels, return_counts=True)
    exact = {
        int(label): int(count) * Fraction(target, len(labels))
        for label, count in zip(found, counts, strict=True)
    }
    quotas = {label: int(part) for label, part in exact.items()}
    missing = target - sum(quotas.values())
    by_remainder = sorted(exact, key=lambda label: (quotas[label] - exact[label], label))
    for label in by_remainder[:missing]:
        quotas[label] += 1
    return quotas


def _look(
    data: DataFile,
    formats: Sequence[str],
    near_threshold: float,
    progress: Callable[[int], None] | None,
) -> tuple[_Records, str]:
    """Read a file and find out which of its records belong together."""
    reading = hashlib.sha256()
    digests, prompts = bytearray(), bytearray()
    names: dict[str, int] = {}
    labels: list[int] = []
    held: list[str] = []
    counts: Counter[str] | None = Counter()
    with NearIndex(near_threshold) as index:
        for _, content in _records(data, formats, reading):
            prompt, answer = said(content)
            digests += digest(content)
            prompts += hashlib.blake2b(prompt.encode(), digest_size=8).digest()
            held.append(prompt)
            answer = answer.strip()
            if counts is not None:
                counts[answer] += 1
                if not answer or len(answer) > MAX_LABEL_CHARACTERS or len(counts) > MAX_LABELS:
                    counts = None
            labels.append(names.setdefault(answer, len(names)) if counts is not None else 0)
            if len(held) == _BATCH_RECORDS:
                index.add_texts(held)
                held = []
                if progress:
                    progress(len(labels))
        if held:
            index.add_texts(held)
        groups = _joined(index.groups(), np.frombuffer(bytes(prompts), np.uint64))
    is_labelled = counts is not None and are_labels(counts)
    return (
        _Records(
            groups,
            np.array(labels if is_labelled else [0] * len(labels), np.int32),
            tuple(names) if is_labelled else (),
            bytes(digests),
        ),
        reading.hexdigest(),
    )


def _joined(groups: NDArray[np.int64], prompts: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Put records with the very same prompt into one group, also where it has no words."""
    order = np.argsort(prompts, kind="stable")
    first = np.empty(len(order), np.int64)
    starts = np.concatenate(([True], prompts[order][1:] != prompts[order][:-1]))
    first[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    # Same prompts with words are in one group already; those without have only themselves.
    return np.asarray(groups[first])


def _records(
    data: DataFile, formats: Sequence[str], reading: hashlib._Hash
) -> Iterator[tuple[bytes, Content]]:
    """Yield every record, as its line and as what it says.

    Raises:
        DataError: a line cannot be used, or there is no record.
    """
    empty = True
    with data.open() as stream:
        for line in scan_lines(stream, data.name):
            if line.is_blank:
                continue
            if line.value is None:
                raise line_error(line.findings[-1], data.name, line.number)
            try:
                content = read_content(line.value, formats, [], text_only=False)
            except Unusable as error:
                raise record_error(
                    error.finding, line.value, formats, data.name, line.number
                ) from None
            empty = False
            reading.update(line.raw)
            yield line.raw, content
    if empty:
        raise empty_file(data.name)


def _label_counts(records: _Records, chosen: NDArray[np.bool_]) -> dict[str, tuple[int, int]]:
    number = len(records.label_names)
    validation = np.bincount(records.labels[chosen], minlength=number)
    total = np.bincount(records.labels, minlength=number)
    by_size = sorted(range(number), key=lambda label: (-int(total[label]), label))
    return {
        records.label_names[label]: (int(total[label] - validation[label]), int(validation[label]))
        for label in by_size
    }
