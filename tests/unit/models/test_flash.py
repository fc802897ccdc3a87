"""Attention as a GPU does it, with flash attention's contract met by plain operations on the CPU.

The kernels below are registered under torch's own names, so torch checks every call against its
schema; they check what only the GPU's kernel would refuse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.assets.tiny_examples import tiny_examples
from tests.assets.tiny_model import VOCABULARY, frozen_tiny_model
from tests.assets.tiny_plan import tiny_plan
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from outcrop.data.records import Example
from outcrop.models import flash
from outcrop.models.flash import fits, forward, place_spans, span_numbers
from outcrop.models.rows import Segment
from outcrop.train.gradients import gather_gradients
from outcrop.train.methods import make_trainable

PLAN = tiny_plan(
    learning_rate=1e-3,
    warmup_steps=0,
    lora_alpha=10.0,
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
SEPARATE = tiny_examples(6)
SHARING = [
    Example([*range(3, 12), *example.input_ids], [*[False] * 9, *example.loss_mask])
    for example in tiny_examples(6, seed=1)
]
"""All begin with the same nine tokens."""


class Contract:
    """What flash attention promises and demands, in plain operations."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **unused: Any,
    ) -> tuple[Tensor, ...]:
        self.calls.append("forward")
        assert (dropout_p, is_causal, return_debug_mask) == (0.0, True, False)
        assert not any(unused.values())
        assert window_size_right in (None, 0)
        output, sums = torch.empty_like(query), []
        for rows, keys in self._segments(query, key, value, query_ends, key_ends, max_q, max_k):
            weights, log_sums = _weights(query[rows], key[keys], scale, window_size_left)
            output[rows] = torch.einsum("nsk,knw->snw", weights, _each(value[keys], query))
            sums.append(log_sums)
        nothing = torch.empty(0)
        return output, torch.cat(sums, dim=1).float(), nothing, nothing, nothing

    def backward(
        self,
        doutput: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        log_sums: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("backward")
        assert (dropout_p, is_causal) == (0.0, True)
        assert torch.are_deterministic_algorithms_enabled(), "adds in any order otherwise"
        assert doutput.shape == output.shape == query.shape
        assert log_sums.shape == (query.shape[1], query.shape[0])
        assert scale is not None
        dquery, dkey, dvalue = map(torch.empty_like, (query, key, value))
        for rows, keys in self._segments(query, key, value, query_ends, key_ends, max_q, max_k):
            weights, _ = _weights(query[rows], key[keys], scale, window_size_left)
            dweights = torch.einsum("snw,knw->nsk", doutput[rows], _each(value[keys], query))
            along = (weights * dweights).sum(-1, keepdim=True)
            dscores = scale * weights * (dweights - along)
            dquery[rows] = torch.einsum("nsk,knw->snw", dscores, _each(key[keys], query))
            dkey[keys] = _folded(torch.einsum("nsk,snw->knw", dscores, query[rows]), key)
            dvalue[keys] = _folded(torch.einsum("nsk,snw->knw", weights, doutput[rows]), value)
        return dquery, dkey, dvalue

    def _segments(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_ends: Tensor,
        key_ends: Tensor,
        max_q: int,
        max_k: int,
    ) -> Iterator[tuple[slice, slice]]:
        assert query_ends.dtype == key_ends.dtype == torch.int32
        assert query.dtype == key.dtype == value.dtype
        assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert query.shape[1] % key.shape[1] == 0
        assert key.shape == value.shape
        rows, keys = query_ends.tolist(), key_ends.tolist()
        assert (rows[0], rows[-1]) == (0, len(query))
        assert (keys[0], keys[-1]) == (0, len(key))
        assert len(rows) == len(keys)
        assert max_q > 1, "a single query is laid out in another way"
        for first, end, first_key, end_key in zip(rows, rows[1:], keys, keys[1:], strict=False):
            assert 0 < end - first <= max_q
            assert end - first <= end_key - first_key <= max_k
            yield slice(first, end), slice(first_key, end_key)


def _each(keys_KGW: Tensor, query: Tensor) -> Tensor:
    """Give each head of queries its keys: neighbours have common ones."""
    return keys_KGW.repeat_interleave(query.shape[1] // keys_KGW.shape[1], dim=1)


def _folded(dkeys_KNW: Tensor, key: Tensor) -> Tensor:
    folded: Tensor = dkeys_KNW.unflatten(1, (key.shape[1], -1)).sum(2)
    return folded


def _weights(
    query: Tensor, key: Tensor, scale: float | None, left: int | None
) -> tuple[Tensor, Tensor]:
    """Return (weights, log of the sums), (N, S, K) and (N, S); the last query sees the last key."""
    assert scale is not None
    scores = torch.einsum("snw,knw->nsk", query, _each(key, query)) * scale
    own = torch.arange(len(query))[:, None] + len(key) - len(query)
    place = torch.arange(len(key))
    hidden = place > own
    if left is not None:
        hidden |= place < own - left
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1), torch.logsumexp(scores, dim=-1)


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Iterator[Contract]:
    """Flash attention for the CPU, taken wherever it would be on a GPU."""
    found = Contract()
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_flash_attention_forward", found.forward, "CPU")
        library.impl("_flash_attention_backward", found.backward, "CPU")
        monkeypatch.setattr(flash, "fits", lambda device, dtype, width: True)
        yield found
    finally:
        library._destroy()


def make_model(kind: str) -> Any:
    if kind == "llama":
        return frozen_tiny_model()
    torch.manual_seed(0)
    # The window is shorter than the records.
    config = MistralConfig(**SIZES, sliding_window=5) if kind == "mistral" else Qwen3Config(**SIZES)
    make: Callable[..., Any] = AutoModelForCausalLM.from_config
    model = make(config)
    model.requires_grad_(False)
    return model.eval()


def gradient(
    kind: str, method: str, examples: list[Example], dtype: torch.dtype
) -> tuple[float, Tensor]:
    plan = dataclasses.replace(PLAN, method=method)
    trainable = make_trainable(make_model(kind).to(dtype), plan, seed=0)
    (master,) = trainable.masters
    with torch.no_grad():
        # B begins as zero, which would hide most of the gradients.
        master += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(2))
    trainable.apply_masters()
    loss, _ = gather_gradients(trainable, examples)
    assert master.grad is not None
    return loss, master.grad


