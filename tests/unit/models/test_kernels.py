"""The compiled operations against the same in torch's; what happens where there are none."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outcrop.models import compiled, kernels
from outcrop.models.kernels import Layout, are_compiled, keep_kernels_in, wide
from outcrop.models.rows import Segment

COMPILER = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
SHAPES = [(1, 1), (1, 7), (3, 16), (5, 33), (2, 100), (70, 513)]
"""Rows and widths: multiples of the vector's length and not, one row, one column, many threads."""
LAYOUTS = {
    "one row": [Segment(0, 1, 0)],
    "one record": [Segment(0, 9, 0)],
    "records apart": [Segment(0, 5, 0), Segment(5, 1, 0), Segment(6, 8, 0)],
    "only what is shared": [Segment(0, 4, 0)],
    "a shared beginning": [Segment(0, 4, 0), Segment(4, 3, 4), Segment(7, 6, 4), Segment(13, 1, 4)],
}
HEADS = [(1, 1, 2), (2, 3, 8), (1, 4, 6), (3, 1, 16)]
"""Groups, heads of a group, width of a head."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of compiled kernels for all tests that need them as they are."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def _in_a_folder_of_the_tests(kept: Path) -> Iterator[None]:
    before = compiled.library_folder()
    keep_kernels_in(kept)
    yield
    keep_kernels_in(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_library", lambda dtype: None)
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def compare(function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Call with compiled kernels and without; compare results and what became of the arguments."""
    dtype = next(found.dtype for found in arguments if isinstance(found, Tensor))
    found = [
        argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments
    ]
    wanted = [
        argument.clone() if isinstance(argument, Tensor) else argument for argument in arguments
    ]
    results = function(*found, **named)
    with uncompiled():
        expected = function(*wanted, **named)
    pairs = [pair for pair in zip(found, wanted, strict=True) if isinstance(pair[0], Tensor)]
    as_tuple = [part if isinstance(part, tuple) else (part,) for part in (results, expected)]
    pairs += [pair for pair in zip(*as_tuple, strict=True) if isinstance(pair[0], Tensor)]
    assert dtype in kernels.TYPES
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        # Sums in another order; a bfloat16 may then be rounded to its neighbour.
        narrow = one.dtype == torch.bfloat16
        largest = float(other.abs().max())
        torch.testing.assert_close(
            *(one, other),
            rtol=2**-7 if narrow else 1e-5,
            atol=(2**-9 if narrow else 2e-6) * largest,
        )


@needs_compiler
@DTYPES
def test_there_are_compiled_kernels_where_there_is_a_compiler(dtype: torch.dtype) -> None:
    assert are_compiled(dtype)
    assert not are_compiled(torch.float64)


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norms(rows: int, width: int, dtype: torch.dtype) -> None:
    x_TD, change_TD = numbers(rows, width), numbers(rows, width, dtype=dtype)
    weight_D = numbers(width)
    for change in (None, change_TD):
        compare(kernels.norm_forward, x_TD, change, weight_D, 1e-5, dtype)
    compare(kernels.norm_forward, torch.zeros(rows, width), None, weight_D, 1e-5, dtype)
    scale_T = torch.rsqrt(x_TD.square().mean(1) + 1e-5)
    compare(kernels.norm_backward, change_TD, x_TD, weight_D, scale_T, numbers(rows, width))


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_gates(rows: int, width: int, scale: float, dtype: torch.dtype) -> None:
    gate_up_TI = numbers(rows, 2 * width, dtype=dtype, scale=scale)
    compare(kernels.gated_forward, gate_up_TI)
    compare(kernels.gated_backward, numbers(rows, width, dtype=dtype), gate_up_TI)


