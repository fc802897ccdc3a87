"""Whether a custom model is served as it was trained: the same losses on the same records.

Whoever exports a model can leave something out, or scale it, and nothing fails: it answers as
another model. So before a custom model becomes Active, what would serve it reads the artifact from
disk as a model server does and computes some records' losses; they must be those that the trainer
had in memory. Both compute in the machine's type, but not the same way, so they differ by rounding.

Where models are served in 8 or 4 bits, the weights as they are published are compared so. Then the
same records are served in few bits: token by token, what is likeliest must mostly be the same, and
the odds must be close. docs/weights.md has what rounding alone does, which decided how close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
LEAST_AGREEMENT = {"int8": 0.9, "int4": 0.6}
"""Of tokens whose likeliest successor must be the same in few bits."""
MOST_DIVERGENCE = {"int8": 0.05, "int4": 0.25}
"""Mean over the tokens, in nats: the Kullback-Leibler divergence of what is served in few bits."""


@dataclass(frozen=True)
class RecordLoss:
    """What the trainer says of one record."""

    example: Example
    loss: float
    """Mean over its tokens that carry loss, in nats."""
    num_tokens: int


@dataclass(frozen=True)
class Agreement:
    """How far what is served in few bits is from the same in the weights as they are."""

    top1: float
    """Share of the tokens whose likeliest successor is the same."""
    divergence: float
    """Kullback-Leibler divergence from the exact odds, mean over the tokens, in nats."""
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
    agreement: Agreement | None = None
    """Where models are served in few bits."""


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
    precision: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
) -> Parity:
    """Serve an artifact and compare it with what the trainer said.

    Args:
        weights: folder of the base model.
        trained: at least one record.
        precision: what matrices are held in where the model will be served.
    Raises:
        TrainingError: it differs by more than rounding; the message has the figures.
        ModelError: it cannot be served at all.
        StopRequested: `should_stop` answered True.
    """
    from outcrop.serve.engine import open_backend
    from outcrop.serve.packed import FEW_BITS

    exact = "auto" if precision in FEW_BITS else precision
    backend = open_backend(weights, threads=threads, precision=exact, max_page_bytes=1)
    few_bits = None
    try:
        backend.load(str(artifact), ())
        served = []
        for record in trained:
            if should_stop():
                raise StopRequested
            served.append(served_loss(backend, str(artifact), record.example))
        parity = _compare_losses(trained, served)
        if precision in FEW_BITS:
            few_bits = open_backend(weights, threads=threads, precision=precision, max_page_bytes=1)
            few_bits.load(str(artifact), ())
            examples = [record.example for record in trained]
            agreement = compare_backends(backend, few_bits, str(artifact), examples, should_stop)
            check_agreement(agreement, precision)
            parity = replace(parity, agreement=agreement)
    finally:
        backend.close()
        if few_bits is not None:
            few_bits.close()
    return parity


def _compare_losses(trained: Sequence[RecordLoss], served: Sequence[float]) -> Parity:
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


def compare_backends(
    exact: Backend,
    other: Backend,
    artifact: str | None,
    examples: Sequence[Example],
    should_stop: Callable[[], bool] = lambda: False,
) -> Agreement:
    """Return how far one backend's odds are from another's, where both have loaded the artifact.

    Raises:
        StopRequested: `should_stop` answered True.
    """
    same, divergence, count = 0, 0.0, 0
    for example in examples:
        if should_stop():
            raise StopRequested
        pairs = zip(
            _loss_scores(exact, artifact, example),
            _loss_scores(other, artifact, example),
            strict=True,
        )
        for (exact_LV, _), (other_LV, _) in pairs:
            exact_LV, other_LV = exact_LV.log_softmax(-1), other_LV.log_softmax(-1)
            same += int((exact_LV.argmax(-1) == other_LV.argmax(-1)).sum())
            divergence += float((exact_LV.exp() * (exact_LV - other_LV)).double().sum())
            count += len(exact_LV)
    return Agreement(same / count, divergence / count, count)


def check_agreement(agreement: Agreement, precision: str) -> None:
    """Refuse what few bits change too much.

    Args:
        precision: int8 or int4.
    Raises:
        TrainingError: with the figures, and what to do.
    """
    least, most = LEAST_AGREEMENT[precision], MOST_DIVERGENCE[precision]
    # Written so that what is no number is refused.
    if agreement.top1 >= least and agreement.divergence <= most:
        return
    raise TrainingError(
        f"The model cannot be served in {precision}, as the setting serve_weights asks: on "
        f"{agreement.num_tokens} tokens the likeliest next one is the same in "
        f"{agreement.top1:.1%}, and the odds diverge by {agreement.divergence:.4f} nats. At least "
        f"{least:.0%} and at most {most} are allowed. Nothing was published. Set serve_weights to "
        "a wider format."
    )


def served_loss(backend: Backend, artifact: str | None, example: Example) -> float:
    """Return the mean loss of a record's tokens that carry loss, in nats, as it is served."""
    total, count = 0.0, 0
    for logits_LV, wanted_L in _loss_scores(backend, artifact, example):
        losses_L = torch.nn.functional.cross_entropy(logits_LV, wanted_L, reduction="none")
        total, count = total + float(losses_L.double().sum()), count + len(losses_L)
    return total / count


def _loss_scores(
    backend: Backend, artifact: str | None, example: Example
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (logits_LV, wanted_L) of the tokens that carry loss, a pass at a time."""
    from outcrop.serve.backend import Memory, Part, Scores

    ids, memory = list(example.input_ids), Memory()
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
        if bool(mask.any()):
            yield scores.logits_NV.cpu()[mask].float(), wanted[mask]
