"""The compiled pass: against transformers in float64, and that company never changes a number."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.assets.architectures import ARCHITECTURES, Architecture
from torch import Tensor

from outcrop.errors import ModelError
from outcrop.models import compiled
from outcrop.models.lora import ALL_LINEARS, Adapter, LoraConfig, LoraLinear, adapter_of, attach
from outcrop.serve import forward
from outcrop.serve.formats import STRIP
from outcrop.serve.forward import (
    Forward,
    PackedAdapter,
    PackedModel,
    Rows,
    is_compiled,
    pages_of,
)
from outcrop.serve.packed import (
    in_one_piece,
    in_turn,
    pack_adapter,
    pack_model,
    read_shape,
    rotations,
)

COMPILER = next(filter(None, map(shutil.which, compiled.COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
SERVED = {
    name: architecture
    for name, architecture in ARCHITECTURES.items()
    if read_shape(architecture.config.to_dict()) is not None
}
CLOSE = 0.03
"""Of the spread of a row's scores: activations are rounded to bfloat16 once a product."""
PAGES = 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _in_a_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = compiled.library_folder()
    compiled.keep_libraries_in(tmp_path_factory.mktemp("libraries"))
    forward._library.cache_clear()
    yield
    compiled.keep_libraries_in(before)
    forward._library.cache_clear()


def rounded(architecture: Architecture, seed: int = 0) -> Any:
    """A model whose weights are bfloat16 numbers, computed in float64."""
    model = architecture.model(seed)
    for parameter in model.parameters():  # not the buffers: angles stay exact
        parameter.data = parameter.to(torch.bfloat16).to(torch.float64)
    return model


def packed(architecture: Architecture, model: Any) -> PackedModel:
    config = architecture.config.to_dict()
    shape = read_shape(config)
    assert shape is not None
    return pack_model(config, shape, model.state_dict())


def opened(model: PackedModel, threads: int = 2, max_rows: int = 256) -> Forward:
    return Forward(model, threads=threads, num_pages=PAGES, max_rows=max_rows, max_rank=16)


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 90) for _ in range(count)]


