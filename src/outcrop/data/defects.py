"""What the checks of data find: a stable code, how grave it is, where it stands, and what to do.

A code is one word and never changes its meaning: programs, reports and documentation name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_SHOWN_CHARACTERS = 80
"""Of somebody's data that a message or a report quotes, at most."""


class Severity(StrEnum):
    """What becomes of a record with a defect; the gravest first."""

    REJECT = "reject"
    """It cannot be trained on. In a job it ends the job."""
    DROP = "drop"
    """It should be left out: another record says the same, or a test record does."""
    REPAIR = "repair"
    """Cleaning can mend it."""
    REVIEW = "review"
    """A person or a policy decides."""
    ADVICE = "advice"
    """Says something about the data as a whole; never a reason to refuse."""


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    file: str
    """As its owner named it, such as `s3://bucket/train.jsonl`."""
    line: int | None
    """Counts from 1; None where the file as a whole is meant."""


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong, or worth a look."""

    code: str
    severity: Severity
    place: Place
    message: str
    """For the owner: what, which value, what is allowed, what to do; without file and line."""
    value: str = ""
    """The data in question, at most MAX_SHOWN_CHARACTERS."""
    twin: Place | None = None
    """The earlier record that this one repeats or contradicts."""
