"""Rules about completions that are labels: how often each one stands."""

from __future__ import annotations

from collections.abc import Mapping

from outcrop.data.defects import Finding, Severity, shown

MAX_SHARE_OF_LABELS = 0.2
"""Completions are labels where there are at most so many different ones for each record."""
MIN_RECORDS = 20
IMBALANCE = 20.0
"""Times that the most frequent label may have the records of the rarest."""
MAX_SHARE = 0.9
MAX_LETTER_SHARE = 0.02
"""A completion of one letter is a label where at least so many records have it."""


def are_labels(counts: Mapping[str, int] | None) -> bool:
    """Return whether completions are labels: short, and few for the records there are."""
    if not counts or sum(counts.values()) < MIN_RECORDS:
        return False
    return 1 < len(counts) <= max(2, MAX_SHARE_OF_LABELS * sum(counts.values()))


def label_imbalance(counts: Mapping[str, int]) -> Finding | None:
    """Labels that have many times as many records as others.

    Args:
        counts: records of each label, where completions are labels.
    """
    most, least = max(counts, key=lambda name: counts[name]), min(counts, key=lambda n: counts[n])
    share = counts[most] / sum(counts.values())
    if counts[most] < IMBALANCE * counts[least] and share < MAX_SHARE:
        return None
    return Finding(
        "label_imbalance",
        Severity.ADVICE,
        f"Of {len(counts)} labels, {shown(most)} has {counts[most]:,} records ({share:.0%}) and "
        f"{shown(least)} has {counts[least]:,}.",
        shown(least),
    )


def rare_letter(letter: str, count: int, num_records: int) -> Finding | None:
    """A completion of one letter that hardly any other record has, so that it is no label."""
    if count >= max(3, MAX_LETTER_SHARE * num_records):
        return None
    return Finding(
        "low_information",
        Severity.REVIEW,
        f"completion is the letter {letter} alone, as in {count} of {num_records:,} records.",
        letter,
    )
