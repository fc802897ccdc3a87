"""Functions that torch.compile makes kernels of: here with its C++ kernels for the CPU."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from tests.assets.pointwise_cases import CASES, ROWS, copies, tensors

from outcrop.models.fused import Fused

needs_a_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on the CPU",
)
# What torch itself does while it compiles.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


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
    for count in (ROWS, 2, 5):
        mine, plain = (copies(arguments, rows, count) for _ in range(2))
        found, expected = tensors(compiled(*mine)), tensors(body(*plain))
        # What it changed in place is compared too.
        changed = [argument for argument in mine if isinstance(argument, torch.Tensor)]
        kept = [argument for argument in plain if isinstance(argument, torch.Tensor)]
        for one, other in zip([*found, *changed], [*expected, *kept], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-5)
        if count == ROWS:
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
    found, expected = (function(*copies(arguments, rows, ROWS)) for function in (second, first))
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