@pytest.mark.parametrize("method", ["adapter", "full"])
@pytest.mark.parametrize("examples", [SEPARATE, SHARING], ids=["separate", "sharing a prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_gradients_by_flash_attention_equal_those_in_blocks(
    kind: str,
    examples: list[Example],
    method: str,
    contract: Contract,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss, found = gradient(kind, method, examples, torch.float64)
    assert contract.calls == ["forward"] * 2 + ["backward"] * 2
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(flash, "fits", fits)
    expected_loss, expected = gradient(kind, method, examples, torch.float64)
    assert len(contract.calls) == 4
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert (found - expected).norm() / expected.norm() < 1e-11


@pytest.mark.parametrize("examples", [SEPARATE, SHARING], ids=["separate", "sharing a prefix"])
def test_bfloat16_is_as_near_to_the_exact_gradients_as_blocks_are(
    examples: list[Example], contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = gradient("llama", "adapter", examples, torch.bfloat16)
    assert found.dtype == torch.float32
    assert contract.calls
    monkeypatch.setattr(flash, "fits", fits)
    _, blocks = gradient("llama", "adapter", examples, torch.bfloat16)
    _, exact = gradient("llama", "adapter", examples, torch.float64)
    assert (found - exact).norm() < 1.3 * (blocks - exact).norm()
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_a_row_of_single_tokens_is_no_single_query(contract: Contract) -> None:
    numbers = span_numbers([Segment(0, 1, 0), Segment(1, 1, 0)])
    spans = place_spans(numbers, numbers.tensors)
    rows = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    output, _ = forward(rows, spans, groups=1, window=0)
    torch.testing.assert_close(output, rows[:, 3:].expand(2, 2, 8).flatten(1))


def test_repeated_keys_are_those_of_the_prefix() -> None:
    segments = [Segment(0, 2, 0), Segment(2, 1, 2), Segment(3, 3, 2)]
    numbers = span_numbers(segments)
    assert numbers.query_ends.tolist() == [0, 2, 3, 6]
    assert numbers.key_ends.tolist() == [0, 2, 5, 10]
    assert numbers.key_rows_K.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
    assert numbers.own_keys_T.tolist() == [0, 1, 4, 7, 8, 9]
    assert numbers.repeated.tolist() == [2, 3, 5, 6]
    assert (numbers.most_queries, numbers.most_keys) == (3, 5)


def test_only_a_gpu_takes_flash_attention() -> None:
    assert not fits(torch.device("cpu"), torch.bfloat16, 64)
    assert not fits(torch.device("cuda"), torch.float32, 64)
    assert not fits(torch.device("cuda"), torch.bfloat16, 60)
    assert not fits(torch.device("cuda"), torch.bfloat16, 512)
    assert not fits(torch.device("cuda"), torch.bfloat16, 208)
