"""What a check says once all records were scanned: rules over all of them, and statistics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from outcrop.data.checks import amounts, duplicates, labels, language, tokens
from outcrop.data.columns import Columns, joined
from outcrop.data.defects import Finding, Severity
from outcrop.data.facts import (
    ROLES,
    TEST,
    TRAINING,
    VALIDATION,
    Check,
    DataFile,
    FileFacts,
    Histogram,
    LabelStatistics,
    Lengths,
    TokenStatistics,
)
from outcrop.data.findings import Findings
from outcrop.data.limits import TokenCheck
from outcrop.data.near import NearIndex
from outcrop.data.scanning import MAX_LABELS, Scanned
from outcrop.models.catalog import BaseModel

MAX_SAMPLES = 4000
MAX_LETTERS = 1000
NUM_BINS = 40


class Gathered:
    """What was gathered from all chunks, in their order."""

    def __init__(self, index: NearIndex) -> None:
        """Begin with nothing.

        Args:
            index: takes the runs of words of all records.
        """
        self.index = index
        self.num_no_label = 0
        self.letters: list[tuple[int, int, str]] = []
        self.samples: list[tuple[int, int, str]] = []
        self.labels: Counter[str] | None = Counter()
        """Of the first file; None where completions are no labels."""
        self._columns: list[Columns] = []

    def add(self, file: int, scanned: Scanned) -> None:
        """Take in what became of a chunk of a file."""
        self.num_no_label += scanned.num_no_label
        if file == 0:
            self._add_labels(scanned.labels)
            room = MAX_LETTERS - len(self.letters)
            self.letters += [(file, line, letter) for line, letter in scanned.letters[:room]]
        self.samples += [(file, line, text) for line, text in scanned.samples]
        if len(self.samples) > 2 * MAX_SAMPLES:
            self.samples = self.samples[::2]
        columns = scanned.columns
        if columns is None or scanned.runs is None or scanned.run_ends is None:
            return
        columns.file[:] = file
        self._columns.append(columns)
        self.index.add(scanned.runs, scanned.run_ends, columns.completion)

    def columns(self) -> Columns | None:
        """Return the columns of all usable records; None where there is none."""
        return joined(self._columns) if self._columns else None

    def _add_labels(self, counts: Counter[str] | None) -> None:
        if self.labels is None:
            return
        if counts is None:
            self.labels = None
            return
        self.labels.update(counts)
        if len(self.labels) > MAX_LABELS:
            self.labels = None


def summarize(
    *,
    files: Sequence[DataFile],
    facts: Sequence[FileFacts],
    findings: Findings,
    gathered: Gathered,
    base: BaseModel | None,
    customization_type: str,
    batch_size: int,
    hyper_parameters: Mapping[str, str],
    quotas: Mapping[str, int],
    began: float,
) -> Check:
    """Apply the rules over all records, and put together what was found.

    Args:
        files, facts: the same files in the same order, that of ROLES.
        findings: what was found in single records; more is added.
        quotas: role -> the operator's; 0 keeps the family's.
        began: when the check did, on the monotonic clock.
    """
    roles = [file.role for file in files]
    first = {role: roles.index(role) for role in ROLES if role in roles}
    counts = {
        role: sum(fact.num_records for fact in facts if fact.role == role)
        for role in (TRAINING, VALIDATION)
        if role in first
    }
    for role, finding in amounts.record_quotas(base, customization_type, counts, quotas):
        findings.add(first[role], None, finding)

    columns = gathered.columns()
    repeats = (0, 0, 0)
    statistics = characters = None
    if columns is not None:
        ranges = _ranges(columns, roles)
        repeats = _repeats(columns, ranges, gathered.index, findings)
        training = slice(ranges[TRAINING].start, ranges[TRAINING].stop)
        statistics = _token_statistics(columns, training, base, batch_size, gathered)
        characters = _lengths(columns.num_characters[training])
        _find_outliers(columns, ranges[TRAINING], statistics is not None, findings)
    is_labelled = labels.are_labels(gathered.labels)
    _find_letters(gathered, facts[0].num_records, findings)
    if is_labelled and gathered.labels is not None:
        imbalance = labels.label_imbalance(gathered.labels)
        if imbalance is not None:
            findings.add(0, None, imbalance)
    languages = _find_languages(gathered, findings)
    if TRAINING in counts:
        num_records = counts[TRAINING]
        num_tokens = statistics.total.total if statistics else None
        has_validation = VALIDATION in first
        for finding in (
            *amounts.amount(base, customization_type, num_records, num_tokens),
            *amounts.training_plan(hyper_parameters, num_records, has_validation=has_validation),
        ):
            findings.add(first[TRAINING], None, finding)
    return Check(
        base_model_id=base.model_id if base else "",
        customization_type=customization_type,
        batch_size=batch_size,
        files=tuple(facts),
        defects=findings.defects(),
        counts=findings.counts(),
        tokens=statistics,
        characters=characters,
        labels=(
            LabelStatistics(dict(gathered.labels.most_common()))
            if is_labelled and gathered.labels is not None
            else None
        ),
        languages=dict(languages.most_common()),
        num_exact_duplicates=repeats[0],
        num_near_duplicates=repeats[1],
        num_conflicts=repeats[2],
        seconds=time.monotonic() - began,
    )


def _ranges(columns: Columns, roles: Sequence[str]) -> dict[str, range]:
    """Return where each role's records stand: files come in the order of ROLES."""
    rank = np.array([ROLES.index(role) for role in roles])[columns.file]
    bounds = np.searchsorted(rank, np.arange(len(ROLES) + 1))
    return {
        role: range(int(bounds[place]), int(bounds[place + 1])) for place, role in enumerate(ROLES)
    }


