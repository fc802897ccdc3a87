"""How likely a model finds the tokens of records: turns packed rows into losses.

Records are laid end to end in one row without padding. Attention looks only inside a record, and
positions begin anew with each. Scores over the vocabulary are computed only where a token carries
loss, in float32 (in float64 where the model is). Training and evaluation of all models but those
that have passes of our own (models/decoder.py) share this one forward pass. A model whose head does
more than one matrix product (a bias, a cap, a factor) computes its scores itself.

It knows nothing of adapters, epochs or files.

Axis suffixes: B rows (always 1), T tokens, D model width, L tokens that carry loss, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from outcrop.data.pack import (
    IGNORE_INDEX,
    MAX_MICRO_BATCH_TOKENS,
    MicroBatch,
    gather,
    lay_row,
    pack,
)
from outcrop.errors import EmptyLossError, ModelError, StopRequested
from outcrop.evaluate.attention import packed_attention, packed_states
from outcrop.models.decoder import Decoder, make_decoder
from outcrop.models.kernels import wide
from outcrop.models.lanes import Lanes
from outcrop.models.passes import row_losses
from outcrop.models.workspace import Workspace

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from outcrop.data.records import Example

HEAD_CHUNK_TOKENS = 512
"""Tokens whose scores over the vocabulary exist at once: 100 MB in float32 at 49,152 words."""
PROBE_SCALE = 30.0
"""Of the hidden states that a head is tried with: large enough that a cap on scores is seen."""

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Likelihood:
    """The loss of a model on a set of records."""

    loss: float
    """Mean over all tokens that carry loss, in nats per token."""
    num_tokens: int
    """How many tokens carry loss."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a float."""
        return perplexity(self.loss)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluate_likelihood(
    model: LlamaForCausalLM,
    examples: Sequence[Example],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    micro_batch_tokens: int = MAX_MICRO_BATCH_TOKENS,
    decoder: Decoder | None = None,
    lanes: Lanes | None = None,
) -> Likelihood:
    """Return the model's loss on the examples; the model is not changed.

    Args:
        examples: rendered records; loss is taken where their mask says so.
        should_stop: asked before each layer of our own passes, else before each micro-batch.
        micro_batch_tokens: tokens in work at the same time; bounds memory.
        decoder: the passes over the model as it is now; None makes them where they cover it.
        lanes: where rows are computed; None means in this thread.
    Raises:
        EmptyLossError: no token carries loss.
        StopRequested: `should_stop` answered True.
    """
    decoder = decoder or make_decoder(model)
    if decoder is not None:
        lanes = lanes or Lanes(1)
        hands = gather(examples, max(1, micro_batch_tokens // lanes.count))
        return _mean_by_hand(decoder, list(hands), should_stop, lanes)
    return _mean(model, pack(examples, micro_batch_tokens), should_stop)


def _mean_by_hand(
    decoder: Decoder,
    hands: Sequence[Sequence[Example]],
    should_stop: Callable[[], bool],
    lanes: Lanes,
) -> Likelihood:
    def check() -> None:
        if should_stop():
            raise StopRequested

    def one(hand: Sequence[Example], workspace: Workspace) -> tuple[float, int]:
        losses_L = row_losses(decoder, lay_row(hand), check, workspace)
        return float(losses_L.double().sum()), losses_L.numel()

    total, num_tokens = 0.0, 0
    for first in range(0, len(hands), lanes.count):
        check()
        tasks = [
            partial(one, hand, workspace)
            for hand, workspace in zip(hands[first:], lanes.workspaces, strict=False)
        ]
        for loss, count in lanes.run(tasks):
            total += loss
            num_tokens += count
    if num_tokens == 0:
        raise EmptyLossError("No token of the validation data carries loss.")
    return Likelihood(total / num_tokens, num_tokens)


def _mean(
    model: LlamaForCausalLM, batches: Iterable[MicroBatch], should_stop: Callable[[], bool]
) -> Likelihood:
    total, num_tokens = 0.0, 0
    with torch.inference_mode(), packed_attention(model):
        for batch in batches:
            if should_stop():
                raise StopRequested
            losses_L = token_losses(model, batch)
            total += float(losses_L.double().sum())
            num_tokens += losses_L.numel()
    if num_tokens == 0:
        raise EmptyLossError("No token of the validation data carries loss.")
    return Likelihood(total / num_tokens, num_tokens)


def num_loss_tokens(example: Example) -> int:
    """Return how many tokens of a record carry loss; its first has nothing to be predicted from."""
    return sum(example.loss_mask[1:])


def token_losses(
    model: LlamaForCausalLM, batch: MicroBatch, chunk_tokens: int = HEAD_CHUNK_TOKENS
) -> Tensor:
    """Return the loss of each token that carries loss, wide, in the order of the row.

    The model must be inside `packed_attention`. Gradients flow where they are enabled.

    Args:
        chunk_tokens: how many tokens' scores over the vocabulary may exist at once. Where there
            are more, they are computed again for the backward pass.
    """
    # A token is predicted one place earlier; pack() gives a record's first token no label.
    places = [place for place, label in enumerate(batch.labels) if label != IGNORE_INDEX]
    if not places:
        return torch.zeros(0, device=model.device)
    hidden_TD = packed_states(model, batch.input_ids, batch.position_ids, batch.lengths)
    places_L = torch.tensor(places, device=hidden_TD.device)
    labels_L = torch.tensor([batch.labels[place] for place in places], device=hidden_TD.device)
    hidden_LD = hidden_TD.index_select(0, places_L - 1)
    keeps_scores = len(places) <= chunk_tokens
    if _has_plain_head(model):
        head: Callable[..., Tensor] = _HeadLoss.apply
        weight_VD = model.get_output_embeddings().weight
        take = partial(_plain_losses, head, weight_VD, keeps_scores)
    elif keeps_scores:
        take = partial(_own_losses, model)
    else:
        take = partial(checkpoint, partial(_own_losses, model), use_reentrant=False)
    return torch.cat(
        [
            take(hidden, labels)
            for hidden, labels in zip(
                hidden_LD.split(chunk_tokens), labels_L.split(chunk_tokens), strict=True
            )
        ]
    )


def _plain_losses(
    head: Callable[..., Tensor],
    weight_VD: Tensor,
    keeps_scores: bool,
    hidden_LD: Tensor,
    labels_L: Tensor,
) -> Tensor:
    return head(hidden_LD, weight_VD, labels_L, keeps_scores)


def _own_losses(model: LlamaForCausalLM, hidden_LD: Tensor, labels_L: Tensor) -> Tensor:
    scores_LV = _own_scores(model, hidden_LD)
    return nn.functional.cross_entropy(
        scores_LV.to(wide(scores_LV.dtype)), labels_L, reduction="none"
    )


class _Given:
    """What a decoder returns, with hidden states that are there already and nothing else."""

    def __init__(self, hidden_BTD: Tensor) -> None:
        self.last_hidden_state = hidden_BTD

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


def _own_scores(model: LlamaForCausalLM, hidden_LD: Tensor) -> Tensor:
    """Return the scores over the vocabulary as the model's own code computes them, (L, V).

    Raises:
        ModelError: the model does not compute them from what its decoder returns.
    """
    decoder: Any = model.get_decoder()
    given = []

    def give(*_: Any, **__: Any) -> _Given:
        given.append(_Given(hidden_LD[None]))
        return given[0]

    # The model's forward is its decoder's, and then the head: for once, the decoder gives these.
    decoder.forward = give
    try:
        ids_BL = torch.zeros(1, len(hidden_LD), dtype=torch.long, device=hidden_LD.device)
        scores_BLV: Tensor = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        del decoder.forward
    if len(given) != 1 or scores_BLV.shape[:2] != ids_BL.shape:
        raise ModelError(
            f"A {model.config.model_type} model cannot be trained or evaluated here: its scores "
            "are not computed from what its decoder returns."
        )
    return scores_BLV[0]


@torch.no_grad()
def _has_plain_head(model: LlamaForCausalLM) -> bool:
    """Return whether the model's scores are one matrix product; tried once for each model."""
    if model not in _plain_heads:
        head = model.get_output_embeddings()
        is_plain = type(head) is nn.Linear and head.bias is None
        if is_plain:
            draw = torch.Generator().manual_seed(0)
            hidden_LD = PROBE_SCALE * torch.randn(2, head.in_features, generator=draw)
            hidden_LD = hidden_LD.to(head.weight.device, head.weight.dtype)
            product_LV, own_LV = hidden_LD @ head.weight.t(), _own_scores(model, hidden_LD)
            error = (product_LV - own_LV).double().norm() / own_LV.double().norm()
            # Twice the same product is the same but for the last places.
            is_plain = bool(error <= 10 * torch.finfo(head.weight.dtype).eps)
        _plain_heads[model] = is_plain
    return _plain_heads[model]


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of the scores hidden x weight^T, wide, without a wide copy of them kept.

    The backward pass turns the scores into their gradient in place: probabilities, less one at the
    label. They are kept for it in the model's own type, or else computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, keeps_scores: bool
    ) -> Tensor:
        logits_LV = hidden_LD @ weight_VD.t()
        scores_LV = logits_LV.to(wide(logits_LV.dtype))
        normalizer_L = torch.logsumexp(scores_LV, dim=-1)
        kept_LV = logits_LV if keeps_scores else None
        ctx.save_for_backward(hidden_LD, weight_VD, labels_L, kept_LV, normalizer_L)
        return normalizer_L - scores_LV.gather(1, labels_L[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_L,) = grad_outputs
        hidden_LD, weight_VD, labels_L, logits_LV, normalizer_L = ctx.saved_tensors
        if logits_LV is None:
            logits_LV = hidden_LD @ weight_VD.t()
        grad_LV = logits_LV.to(wide(logits_LV.dtype)).sub_(normalizer_L[:, None]).exp_()
        grad_LV[torch.arange(len(labels_L), device=grad_LV.device), labels_L] -= 1.0
        grad_logits_LV = grad_LV.mul_(grad_L[:, None]).to(logits_LV.dtype)
        grad_weight = grad_logits_LV.t() @ hidden_LD if ctx.needs_input_grad[1] else None
        return grad_logits_LV @ weight_VD, grad_weight, None, None
