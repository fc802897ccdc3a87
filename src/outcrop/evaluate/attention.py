"""Attention for packed rows: each record of a row attends to itself only, causally.

Registers a function with transformers, which any of its models can then be told to use. The row's
record lengths come with the call. What torch offers ready-made is kept for long records; for short
ones it is slow on a CPU (its backward pass makes many tiny matrix products), so those are computed
with a few larger ones.

Axis suffixes: B rows (always 1), N heads, G heads of keys and values, T tokens of the row,
S tokens of one record, H width of a head.

Source: transformers' AttentionInterface for the arguments and the axes of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PACKED_ATTENTION = "outcrop_packed"
SHORT_RECORD_TOKENS = 256
"""Up to here whole score matrices are faster than torch's own: forward and backward of 1900 tokens
took 24 instead of 70 ms in records of 60 or 120, 39 instead of 55 ms in records of 235, and no less
in records of 400 (one layer of 9 heads, bfloat16, one core of a Xeon with AMX)."""


@contextmanager
def packed_attention(model: LlamaForCausalLM) -> Iterator[None]:
    """Make the model take packed rows inside a `with`, and give its own attention back after."""
    before = model.config._attn_implementation
    model.config._attn_implementation = PACKED_ATTENTION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attend(
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
    """Return the attention's output, (B, T, N, H), for records of the given lengths in a row.

    Args:
        scaling: what scores are multiplied by; None means 1 / sqrt(H).
        dropout: must be 0: nothing here is trained with it.
    """
    assert dropout == 0.0
    scale = query_BNTH.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = list(segment_lengths)
    outputs = [
        _one_record(query, key, value, scale)
        for query, key, value in zip(
            query_BNTH.split(lengths, dim=2),
            key_BGTH.split(lengths, dim=2),
            value_BGTH.split(lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, attend)


def _one_record(query_BNSH: Tensor, key_BGSH: Tensor, value_BGSH: Tensor, scale: float) -> Tensor:
    if query_BNSH.shape[2] > SHORT_RECORD_TOKENS:
        return nn.functional.scaled_dot_product_attention(
            query_BNSH, key_BGSH, value_BGSH, is_causal=True, scale=scale, enable_gqa=True
        )
    apply: Callable[..., Tensor] = _ShortAttention.apply
    return apply(query_BNSH[0], key_BGSH[0], value_BGSH[0], scale)[None]


class _ShortAttention(torch.autograd.Function):
    """softmax(scale * Q K^T, causal) V with whole matrices; heads that share a key are stacked."""

    @staticmethod
    def forward(
        ctx: Any, query_NSH: Tensor, key_GSH: Tensor, value_GSH: Tensor, scale: float
    ) -> Tensor:
        num_heads, length, width = query_NSH.shape
        num_groups = key_GSH.shape[0]
        stacked = (num_groups, num_heads // num_groups * length)
        query, key, value = query_NSH.reshape(*stacked, width), key_GSH, value_GSH
        scores = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale)
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        scores.view(num_groups, -1, length, length).masked_fill_(future, float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale = scale
        return torch.bmm(weights, value).view(num_heads, length, width)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output_NSH,) = grad_outputs
        query, key, value, weights = ctx.saved_tensors
        grad_output = grad_output_NSH.reshape(query.shape)
        grad_value = torch.bmm(weights.transpose(1, 2), grad_output)
        grad_weights = torch.bmm(grad_output, value.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        ).mul_(ctx.scale)
        grad_query = torch.bmm(grad_scores, key).view(grad_output_NSH.shape)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query)
        return grad_query, grad_key, grad_value, None
