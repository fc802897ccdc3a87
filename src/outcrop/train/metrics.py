"""The numbers of a training run as rows, and the rows as the two CSV files of a job's output.

The columns and their order are Bedrock's; clients read the last two columns of the last row as
loss and perplexity. Source: user guide, "Analyze the results of a model customization job".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP_COLUMNS = ("step_number", "epoch_number", "training_loss", "perplexity")
VALIDATION_COLUMNS = ("step_number", "epoch_number", "validation_loss", "perplexity")


@dataclass(frozen=True)
class StepRow:
    """One optimizer step."""

    step_number: int
    """Counts from 0 over the whole run."""
    epoch_number: int
    """Counts from 0."""
    training_loss: float
    """Mean over the tokens of the batch that carry loss, before the step's update; nats a token."""
    perplexity: float
    """exp(training_loss)."""
    num_tokens: int
    """All tokens of the batch, with or without loss."""
    seconds: float
    """How long the step took, without validation."""


@dataclass(frozen=True)
class ValidationRow:
    """The loss on the validation records at one moment."""

    step_number: int
    """How many steps had been taken: 0 is the base model, as it was before any."""
    epoch_number: int
    """The epoch, from 0, that was under way or had just ended."""
    validation_loss: float
    """Mean over all tokens of the validation records that carry loss, in nats a token."""
    perplexity: float
    """exp(validation_loss)."""


def step_csv(rows: Iterable[StepRow]) -> bytes:
    """Return step_wise_training_metrics.csv."""
    return _csv(
        STEP_COLUMNS,
        ((row.step_number, row.epoch_number, row.training_loss, row.perplexity) for row in rows),
    )


def validation_csv(rows: Iterable[ValidationRow]) -> bytes:
    """Return validation_metrics.csv."""
    return _csv(
        VALIDATION_COLUMNS,
        ((row.step_number, row.epoch_number, row.validation_loss, row.perplexity) for row in rows),
    )


def _csv(columns: Sequence[str], rows: Iterable[tuple[int, int, float, float]]) -> bytes:
    lines = [",".join(columns)]
    lines += [",".join(repr(value) for value in row) for row in rows]
    return ("\n".join(lines) + "\n").encode("ascii")