def layout_of(segments: list[Segment], width: int, block_rows: int) -> Layout:
    rows = sum(segment.length for segment in segments)
    angles_TF = torch.rand(rows, width // 2) * 6
    return Layout(segments, angles_TF.cos(), angles_TF.sin(), block_rows=block_rows)


@needs_compiler
@DTYPES
@pytest.mark.parametrize("block_rows", [1, 3, 256])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_heads_go_to_attention_and_back(
    kind: str, heads: tuple[int, int, int], block_rows: int, dtype: torch.dtype
) -> None:
    groups, heads_a_group, width = heads
    layout = layout_of(LAYOUTS[kind], width, block_rows)
    rows = layout.num_rows
    columns = (groups * heads_a_group + 2 * groups) * width
    compare(kernels.split_heads, numbers(rows, columns, dtype=dtype), layout, groups, heads_a_group)
    query = numbers(rows * groups * heads_a_group * width, dtype=dtype)
    key, value = (numbers(layout.num_keys * groups * width, dtype=dtype) for _ in range(2))
    compare(kernels.merge_heads, query, key, value, layout, groups, heads_a_group)
    compare(kernels.move_heads, query, layout, to_rows=True, heads=groups * heads_a_group)
    in_rows = numbers(rows, groups * heads_a_group, width, dtype=dtype)
    compare(kernels.move_heads, in_rows, layout, to_rows=False)


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_way_back_of_heads_is_the_gradient_of_the_way_there(
    kind: str, is_compiled: bool
) -> None:
    """<split(x), y> = <x, merge(y)>, as splitting is linear."""
    groups, heads_a_group, width = 2, 3, 8
    layout = layout_of(LAYOUTS[kind], width, 3)
    rows = numbers(layout.num_rows, (groups * heads_a_group + 2 * groups) * width)
    with uncompiled() if not is_compiled else pytest.MonkeyPatch.context():
        there = kernels.split_heads(rows, layout, groups, heads_a_group)
        back = [numbers(*part.shape) for part in there]
        query, key, value = back
        merged = kernels.merge_heads(query, key, value, layout, groups, heads_a_group)
    one = sum(
        float((part.double() * other.double()).sum())
        for part, other in zip(there, back, strict=True)
    )
    assert one == pytest.approx(float((rows.double() * merged.double()).sum()), rel=1e-4, abs=1e-3)


@needs_compiler
@DTYPES
@given(
    matrices=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 20),
    before=st.integers(0, 40),
    window=st.integers(0, 30),
)
@settings(deadline=None, max_examples=60)
def test_softmax(
    dtype: torch.dtype, matrices: int, heads: int, length: int, before: int, window: int
) -> None:
    keys = before + length
    scores = numbers(matrices, heads * length, keys, dtype=dtype, scale=4.0)
    compare(kernels.softmax_forward, scores, length, 0.35, window)
    kernels.softmax_forward(scores, length, 0.35, window)
    seen = torch.ones(length, keys, dtype=torch.bool).tril(before)
    if window:
        seen &= ~torch.ones(length, keys, dtype=torch.bool).tril(before - window)
    assert not scores.view(-1, length, keys)[:, ~seen].any()
    gradient = numbers(matrices, heads * length, keys, dtype=dtype)
    compare(kernels.softmax_backward, scores, gradient, 0.35)


@needs_compiler
@DTYPES
@pytest.mark.parametrize(("rows", "words"), [*SHAPES, (3, 40_001)])
@pytest.mark.parametrize("scale", [0.0, 0.125])
def test_cross_entropy(rows: int, words: int, scale: float, dtype: torch.dtype) -> None:
    labels_L = torch.randint(words, (rows,))
    compare(kernels.cross_entropy, numbers(rows, words, dtype=dtype, scale=5.0), labels_L, scale)


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiler), False])
@DTYPES
def test_losses_and_their_gradients_are_those_of_autograd(
    dtype: torch.dtype, is_compiled: bool
) -> None:
    logits_LV, labels_L = numbers(5, 37, dtype=dtype, scale=3.0), torch.tensor([0, 36, 5, 5, 20])
    plain_LV = logits_LV.double().requires_grad_(True)
    wanted_L = torch.nn.functional.cross_entropy(plain_LV, labels_L, reduction="none")
    (0.25 * wanted_L.sum()).backward()
    with uncompiled() if not is_compiled else pytest.MonkeyPatch.context():
        losses_L = kernels.cross_entropy(logits_LV, labels_L, 0.25)
    assert losses_L.dtype == wide(dtype)
    torch.testing.assert_close(losses_L.double(), wanted_L.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_LV.double(), plain_LV.grad, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=needs_compiler), False])