def _repeats(
    columns: Columns, ranges: Mapping[str, range], index: NearIndex, findings: Findings
) -> tuple[int, int, int]:
    """Find what stands twice, nearly twice, contradicts itself, or is in another role's file.

    Returns:
        How many exact duplicates, near duplicates and contradictions there are.
    """

    def where(place: int) -> tuple[int, int]:
        return int(columns.file[place]), int(columns.line[place])

    totals = [0, 0, 0]
    for places in ranges.values():
        exact = duplicates.exact_duplicates(columns, places)
        near = duplicates.near_duplicates(columns, places, index, exact) if len(places) > 1 else []
        clashing = duplicates.conflicts(columns, places, exact)
        for place, (finding, pairs) in enumerate(
            ((_EXACT, exact), (_NEAR, near), (_CONFLICT, clashing))
        ):
            totals[place] += len(pairs)
            for pair in pairs:
                findings.add(*where(pair.record), finding, where(pair.twin))
    found: set[int] = set()
    for role, other in ((TRAINING, TEST), (TRAINING, VALIDATION), (VALIDATION, TEST)):
        for leak in duplicates.leaks(columns, ranges[role], ranges[other], index):
            if leak.record not in found:
                found.add(leak.record)
                findings.add(
                    *where(leak.record), _leak(other, is_same=leak.is_same), where(leak.twin)
                )
    return totals[0], totals[1], totals[2]


_EXACT = Finding("exact_duplicate", Severity.DROP, "An earlier record says the same.")
_NEAR = Finding("near_duplicate", Severity.DROP, "An earlier record says nearly the same.")
_CONFLICT = Finding(
    "conflicting_label",
    Severity.REVIEW,
    "An earlier record has the same prompt and another completion.",
)


def _leak(role: str, *, is_same: bool) -> Finding:
    what = "The record" if is_same else "A record with nearly the same prompt"
    return Finding(f"{role}_leak", Severity.DROP, f"{what} is in the {role} file too.")


def _token_statistics(
    columns: Columns,
    training: slice,
    base: BaseModel | None,
    batch_size: int,
    gathered: Gathered,
) -> TokenStatistics | None:
    inputs, outputs = columns.num_input[training], columns.num_output[training]
    total = _lengths(inputs + outputs)
    if base is None or total is None or not total.maximum:
        return None
    has_answers = bool(outputs.any())
    return TokenStatistics(
        total=total,
        input=_lengths(inputs) if has_answers else None,
        output=_lengths(outputs) if has_answers else None,
        limit=TokenCheck(base, batch_size).longest_piece,
        num_no_label=gathered.num_no_label,
    )


def _lengths(values: NDArray[np.uint32]) -> Lengths | None:
    """Return how long things are; None where there is none."""
    if not len(values):
        return None
    longest = int(values.max())
    width = max(1, -(-(longest + 1) // NUM_BINS))
    counts = np.bincount(values // np.uint32(width))
    return Lengths(
        total=int(values.sum(dtype=np.int64)),
        minimum=int(values.min()),
        median=int(np.median(values)),
        percentile_95=int(np.percentile(values, 95)),
        maximum=longest,
        histogram=Histogram(
            tuple(width * place for place in range(len(counts) + 1)), tuple(map(int, counts))
        ),
    )


def _find_outliers(
    columns: Columns, training: range, are_counted: bool, findings: Findings
) -> None:
    part = slice(training.start, training.stop)
    lengths, unit = columns.num_characters[part], "characters"
    if are_counted:
        lengths, unit = columns.num_input[part] + columns.num_output[part], "tokens"
    found, median = tokens.outliers(lengths)
    for place in found:
        length = int(lengths[place])
        message = f"It has {length:,} {unit}; half of the records have {median:,.0f} or fewer."
        findings.add(
            int(columns.file[training.start + place]),
            int(columns.line[training.start + place]),
            Finding("outlier_length", Severity.REVIEW, message, f"{length:,} {unit}"),
        )


def _find_letters(gathered: Gathered, num_records: int, findings: Findings) -> None:
    """Find completions of one letter that are no label, in the first file of so many records."""
    counts = Counter(letter for _, _, letter in gathered.letters)
    for file, line, letter in gathered.letters:
        finding = labels.rare_letter(letter, counts[letter], num_records)
        if finding is not None:
            findings.add(file, line, finding)


def _find_languages(gathered: Gathered, findings: Findings) -> Counter[str]:
    samples = [(str(place), text) for place, (_, _, text) in enumerate(gathered.samples)]
    found, first = language.languages(samples)
    for name, finding in language.language_mix(found):
        file, line, _ = gathered.samples[int(first[name])]
        findings.add(file, line, finding)
    return found
