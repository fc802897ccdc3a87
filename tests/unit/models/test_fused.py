"""Functions that torch.compile makes kernels of: here with its C++ kernels for the CPU."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from outcrop.models import pointwise
from outcrop.models.fused import Fused

needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)
# What torch itself does while it compiles.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

T, D, N, W, V = 7, 24, 3, 8, 50
DRAW = torch.Generator().manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
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


def tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def copies(arguments: list[Any], rows: tuple[int, ...], count: int) -> list[Any]:
    """Return the arguments with so many rows, of memory of their own."""
    return [
        argument
        if not isinstance(argument, Tensor)
        else argument[:count].clone()
        if place in rows
        else argument.clone()
        for place, argument in enumerate(arguments)
    ]


@needs_a_compiler
@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_function_gives_the_same_numbers_for_any_number_of_rows(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    body, rows, arguments = CASES[name]
    compiled = Fused(body, rows, device_type="cpu")
    counters = torch._dynamo.utils.counters
    for count in (T, 2, 5):
        mine, plain = (copies(arguments, rows, count) for _ in range(2))
        found, expected = tensors(compiled(*mine)), tensors(body(*plain))
        # What it changed in place is compared too.
        changed = [argument for argument in mine if isinstance(argument, Tensor)]
        kept = [argument for argument in plain if isinstance(argument, Tensor)]
        for one, other in zip([*found, *changed], [*expected, *kept], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)
        if count == T:
            graphs = counters["stats"]["unique_graphs"]
    assert not [record for record in caplog.records if record.name == "outcrop.models.fused"]
    assert counters["stats"]["unique_graphs"] == graphs, "other numbers of rows compile anew"


@needs_a_compiler
@quiet
@pytest.mark.slow
def test_rows_that_come_first_do_not_decide_the_kernel() -> None:
    """Two processes that begin with other rows, as before and after an interruption."""
    body, rows, arguments = CASES["norm_forward"]
    first, second = (Fused(body, rows, device_type="cpu") for _ in range(2))
    first(*copies(arguments, rows, 3))
    torch._dynamo.reset()
    found, expected = (function(*copies(arguments, rows, T)) for function in (second, first))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_function_that_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    body, rows, arguments = CASES["gated_forward"]
    function = Fused(body, rows, device_type="cpu")
    with caplog.at_level(logging.WARNING):
        found = [function(*arguments) for _ in range(2)]
    assert all(torch.equal(one, body(*arguments)) for one in found)
    (record,) = caplog.records
    assert "gated_forward" in record.getMessage()
    assert "no compiler here" in record.getMessage()


def test_want_of_memory_is_not_taken_for_a_compiler_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "compile", refuse)
    body, rows, arguments = CASES["gated_forward"]
    with pytest.raises(torch.OutOfMemoryError):
        Fused(body, rows, device_type="cpu")(*arguments)


def test_elsewhere_and_for_one_row_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", refuse)
    body, rows, arguments = CASES["gated_forward"]
    expected = body(*arguments)
    assert torch.equal(Fused(body, rows)(*arguments), expected)
    one_row = copies(arguments, rows, 1)
    assert torch.equal(Fused(body, rows, device_type="cpu")(*one_row), body(*one_row))