@DTYPES
@pytest.mark.parametrize("place", [0, 3, 15, 16, 40, 49])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_comes_out_as_a_loss_that_is_none(
    bad: float, place: int, dtype: torch.dtype, is_compiled: bool
) -> None:
    for label in (place, 7):
        logits_LV = numbers(3, 50, dtype=dtype)
        logits_LV[1, place] = bad
        with uncompiled() if not is_compiled else pytest.MonkeyPatch.context():
            losses_L = kernels.cross_entropy(logits_LV, torch.tensor([1, label, 2]), 0.5)
        assert losses_L.isfinite().tolist() == [True, False, True]


@needs_compiler
@DTYPES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_numbers_reach_the_end_of_every_function(bad: float, dtype: torch.dtype) -> None:
    """Each row that has one has none but such after, or is right; the others are untouched."""
    x_TD = numbers(3, 40)
    x_TD[1, 20] = bad
    weight_D = torch.ones(40)
    _, normed_TD, _ = kernels.norm_forward(x_TD, None, weight_D, 1e-5, dtype)
    assert normed_TD.isfinite().all(1).tolist() == [True, False, True]
    scores = numbers(1, 3, 40, dtype=dtype)
    scores[0, 1, 20] = bad
    kernels.softmax_forward(scores, 3, 0.5)
    finite = [True, bad == float("-inf"), True]
    assert scores[0].isfinite().all(1).tolist() == finite
    gate_up_TI = numbers(3, 80, dtype=dtype)
    gate_up_TI[1, 20] = bad
    with uncompiled():
        wanted = kernels.gated_forward(gate_up_TI)
    found = kernels.gated_forward(gate_up_TI)
    assert found.isfinite().tolist()[0] == wanted.isfinite().tolist()[0]
    assert found[[0, 2]].isfinite().all()


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x_TD, change_TD = numbers(300, 513), numbers(300, 513, dtype=torch.bfloat16)
    logits_LV = numbers(30, 5000, dtype=torch.bfloat16)
    labels_L = torch.arange(30)

    def results() -> list[Tensor]:
        changed_LV = logits_LV.clone()
        losses_L = kernels.cross_entropy(changed_LV, labels_L, 0.5)
        norms = kernels.norm_forward(x_TD, change_TD, torch.ones(513), 1e-5, torch.bfloat16)
        return [changed_LV, losses_L, *norms]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(3)
        three = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(one, three, strict=True))


