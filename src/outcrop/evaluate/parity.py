"""Whether a custom model is served as it was trained: the same losses on the same records.

Whoever exports a model can leave something out, or scale it, and nothing fails: it answers as
another model. So before a custom model becomes Active, what would serve it reads the artifact from
disk as a model server does and computes some records' losses; they must be those that the trainer
had in memory. Both compute in the machine's type, but not the same way, so they differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outcrop.data.records import Example
from outcrop.errors import StopRequested, TrainingError
from outcrop.evaluate.likelihood import evaluate_likelihood, num_loss_tokens

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from outcrop.models.decoder import Decoder
    from outcrop.models.lanes import Lanes
    from outcrop.serve.backend import Backend

MAX_RECORDS = 8
MAX_TOKENS = 2048
"""Of all of them together, but for the first; they take about a second."""
MEAN_NATS, MEAN_SHARE = 0.03, 0.02
"""By so much the loss of all records may differ: so many nats and such a share of the loss."""
RECORD_NATS, RECORD_SHARE = 0.15, 0.05
"""By so much that of one record may."""


@dataclass(frozen=True)
class RecordLoss:
    """What the trainer says of one record."""

    example: Example
    loss: float
    """Mean over its tokens that carry loss, in nats."""
    num_tokens: int


@dataclass(frozen=True)
class Parity:
    """How far the served model is from the trained one."""

    trained_loss: float
    served_loss: float
    """Mean over the tokens of all records that carry loss, in nats a token."""
    largest_difference: float
    """Of one record's loss."""
    num_records: int
    num_tokens: int


def choose_records(examples: Sequence[Example]) -> list[Example]:
    """Return the first few records that carry loss."""
    chosen: list[Example] = []
    room = MAX_TOKENS
    for example in examples:
        length = len(example.input_ids)
        if num_loss_tokens(example) and (length <= room or not chosen):
            chosen.append(example)
            room -= length
        if len(chosen) == MAX_RECORDS or room <= 0:
            break
    return chosen


def record_losses(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    *,
    decoder: Decoder | None,
    lanes: Lanes | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[RecordLoss, ...]:
    """Return the loss of each record under the model as it is in memory, one at a time.

    Args:
        decoder, lanes: as `evaluate_likelihood` takes them.
    """
    found = []
    for example in examples:
        likelihood = evaluate_likelihood(
            model, [example], should_stop=should_stop, decoder=decoder, lanes=lanes
        )
        found.append(RecordLoss(example, likelihood.loss, likelihood.num_tokens))
    return tuple(found)


def check_parity(
    weights: Path,
    artifact: Path,
    trained: Sequence[RecordLoss],
    *,
    threads: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> Parity:
    """Serve an artifact and compare it with what the trainer said.

    Args:
        weights: folder of the base model.
        trained: at least one record.
    Raises:
        TrainingError: it differs by more than rounding; the message has the figures.
        ModelError: it cannot be served at all.
        StopRequested: `should_stop` answered True.
    """
    from outcrop.serve.engine import open_backend

    backend = open_backend(weights, threads=threads, max_page_bytes=1)
    try:
        backend.load(str(artifact), ())
        served = []
        for record in trained:
            if should_stop():
                raise StopRequested
            served.append(_served_loss(backend, str(artifact), record.example))
    finally:
        backend.close()
    tokens = sum(record.num_tokens for record in trained)
    trained_loss = sum(record.loss * record.num_tokens for record in trained) / tokens
    served_loss = (
        sum(loss * record.num_tokens for loss, record in zip(served, trained, strict=True)) / tokens
    )
    differences = [abs(loss - one.loss) for loss, one in zip(served, trained, strict=True)]
    parity = Parity(trained_loss, served_loss, max(differences), len(trained), tokens)
    allowed = [RECORD_NATS + RECORD_SHARE * record.loss for record in trained]
    # Written so that what is no number is refused.
    fits = abs(served_loss - trained_loss) <= MEAN_NATS + MEAN_SHARE * trained_loss and all(
        difference <= most for difference, most in zip(differences, allowed, strict=True)
    )
    if not fits:
        raise TrainingError(
            f"The model is not served as it was trained: on {parity.num_records} records with "
            f"{tokens} tokens its loss is {served_loss:.4f} as served and {trained_loss:.4f} as "
            f"trained, and that of one record differs by {parity.largest_difference:.4f}. "
            f"Allowed are {MEAN_NATS} and {MEAN_SHARE:.0%} of the loss over all records, "
            f"{RECORD_NATS} and {RECORD_SHARE:.0%} for one. Nothing was published. This is a fault "
            "of this service, not of your data."
        )
    return parity


def _served_loss(backend: Backend, artifact: str, example: Example) -> float:
    from outcrop.serve.backend import Memory, Part, Scores

    ids, memory, total, count = list(example.input_ids), Memory(), 0.0, 0
    pages = range(-(-len(ids) // backend.page_tokens))
    # The last token is predicted and predicts nothing.
    for first in range(0, len(ids) - 1, backend.max_rows):
        part = ids[first : min(first + backend.max_rows, len(ids) - 1)]
        (scores,) = backend.run(
            [Part(artifact, part, first, pages, num_scores=len(part), memory=memory)]
        )
        if isinstance(scores, Exception):
            raise scores
        assert isinstance(scores, Scores)
        mask = torch.tensor([bool(one) for one in example.loss_mask[first + 1 :][: len(part)]])
        wanted = torch.tensor(ids[first + 1 : first + 1 + len(part)])
        logits_LV = scores.logits_NV.cpu()[mask].float()
        if len(logits_LV):
            losses_L = torch.nn.functional.cross_entropy(logits_LV, wanted[mask], reduction="none")
            total, count = total + float(losses_L.double().sum()), count + len(losses_L)
    return total / count