def reference(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
    return scores


def off(found_V: Tensor, wanted_V: Tensor) -> float:
    """How far scores are from others, as a share of their spread."""
    return float((found_V.double() - wanted_V).abs().max() / wanted_V.std())


def random_adapter(
    model: Any, rank: int = 4, targets: tuple[str, ...] = ALL_LINEARS, seed: int = 1
) -> Adapter:
    config = LoraConfig(rank=rank, alpha=2.0 * rank, targets=targets)
    attach(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, LoraLinear) or module.lora_a is None:
            continue
        assert module.lora_b is not None
        with torch.no_grad():
            module.lora_a.copy_(module.lora_a.to(torch.bfloat16))
            module.lora_b.normal_(0, 0.3, generator=generator)
            module.lora_b.copy_(module.lora_b.to(torch.bfloat16))
    return adapter_of(model, config)


@needs_compiler
def test_llama_mistral_and_both_qwens_are_covered() -> None:
    kinds = {architecture.kind for architecture in SERVED.values()}
    assert kinds >= {"Llama", "Mistral", "Qwen2", "Qwen3"}


@needs_compiler
@pytest.mark.parametrize("name", SERVED)
def test_scores_are_those_of_transformers(name: str) -> None:
    model = rounded(SERVED[name])
    whole = packed(SERVED[name], model)
    passes = opened(whole)
    ids, pages = tokens(150), pages_of(range(10))
    wanted_TV = reference(model, ids)
    for first, last in ((0, 100), (100, 149), (149, 150)):
        ((scores_V,), (best,)) = passes.run(
            whole, [Rows(ids[first:last], first, pages, None, num_scores=1)]
        )
        assert off(scores_V, wanted_TV[last - 1]) < CLOSE
        assert best == int(scores_V.argmax())
    passes.close()


@needs_compiler
@pytest.mark.parametrize("name", SERVED)
def test_scores_with_an_adapter_are_those_of_transformers(name: str) -> None:
    model = rounded(SERVED[name])
    whole = packed(SERVED[name], model)
    plain_V = reference(model, tokens(40))[-1]
    adapter = random_adapter(model)
    changed = pack_adapter(adapter, whole.shape, SERVED[name].config.intermediate_size)
    wanted_V = reference(model, tokens(40))[-1]
    passes = opened(whole)
    ((scores_V,), _) = passes.run(whole, [Rows(tokens(40), 0, pages_of(range(3)), changed, 1)])
    assert off(plain_V, wanted_V) > 5 * CLOSE
    assert off(scores_V, wanted_V) < CLOSE
    passes.close()


@needs_compiler
@pytest.mark.parametrize(
    ("rank", "targets"),
    [
        (1, ALL_LINEARS),
        (3, ("q_proj", "v_proj")),
        (16, ("down_proj",)),
        (5, ("up_proj",)),
        (2, ("k_proj", "o_proj", "gate_proj")),
    ],
)
def test_adapters_of_every_rank_and_on_some_layers_only(
    rank: int, targets: tuple[str, ...]
) -> None:
    architecture = SERVED["llama"]
    model = rounded(architecture)
    whole = packed(architecture, model)
    adapter = random_adapter(model, rank, targets)
    changed = pack_adapter(adapter, whole.shape, architecture.config.intermediate_size)
    passes = opened(whole)
    ids = tokens(30)
    ((scores_V,), _) = passes.run(whole, [Rows(ids, 0, pages_of(range(2)), changed, 1)])
    assert off(scores_V, reference(model, ids)[-1]) < CLOSE
    passes.close()


@needs_compiler
def test_adapters_that_do_not_fit_are_refused_with_the_layer_and_the_shapes() -> None:
    architecture = SERVED["llama"]
    model = rounded(architecture)
    shape = packed(architecture, model).shape
    adapter = random_adapter(model)
    inner = architecture.config.intermediate_size
    name = "model.layers.1.mlp.down_proj"
    for changed in (
        {name: (torch.zeros(4, 7), adapter.tensors[name][1])},
        {name: (adapter.tensors[name][0], torch.zeros(7, 4))},
        {"model.layers.2.mlp.down_proj": adapter.tensors[name]},
    ):
        odd = replace(adapter, tensors={**adapter.tensors, **changed})
        with pytest.raises(ModelError, match=r"does not fit the model.*down_proj"):
            pack_adapter(odd, shape, inner)
    with pytest.raises(ModelError, match="does not fit"):
        pack_adapter(replace(adapter, tensors={}), shape, inner)


class Company:
    """Sequences of one model, of which some are asked together, a part at a time."""

    def __init__(self, threads: int = 2) -> None:
        architecture = SERVED["llama"]
        model = rounded(architecture)
        self.model = packed(architecture, model)
        inner = architecture.config.intermediate_size
        adapters = [
            random_adapter(rounded(architecture), rank, targets, seed)
            for seed, (rank, targets) in enumerate([(4, ALL_LINEARS), (7, ("q_proj", "up_proj"))])
        ]
        self.kinds: list[PackedAdapter | None] = [
            None,
            *(pack_adapter(adapter, self.model.shape, inner) for adapter in adapters),
        ]
        self.threads = threads

    def alone(self, ids: Sequence[int], kind: int) -> Tensor:
        passes = opened(self.model, threads=1)
        scores_NV, _ = passes.run(
            self.model, [Rows(ids, 0, pages_of(range(PAGES)), self.kinds[kind], 1)]
        )
        passes.close()
        return scores_NV[0]

    def together(self, whole: Sequence[tuple[int, int, Sequence[int]]]) -> list[Tensor]:
        """Ask for (length, kind, lengths of the parts) together, as many parts as there are."""
        passes = opened(self.model, self.threads)
        numbers = random.Random(1).sample(range(PAGES), PAGES)
        tables = [pages_of(numbers[10 * place : 10 * place + 10]) for place in range(len(whole))]
        done, found = [0] * len(whole), [torch.empty(0)] * len(whole)
        for turn in range(max(len(parts) for _, _, parts in whole)):
            asked, rows = [], []
            for place, (length, kind, parts) in enumerate(whole):
                if turn < len(parts):
                    ids = tokens(length, seed=place)[done[place] : done[place] + parts[turn]]
                    rows.append(Rows(ids, done[place], tables[place], self.kinds[kind], 1))
                    done[place] += parts[turn]
                    asked.append(place)
            scores_NV, _ = passes.run(self.model, rows)
            for place, scores_V in zip(asked, scores_NV, strict=True):
                found[place] = scores_V
        passes.close()
        return found


@st.composite
def companies(draw: st.DrawFn) -> list[tuple[int, int, list[int]]]:
    whole = []
    for _ in range(draw(st.integers(1, 5))):
        parts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
        whole.append((sum(parts), draw(st.integers(0, 2)), parts))
    return whole


def test_an_adapter_lies_in_one_piece_of_memory_so_that_nothing_stays_when_it_goes() -> None:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).bfloat16()

    given_pairs = [(matrix(3, 5), matrix(7, 3)), None, (matrix(1, 1), matrix(64, 1))]
    first, second = in_one_piece([given_pairs, given_pairs[:2]])
    assert len(first) == 3
    assert len(second) == 2
    tensors = []
    for before, after in zip([*given_pairs, *given_pairs[:2]], [*first, *second], strict=True):
        assert (before is None) == (after is None)
        if before is not None and after is not None:
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[1], after[1])
            tensors += list(after)
    (storage,) = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert [(tensor.data_ptr() - storage) for tensor in tensors] == [*(0, 64, 128, 192, 320, 384)]


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(whole=companies(), threads=st.integers(1, 3))
def test_scores_are_the_same_to_the_last_bit_alone_in_parts_and_in_any_company(
    whole: list[tuple[int, int, list[int]]], threads: int
) -> None:
    company = Company(threads)
    found = company.together(whole)
    for place, (length, kind, _) in enumerate(whole):
        assert torch.equal(found[place], company.alone(tokens(length, seed=place), kind))


