"""Matrices in fewer bits: what they are rounded to, and that a pass multiplies with just that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.assets.architectures import ARCHITECTURES
from torch import Tensor

from outcrop.models import compiled
from outcrop.serve import forward
from outcrop.serve.formats import is_bfloat16, pack_matrix, unpack_matrix
from outcrop.serve.forward import Forward, PackedModel, Rows, pack_few_bits, pages_of, rounds_rows
from outcrop.serve.packed import FEW_BITS, LINEAR_MODULES, pack_model, read_shape

COMPILER = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
LLAMA = ARCHITECTURES["llama"]
CLOSE = 0.03
"""Of the spread of a row's scores: keys and values are rounded to bfloat16."""


@pytest.fixture(autouse=True, scope="module")
def _in_a_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = compiled.library_folder()
    compiled.keep_libraries_in(tmp_path_factory.mktemp("libraries"))
    forward._library.cache_clear()
    yield
    compiled.keep_libraries_in(before)
    forward._library.cache_clear()


def few_bits(matrix_OI: Tensor, format: str) -> Tensor:
    return unpack_matrix(pack_few_bits(matrix_OI, format), *matrix_OI.shape)


@settings(deadline=None, max_examples=40)
@given(
    outputs=st.integers(1, 70),
    pairs=st.integers(1, 40),
    format=st.sampled_from(["bfloat16", "float32"]),
)
def test_a_packed_matrix_is_unpacked_to_the_same_numbers(
    outputs: int, pairs: int, format: str
) -> None:
    matrix_OI = torch.randn(outputs, 2 * pairs).to(torch.bfloat16).float()
    found = pack_matrix(matrix_OI, format)
    assert found.data.data_ptr() % 64 == 0
    assert torch.equal(unpack_matrix(found, outputs, 2 * pairs), matrix_OI)


@needs_compiler
@settings(deadline=None, max_examples=40)
@given(outputs=st.integers(1, 70), pairs=st.integers(1, 70), format=st.sampled_from(FEW_BITS))
def test_a_number_is_rounded_by_less_than_a_step_of_its_group(
    outputs: int, pairs: int, format: str
) -> None:
    matrix_OI = torch.randn(outputs, 2 * pairs)
    found_OI = few_bits(matrix_OI, format)
    size, steps = (64, 127) if format == "int8" else (32, 15)
    for group_OK, found_OK in zip(
        matrix_OI.split(size, dim=1), found_OI.split(size, dim=1), strict=True
    ):
        low, high = group_OK.amin(1, keepdim=True), group_OK.amax(1, keepdim=True)
        widest = torch.maximum(high, -low)
        span = widest if format == "int8" else high - low
        # Half a step, and what scales and least numbers are rounded by.
        most = 0.52 * span / steps + widest / 250
        assert bool(((found_OK - group_OK).abs() <= most + 1e-6).all())


@needs_compiler
@pytest.mark.parametrize("format", FEW_BITS)
def test_noughts_and_equal_numbers_stay_what_they_are(format: str) -> None:
    matrix_OI = torch.zeros(20, 96)
    matrix_OI[3] = 1.5
    found_OI = few_bits(matrix_OI, format)
    assert torch.equal(found_OI[4:], matrix_OI[4:])
    assert torch.allclose(found_OI[3], matrix_OI[3], rtol=0.01)


@needs_compiler
def test_numbers_that_were_four_bits_once_are_found_again() -> None:
    steps = torch.randint(0, 16, (24, 4, 32)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    scale, least = torch.rand(24, 4, 1).bfloat16().float() + 0.25, -torch.rand(24, 4, 1)
    scale, least = scale.bfloat16().float(), least.bfloat16().float()
    matrix_OI = (steps * scale + least).reshape(24, 128)
    found_OI = few_bits(matrix_OI, "int4")
    assert float((found_OI - matrix_OI).abs().max()) < 0.05 * float(scale.max())


def weights_and_model(seed: int = 0) -> tuple[dict[str, Tensor], object]:
    model = LLAMA.model(seed)
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.bfloat16).to(torch.float64)
    return dict(model.state_dict()), model


def packed(weights: Mapping[str, Tensor], precision: str) -> PackedModel:
    config = LLAMA.config.to_dict()
    shape = read_shape(config)
    assert shape is not None
    return pack_model(config, shape, weights, precision)


def scores(model: PackedModel, parts: list[int], threads: int = 2) -> Tensor:
    """Of the last token, the sequence computed in parts."""
    passes = Forward(model, threads=threads, num_pages=8, max_rows=256, max_rank=16)
    first, ids = 0, [(7 * place) % 87 + 3 for place in range(sum(parts))]
    for length in parts:
        rows = Rows(ids[first : first + length], first, pages_of(range(8)), None, 1)
        found, _ = passes.run(model, [rows])
        first += length
    passes.close()
    return found[0]


@needs_compiler
@pytest.mark.parametrize("precision", FEW_BITS)
def test_a_pass_multiplies_with_what_was_rounded(precision: str) -> None:
    weights, model = weights_and_model()
    rounded = dict(weights)
    for name, matrix_OI in weights.items():
        modules = [one for several in LINEAR_MODULES.values() for one in several]
        if any(f"{module}.weight" in name for module in modules):
            rounded[name] = few_bits(matrix_OI.float(), precision).double()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and (name.startswith("lm_head") or LLAMA.config.tie_word_embeddings):
            rounded[name] = few_bits(weights[name].float(), "int8").double()
    model.load_state_dict(rounded)  # type: ignore[attr-defined]
    ids = [(7 * place) % 87 + 3 for place in range(40)]
    with torch.no_grad():
        wanted_V = model(input_ids=torch.tensor([ids])).logits[0, -1]  # type: ignore[operator]
    found_V = scores(packed(weights, precision), [40]).double()
    assert float((found_V - wanted_V).abs().max() / wanted_V.std()) < CLOSE


@needs_compiler
@pytest.mark.parametrize("precision", FEW_BITS)
def test_few_bits_give_the_same_bits_whatever_the_rows_and_the_threads(precision: str) -> None:
    """Few rows widen a matrix in registers, many rows once for all of them."""
    model = packed(weights_and_model()[0], precision)
    wanted_V = scores(model, [41], threads=1)
    for parts in ([1] * 41, [5, 30, 6], [20, 7, 13, 1], [40, 1]):
        assert torch.equal(scores(model, parts), wanted_V)


@needs_compiler
def test_weights_trained_in_float32_are_kept_so_where_a_pass_computes_so() -> None:
    weights, _ = weights_and_model()
    name = "model.layers.1.mlp.up_proj.weight"
    trained = {**weights, name: weights[name] * (1 + 2**-12)}
    assert not is_bfloat16(trained[name])
    before, rounded = packed(weights, "auto"), packed(trained, "bfloat16")
    kept = packed(trained, "auto")
    assert torch.equal(scores(rounded, [9]), scores(before, [9]))
    assert rounded.num_bytes == before.num_bytes
    if rounds_rows():
        assert kept.num_bytes == before.num_bytes
    else:
        assert kept.num_bytes > before.num_bytes
        assert not torch.equal(scores(kept, [9]), scores(before, [9]))


@needs_compiler
def test_fewer_bits_take_less_memory() -> None:
    weights, _ = weights_and_model()
    wide, eight, four = (packed(weights, name).num_bytes for name in ("bfloat16", "int8", "int4"))
    assert four < eight < wide
