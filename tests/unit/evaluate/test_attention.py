"""Attention for packed rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from outcrop.evaluate.attention import SHORT_RECORD_TOKENS, attend

NUM_HEADS, NUM_GROUPS, WIDTH = 6, 2, 16


def row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, WIDTH).transpose(1, 2).requires_grad_(True)
        for heads in (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)
    )
    return query, key, value


def masked(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """The same with one big mask, as transformers would do it."""
    record = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    inside = (record[:, None] == record[None, :]).tril()
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=inside, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [5, 1, 9],
        [SHORT_RECORD_TOKENS, SHORT_RECORD_TOKENS + 1, 3],
        [2, SHORT_RECORD_TOKENS + 40],
    ],
)
def test_output_and_gradients_equal_those_of_a_block_diagonal_mask(lengths: list[int]) -> None:
    tensors = row(sum(lengths))
    output, _ = attend(nn.Module(), *tensors, None, segment_lengths=lengths)
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, weight)

    wanted = masked(*tensors, lengths)
    expected = torch.autograd.grad(wanted, tensors, weight)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    for gradient, standard in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, standard, rtol=1e-4, atol=1e-5)


def test_scaling_is_the_callers() -> None:
    query, key, value = row(7)
    plain, _ = attend(nn.Module(), query, key, value, None, segment_lengths=[7])
    doubled, _ = attend(
        nn.Module(), query / 2, key, value, None, segment_lengths=[7], scaling=2 * WIDTH**-0.5
    )
    torch.testing.assert_close(doubled, plain)


def test_lengths_must_fill_the_row() -> None:
    with pytest.raises(RuntimeError):
        attend(nn.Module(), *row(7), None, segment_lengths=[3, 3])
