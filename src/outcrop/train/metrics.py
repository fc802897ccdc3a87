"""The numbers of a training run as rows, and the rows as the files of a job's output.

The columns of the two CSV files and their order are Bedrock's; clients read the last two columns of
the last row as loss and perplexity. What Bedrock has no column for is in a JSONL file beside them.
Source: user guide, "Analyze the results of a model customization job".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STEP_COLUMNS = ("step_number", "epoch_number", "training_loss", "perplexity")
SPEED_WINDOW = 20
"""Steps over which tokens a second and the time left are averaged."""
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
    learning_rate: float
    """The optimizer's, of this step."""
    gradient_norm: float
    """The length of the gradient before it was cut to its greatest length."""
    peak_memory_bytes: int
    """The most that the training process had resident so far."""
    micro_batch_tokens: int
    """Tokens of one forward and backward pass at most; smaller once memory has run out."""
    kept_tokens: int
    """A micro-batch of more tokens computed its activations twice."""


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


def step_jsonl(rows: Sequence[StepRow], total_steps: int) -> bytes:
    """Return step_metrics.jsonl: one object a step, with speed and the time that was left then."""
    lines = []
    for place, row in enumerate(rows):
        recent = rows[max(0, place + 1 - SPEED_WINDOW) : place + 1]
        tokens_per_second, eta_seconds = speed(recent, total_steps - row.step_number - 1)
        described = {
            "step": row.step_number,
            "epoch": row.epoch_number,
            "trainingLoss": row.training_loss,
            "perplexity": row.perplexity if math.isfinite(row.perplexity) else None,
            "learningRate": row.learning_rate,
            "gradientNorm": row.gradient_norm,
            "tokens": row.num_tokens,
            "seconds": round(row.seconds, 4),
            "tokensPerSecond": tokens_per_second,
            "etaSeconds": eta_seconds,
            "peakMemoryBytes": row.peak_memory_bytes,
            "microBatchTokens": row.micro_batch_tokens,
            "keptTokens": row.kept_tokens,
        }
        lines.append(json.dumps(described) + "\n")
    return "".join(lines).encode("ascii")


def speed(recent: Sequence[StepRow], steps_left: int) -> tuple[float | None, float | None]:
    """Return (tokens a second, seconds left) at the pace of the recent steps; None for unknown."""
    seconds = sum(row.seconds for row in recent)
    if seconds <= 0:
        return None, None
    tokens = sum(row.num_tokens for row in recent)
    return round(tokens / seconds, 1), round(steps_left * seconds / len(recent), 1)


def _csv(columns: Sequence[str], rows: Iterable[tuple[int, int, float, float]]) -> bytes:
    lines = [",".join(columns)]
    lines += [",".join(repr(value) for value in row) for row in rows]
    return ("\n".join(lines) + "\n").encode("ascii")
