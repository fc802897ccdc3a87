"""The functions between a decoder's matrix products, with arguments to try them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from outcrop.models import pointwise

ROWS = 7
T, D, N, W, V = ROWS, 24, 3, 8, 50
DRAW = torch.Generator().manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return drawn numbers."""
    return torch.randn(shape, generator=DRAW).to(dtype)


BF16 = torch.bfloat16
CASES: dict[str, tuple[Callable[..., Any], tuple[int, ...], list[Any]]] = {
    "norm_forward": (
        pointwise.norm_forward,
        (0, 1),
        [numbers(T, D), numbers(T, D, dtype=BF16), numbers(D), 1e-5, BF16],
    ),
    "norm_forward without a change": (
        pointwise.norm_forward,
        (0, 1),
        [numbers(T, D), None, numbers(D), 1e-5, BF16],
    ),
    "norm_backward": (
        pointwise.norm_backward,
        (0, 1, 3, 4),
        [numbers(T, D, dtype=BF16), numbers(T, D), numbers(D), numbers(T), numbers(T, D)],
    ),
    "gated_forward": (pointwise.gated_forward, (0,), [numbers(T, 2 * D, dtype=BF16)]),
    "gated_backward": (
        pointwise.gated_backward,
        (0, 1),
        [numbers(T, D, dtype=BF16), numbers(T, 2 * D, dtype=BF16)],
    ),
    "rotate_rows": (
        pointwise.rotate_rows,
        (0, 1, 2),
        [numbers(T, N, W, dtype=BF16), numbers(T, W // 2), numbers(T, W // 2), 2],
    ),
    "merge_rows": (
        pointwise.merge_rows,
        (0, 1, 2, 3, 4),
        [
            *(numbers(T, N, W, dtype=BF16), numbers(T, 1, W, dtype=BF16)),
            *(numbers(T, 1, W, dtype=BF16), numbers(T, W // 2), numbers(T, W // 2)),
        ],
    ),
    "cross_entropy": (
        pointwise.cross_entropy_in_one,
        (0, 1),
        [numbers(T, V, dtype=BF16), torch.arange(T), torch.tensor(0.125)],
    ),
    "losses_only": (
        pointwise.losses_only,
        (0, 1),
        [numbers(T, V, dtype=BF16), torch.arange(T)],
    ),
}
"""The function, the places of its arguments that have rows, and arguments of ROWS rows."""


def tensors(found: Any) -> list[Tensor]:
    """Return what a function returned as a list."""
    return [found] if isinstance(found, Tensor) else list(found)


def copies(
    arguments: list[Any], rows: tuple[int, ...], count: int, device: str = "cpu"
) -> list[Any]:
    """Return the arguments with so many rows, of memory of their own."""
    return [
        argument
        if not isinstance(argument, Tensor)
        else argument[:count].to(device, copy=True)
        if place in rows
        else argument.to(device, copy=True)
        for place, argument in enumerate(arguments)
    ]