@needs_compiler
@pytest.mark.parametrize("defined", [(), ("-DBFLOAT16",)], ids=["float32", "bfloat16"])
def test_the_exponential_is_accurate_to_the_last_places(
    defined: tuple[str, ...], tmp_path: Path
) -> None:
    source = (resources.files("outcrop.models") / "kernels.c").read_bytes()
    source += b"""
    void exponentials(long count, const float *x, float *out) {
        for (long i = 0; i < count; i++) out[i] = exponential(x[i]);
    }
    """
    assert COMPILER is not None
    file = compiled.compile_library(
        COMPILER, (*kernels.FLAGS, *defined), kernels.MACHINE_FLAGS, source, tmp_path, "exp"
    )
    kernels._share_openmp()
    function = ctypes.CDLL(str(file)).exponentials
    function.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

    def exponentials(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        function(x.numel(), x.data_ptr(), out.data_ptr())
        return out

    x = torch.cat([torch.linspace(-87, 88, 400_001), torch.linspace(-1e-3, 1e-3, 2001)])
    error = exponentials(x).double() / x.double().exp() - 1
    assert float(error.abs().max()) < 2e-7
    edges = exponentials(torch.tensor([-1e30, float("-inf"), 0.0, 1e30, float("inf")]))
    assert float(edges[:2].max()) < 3e-38
    assert float(edges[2]) == 1.0
    assert edges.isfinite().all()
    assert exponentials(torch.tensor([float("nan")])).isnan().all()


def losses() -> Tensor:
    logits_LV = torch.linspace(-3, 3, 120).view(4, 30).clone()
    return kernels.cross_entropy(logits_LV, torch.arange(4), 0.5)


def fake_compiler(folder: Path, body: str) -> str:
    file = folder / "compiler"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o700)
    return str(file)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "no C compiler"),
        ("echo it is broken >&2; exit 1", "it is broken"),
        ("exit 0", "could not be compiled"),
        ("exec tail -f /dev/null", "timed out"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "could not be compiled"),
    ],
    ids=["no compiler", "it fails", "it writes nothing", "it hangs", "it writes rubbish"],
)
def test_without_a_compiler_that_works_the_results_are_the_same(
    body: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with uncompiled():
        wanted = losses()
    name = "no-such-compiler" if body is None else fake_compiler(tmp_path, body)
    monkeypatch.setattr(compiled, "COMPILERS", (name,))
    monkeypatch.setattr(compiled, "COMPILE_SECONDS", 0.3)
    keep_kernels_in(tmp_path / "kept")
    with caplog.at_level(logging.INFO, "outcrop.models.kernels"):
        found = losses()
    assert says in caplog.text
    assert "training is slower" in caplog.text
    assert not are_compiled(torch.float32)
    torch.testing.assert_close(found, wanted)
    count = len(caplog.records)
    losses()
    assert len(caplog.records) == count  # said once, tried once


def test_without_a_folder_to_keep_them_nothing_is_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with uncompiled():
        wanted = losses()
    (tmp_path / "file").write_text("in the way")
    for folder in (None, tmp_path / "file", tmp_path / "file" / "below"):
        keep_kernels_in(folder)
        torch.testing.assert_close(losses(), wanted)
        assert not are_compiled(torch.float32)
    if COMPILER is not None:
        assert caplog.text.count("could not be compiled") == 2


@needs_compiler
@pytest.mark.parametrize(
    "spoil",
    [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: b"rubbish"],
    ids=["cut off", "empty", "rubbish"],
)
def test_a_damaged_file_is_said_and_compiled_again(
    spoil: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_kernels_in(tmp_path)
    wanted = losses()
    (file,) = tmp_path.glob("*.so")
    whole = file.read_bytes()
    file.unlink()  # the loaded one is not written to
    file.write_bytes(spoil(whole))
    keep_kernels_in(tmp_path)
    assert torch.equal(losses(), wanted)
    assert are_compiled(torch.float32)
    assert f"{file} is damaged" in caplog.text
    assert [
        compiled.find_kept(tmp_path, found.stem.rpartition("-")[0])
        for found in tmp_path.glob("*.so")
    ]


@needs_compiler
def test_what_was_compiled_is_used_again_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_kernels_in(tmp_path)
    wanted = losses()
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    keep_kernels_in(tmp_path)
    assert are_compiled(torch.float32)
    assert torch.equal(losses(), wanted)
    assert [file.suffix for file in tmp_path.iterdir()] == [".so"]


PROCESS = """
import sys
from pathlib import Path
import torch
from outcrop.models import kernels
kernels.keep_kernels_in(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
assert kernels.are_compiled(torch.float32)
print(float(kernels.cross_entropy(torch.ones(2, 5), torch.tensor([0, 3]), 0.0).sum()))
"""


@needs_compiler
def test_processes_that_compile_at_the_same_time_all_have_whole_kernels(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        answers.append(process.communicate(timeout=100)[0])
        assert process.returncode == 0
    assert answers[0] == answers[1]
    assert float(answers[0]) == pytest.approx(2 * torch.tensor(5.0).log().item())
    assert {file.suffix for file in tmp_path.iterdir()} == {".so"}