@needs_compiler
def test_what_a_page_held_before_does_not_matter() -> None:
    architecture = SERVED["llama"]
    model = packed(architecture, rounded(architecture))
    passes = opened(model)
    ids = tokens(21)
    rows = [Rows(ids, 0, pages_of([3, 7]), None, 1)]
    first, _ = passes.run(model, rows)
    for cache in (passes._keys, passes._values):
        cache.fill_(float("nan"))
    again, best = passes.run(model, rows)
    assert torch.equal(again, first)
    assert best[0] >= 0
    passes.close()


@needs_compiler
def test_scores_that_are_not_finite_have_no_likeliest_token_and_spoil_no_other() -> None:
    architecture = SERVED["llama"]
    model = rounded(architecture)
    whole = packed(architecture, model)
    wanted, _ = (passes := opened(whole)).run(whole, [Rows(tokens(9), 0, pages_of([0]), None, 1)])
    adapter = random_adapter(model)
    a_RI, b_OR = adapter.tensors["model.layers.0.mlp.up_proj"]
    spoilt = {"model.layers.0.mlp.up_proj": (a_RI, torch.full_like(b_OR, float("inf")))}
    broken = pack_adapter(
        replace(adapter, tensors={**adapter.tensors, **spoilt}),
        whole.shape,
        architecture.config.intermediate_size,
    )
    for _ in range(2):
        scores_NV, best = passes.run(
            whole,
            [
                Rows(tokens(9), 0, pages_of([1]), broken, 1),
                Rows(tokens(9), 0, pages_of([2]), None, 1),
            ],
        )
        assert best[0] == -1
        assert torch.equal(scores_NV[1], wanted[0])
    passes.close()


