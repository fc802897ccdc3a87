"""How likely a model finds the tokens of records: turns packed rows into losses.

Records are laid end to end in one row without padding. Attention looks only inside a record, and
positions begin anew with each. Scores over the vocabulary are computed only where a token carries
loss, in float32. Training and evaluation share this one forward pass.

It knows nothing of adapters, epochs or files.

Axis suffixes: B rows (always 1), T tokens, N heads, G heads of keys and values, H width of a head,
D model width, L tokens that carry loss, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from outcrop.data.pack import IGNORE_INDEX, MicroBatch, pack
from outcrop.errors import EmptyLossError, StopRequested

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from outcrop.data.records import Example

PACKED_ATTENTION = "outcrop_packed"
MAX_MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass. A longer record is a micro-batch of its own. On a 135M model 2048 is no
faster and takes 1.2 GB more."""
HEAD_CHUNK_TOKENS = 512
"""Tokens whose scores over the vocabulary are held at once: 100 MB in float32 at 49,152 words."""


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
) -> Likelihood:
    """Return the model's loss on the examples; the model is not changed.

    Args:
        examples: rendered records; loss is taken where their mask says so.
        should_stop: asked before each micro-batch.
    Raises:
        EmptyLossError: no token carries loss.
        StopRequested: `should_stop` answered True.
    """
    return _mean(model, pack(examples, MAX_MICRO_BATCH_TOKENS), should_stop)


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


@contextmanager
def packed_attention(model: LlamaForCausalLM) -> Iterator[None]:
    """Make the model take packed rows inside a `with`, and give its own attention back after."""
    before = model.config._attn_implementation
    model.config._attn_implementation = PACKED_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def token_losses(
    model: LlamaForCausalLM, batch: MicroBatch, chunk_tokens: int = HEAD_CHUNK_TOKENS
) -> Tensor:
    """Return the loss of each token that carries loss, float32, in the order of the row.

    The model must be inside `packed_attention`. Gradients flow where they are enabled.

    Args:
        chunk_tokens: how many tokens' scores over the vocabulary may exist at once. Where there
            are more, they are computed again for the backward pass.
    """
    device = model.model.embed_tokens.weight.device
    input_ids_BT = torch.tensor([batch.input_ids], device=device)
    position_ids_BT = torch.tensor([batch.position_ids], device=device)
    # A token is predicted one place earlier; pack() gives a record's first token no label.
    places = [place for place, label in enumerate(batch.labels) if label != IGNORE_INDEX]
    if not places:
        return torch.zeros(0, device=device)
    hidden_TD = model.model(
        input_ids=input_ids_BT,
        position_ids=position_ids_BT,
        segment_lengths=batch.lengths,
        use_cache=False,
    ).last_hidden_state[0]
    places_L = torch.tensor(places, device=device)
    labels_L = torch.tensor([batch.labels[place] for place in places], device=device)
    hidden_LD = hidden_TD.index_select(0, places_L - 1)
    head = model.lm_head
    if len(places) <= chunk_tokens:
        return _cross_entropy(head, hidden_LD, labels_L)
    chunks = zip(hidden_LD.split(chunk_tokens), labels_L.split(chunk_tokens), strict=True)
    return torch.cat(
        [
            checkpoint(_cross_entropy, head, hidden, labels, use_reentrant=False)
            if torch.is_grad_enabled()
            else _cross_entropy(head, hidden, labels)
            for hidden, labels in chunks
        ]
    )


def _cross_entropy(head: nn.Module, hidden_LD: Tensor, labels_L: Tensor) -> Tensor:
    logits_LV = head(hidden_LD).float()
    return nn.functional.cross_entropy(logits_LV, labels_L, reduction="none")


def _attend(
    module: nn.Module,
    query_BNTH: Tensor,
    key_BGTH: Tensor,
    value_BGTH: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each record of a packed row.

    Source: transformers' AttentionInterface for the arguments and the axes of the result.
    """
    lengths = list(segment_lengths)
    outputs = [
        nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
        )
        for query, key, value in zip(
            query_BNTH.split(lengths, dim=2),
            key_BGTH.split(lengths, dim=2),
            value_BGTH.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, _attend)
