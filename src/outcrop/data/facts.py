"""The nouns of a check: the files that go in, and what is known of them when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from outcrop.data.defects import Defect, Severity

TRAINING, VALIDATION, TEST = "training", "validation", "test"
ROLES = (TRAINING, VALIDATION, TEST)

MAX_LISTED = 100
"""Defects that are listed for each code; all are counted."""


@dataclass(frozen=True)
class DataFile:
    """A file to be checked."""

    name: str
    """As its owner named it: `train.jsonl`, `s3://bucket/train.jsonl`."""
    role: str
    """"training", "validation" or "test"."""
    open: Callable[[], AbstractContextManager[BinaryIO]]
    """Opens it for reading from its beginning; the stream may give less than is asked for."""
    num_bytes: int | None = None
    """Its size where that is known, for progress and to know that it did not change."""


@dataclass(frozen=True)
class FileFacts:
    """What one file is."""

    name: str
    role: str
    digest: str
    """SHA-256 of its bytes, in hex."""
    num_bytes: int
    num_lines: int
    num_records: int
    """Lines that are not blank."""
    num_usable: int
    """Records without a defect that rejects them."""
    format: str
    """The format of most records, as `formats.py` names it; "" where none was recognized."""
    formats: Mapping[str, int]
    """Records by the format they were recognized as; "" for none."""
    num_characters: int
    """Of the texts of usable records."""


@dataclass(frozen=True)
class Histogram:
    """How many values fall between neighbouring edges."""

    edges: tuple[int, ...]
    """Rising; one more than `counts`. A bin takes its lower edge in and the upper one not, but for
    the last, which takes both."""
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How long things are."""

    total: int
    minimum: int
    median: int
    percentile_95: int
    maximum: int
    histogram: Histogram


@dataclass(frozen=True)
class TokenStatistics:
    """Tokens of usable training records, as the model's own tokenizer and template make them."""

    total: Lengths
    """Of whole records or documents."""
    input: Lengths | None
    """Of the prompts, as they are rendered; None for documents."""
    output: Lengths | None
    """Of what comes after the prompt; None for documents."""
    limit: int
    """Tokens a record may have at this batch size; a longer document is cut."""
    num_no_label: int
    """Too long records whose prompt alone fills the limit: cut there, nothing is left to learn."""

    @property
    def epoch_tokens(self) -> int:
        """Tokens that one pass over the training records reads."""
        return self.total.total


@dataclass(frozen=True)
class LabelStatistics:
    """The completions of a set whose completions are labels."""

    counts: Mapping[str, int]
    """Records of each label, the most frequent first."""


@dataclass(frozen=True)
class Check:
    """What a check found."""

    base_model_id: str
    """"" where no model was named."""
    customization_type: str
    batch_size: int
    files: tuple[FileFacts, ...]
    defects: tuple[Defect, ...]
    """In the order of files and lines, those of a file as a whole first; at most MAX_LISTED of a
    code."""
    counts: Mapping[str, Mapping[Severity, int]]
    """Code -> severity -> how many were found, exactly."""
    tokens: TokenStatistics | None
    """None where no renderer was given, or no record can be used."""
    characters: Lengths | None
    """Of usable training records; None where there is none."""
    labels: LabelStatistics | None
    """None where completions are no labels."""
    languages: Mapping[str, int]
    """ISO 639-1 code -> records of a sample, the most frequent first."""
    num_exact_duplicates: int
    num_near_duplicates: int
    num_conflicts: int
    seconds: float
    """How long the check took."""

    def count(self, severity: Severity) -> int:
        """Return how many defects of a severity there are."""
        return sum(found.get(severity, 0) for found in self.counts.values())

    @property
    def is_rejected(self) -> bool:
        """Whether a job with these files would fail."""
        return self.count(Severity.REJECT) > 0

    @property
    def verdict(self) -> str:
        """ "rejected", "warnings" (something to drop, repair or review) or "clean"."""
        if self.is_rejected:
            return "rejected"
        warned = (Severity.DROP, Severity.REPAIR, Severity.REVIEW)
        return "warnings" if any(map(self.count, warned)) else "clean"