@needs_compiler
def test_models_of_one_shape_take_turns_on_the_same_pages() -> None:
    architecture = SERVED["llama"]
    models = [packed(architecture, rounded(architecture, seed)) for seed in (0, 1)]
    passes = opened(models[0])
    rows = [Rows(tokens(9), 0, pages_of([place]), None, 1) for place in (0, 1)]
    found = [passes.run(models[place], [rows[place]])[0] for place in (0, 1)]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(passes.run(models[0], [rows[1]])[0], found[0])
    passes.close()


@needs_compiler
@pytest.mark.parametrize(
    "flags",
    [(), ("-DUNIT=16",), ("-DROUNDED",), ("-DROUNDED", "-DUNIT=16")],
    ids=["plain", "wide", "rounded", "rounded and wide"],
)
def test_other_processors_compute_as_closely_and_alike_in_any_company(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Without instructions of its own, with wide vectors, with products of bfloat16 numbers."""
    monkeypatch.setattr(forward, "MACHINE_FLAGS", (flags,))
    # Vectors that are wider than the processor's take compilers a minute to make good code of.
    monkeypatch.setattr(forward, "FLAGS", ("-O1", *forward.FLAGS[1:]))
    forward._library.cache_clear()
    try:
        test_scores_are_those_of_transformers("llama")
        company = Company()
        whole = [(60, 0, [30, 29, 1]), (9, 1, [8, 1]), (3, 2, [1, 1, 1]), (41, 1, [40, 1])]
        found = company.together(whole)
        for place, (length, kind, _) in enumerate(whole):
            assert torch.equal(found[place], company.alone(tokens(length, seed=place), kind))
    finally:
        monkeypatch.undo()
        forward._library.cache_clear()


def test_without_a_compiler_nothing_is_compiled_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = compiled.library_folder()
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    compiled.keep_libraries_in(tmp_path)
    forward._library.cache_clear()
    try:
        assert not is_compiled()
        assert "answers are slower" in caplog.text
    finally:
        compiled.keep_libraries_in(before)
        forward._library.cache_clear()


def test_gate_and_up_lie_in_turn() -> None:
    gate_OI, up_OI = torch.full((40, 2), 1.0), torch.full((40, 2), 2.0)
    both = in_turn([gate_OI, up_OI], 48)[:, 0].view(-1, STRIP)
    assert both[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert both[4:, 8:].abs().sum() == 0


@pytest.mark.parametrize("name", SERVED)
def test_angles_are_those_of_transformers(name: str) -> None:
    architecture = SERVED[name]
    model = architecture.model(dtype=torch.float32)
    positions = torch.arange(200)[None]
    cosines, sines = model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
    head = cosines.shape[-1]
    found = rotations(architecture.config.to_dict(), head)
    for mine_SF, theirs in zip(found, (cosines, sines), strict=True):
        torch.testing.assert_close(mine_SF[:200], theirs[0, :, : head // 2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"quantization_config": {}},
        {"head_dim": 6},
        {"head_dim": 512},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_model_the_pass_does_not_cover_is_left_to_torch(change: dict[str, Any]) -> None:
    config = SERVED["llama"].config.to_dict()
    assert read_shape(config) is not None
    assert read_shape({**config, **change}) is None


def test_weights_that_do_not_fit_their_configuration_are_refused_by_name() -> None:
    architecture = SERVED["llama"]
    config = json.loads(architecture.config.to_json_string(use_diff=False))
    shape = read_shape(config)
    assert shape is not None
    weights = dict(architecture.model().state_dict())
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ModelError, match=r"k_proj\.weight has the shape \(3, 3\)"):
        pack_model(config, shape, {**weights, name: torch.zeros(3, 3)})
    del weights[name]
    with pytest.raises(ModelError, match=r"k_proj\.weight is missing"):
        pack_model(config, shape, weights)
