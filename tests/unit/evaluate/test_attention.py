"""Attention for packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.assets.architectures import COMMON, Architecture
from tests.assets.smollm2 import smollm2_folder
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from outcrop.data.records import Example
from outcrop.errors import ModelError
from outcrop.evaluate.attention import SHORT_RECORD_TOKENS, Rule, attend, packed_attention
from outcrop.evaluate.likelihood import evaluate_likelihood
from outcrop.models.load import load_base

NUM_HEADS, NUM_GROUPS, WIDTH = 6, 2, 16


def row(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, WIDTH).transpose(1, 2).requires_grad_(True)
        for heads in (NUM_HEADS, NUM_GROUPS, NUM_GROUPS)
    )
    return query, key, value


def causal(lengths: list[int]) -> Rule:
    """The rule that a model asks for, as transformers writes it."""
    return Rule(lengths, lambda _, __, query, key: key <= query, torch.device("cpu"))


def windowed(lengths: list[int], window: int) -> Rule:
    return Rule(
        lengths,
        lambda _, __, query, key: (key <= query) & (key > query - window),
        torch.device("cpu"),
    )


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
    output, _ = attend(nn.Module(), *tensors, causal(lengths))
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, weight)

    wanted = masked(*tensors, lengths)
    expected = torch.autograd.grad(wanted, tensors, weight)
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-6)
    for gradient, standard in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, standard, rtol=1e-4, atol=1e-5)


def test_scaling_is_the_callers() -> None:
    query, key, value = row(7)
    plain, _ = attend(nn.Module(), query, key, value, causal([7]))
    doubled, _ = attend(nn.Module(), query / 2, key, value, causal([7]), scaling=2 * WIDTH**-0.5)
    torch.testing.assert_close(doubled, plain)


def test_lengths_must_fill_the_row() -> None:
    with pytest.raises(RuntimeError):
        attend(nn.Module(), *row(7), causal([3, 3]))


@pytest.mark.parametrize("lengths", [[4], [3, 9, 5, 20], [SHORT_RECORD_TOKENS + 9, 7]])
@pytest.mark.parametrize(("window", "softcap"), [(5, None), (1, None), (5, 2.0), (10**6, 2.0)])
def test_windows_and_capped_scores_are_those_of_the_plain_formula(
    lengths: list[int], window: int, softcap: float | None
) -> None:
    tensors = row(sum(lengths))
    output, _ = attend(nn.Module(), *tensors, windowed(lengths, window), softcap=softcap)
    weight = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, weight)

    query, key, value = tensors
    scores = query @ key.repeat_interleave(3, dim=1).transpose(2, 3) * WIDTH**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    record = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    inside = (record[:, None] == record[None, :]).tril()
    inside &= place[None, :] > place[:, None] - window
    shown = scores.masked_fill(~inside, float("-inf"))
    wanted = (shown.softmax(-1) @ value.repeat_interleave(3, dim=1)).transpose(1, 2)
    expected = torch.autograd.grad(wanted, tensors, weight)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    for gradient, standard in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, standard, rtol=1e-3, atol=1e-4)


def test_a_rule_is_plain_up_to_where_a_window_begins_to_matter() -> None:
    rule = windowed([9, 3], 4)
    assert rule.seen(4) is None
    seen = rule.seen(9)
    assert seen is not None
    assert seen.sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
    assert rule.seen(4) is None


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"s_aux": torch.zeros(NUM_HEADS)}, "takes s_aux, which is not known here"),
        ({"position_bias": torch.zeros(1)}, "takes position_bias"),
        ({"is_causal": False}, "looks to both sides"),
    ],
)
def test_what_is_not_known_of_attention_is_refused(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        attend(nn.Module(), *row(3), causal([3]), **extra)
    attend(nn.Module(), *row(3), causal([3]), position_ids=torch.arange(3), s_aux=None)


def test_a_rule_that_shows_what_comes_after_is_refused() -> None:
    both_sides = Rule([4], lambda _, __, query, key: key <= query + 1, torch.device("cpu"))
    with pytest.raises(ModelError, match="looks to both sides"):
        attend(nn.Module(), *row(4), both_sides)


def test_a_mask_of_another_make_is_refused() -> None:
    mask: Any = torch.ones(1, 1, 3, 3)
    with pytest.raises(ModelError, match="not made by transformers' rules"):
        attend(nn.Module(), *row(3), mask)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("Mamba", {"state_size": 4}, "records in one row would not be independent"),
        ("Llama", {"is_causal": False}, "looks to both sides"),
        ("Bloom", {}, "does not let attention be replaced"),
        ("GPTJ", {"rotary_dim": 4}, "does not let attention be replaced"),
        (
            "Gemma3Text",
            {"head_dim": 8, "use_bidirectional_attention": True},
            "not told by places in a record alone|looks to both sides",
        ),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused_and_left_as_it_was(
    kind: str, changes: dict[str, Any], says: str
) -> None:
    model = Architecture(kind, changes).model(dtype=torch.float32)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=rf"A \w+ model cannot be trained .*({says})"):
        evaluate_likelihood(model, [Example([5, 6, 7], [False, True, True])])
    assert model.config._attn_implementation == before


def test_a_trained_model_in_bfloat16_is_not_refused_for_rounding_and_left_as_it_was() -> None:
    """Between two of transformers' own attentions, its hidden states differ by a quarter there."""
    model = load_base(smollm2_folder(), dtype=torch.bfloat16)
    before = {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()}
    with packed_attention(model):
        pass
    assert {name: (p.dtype, p.data_ptr()) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_cannot_be_packed_is_refused_in_bfloat16_too() -> None:
    model = Architecture("Mamba", {"state_size": 4}).model(dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="would not be independent"), packed_attention(model):
        pass
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_head_whose_scores_are_made_elsewhere_is_refused() -> None:
    class Elsewhere(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, **others: Any) -> Any:
            scores = self.lm_head(self.model.embed_tokens(input_ids))
            return CausalLMOutputWithPast(logits=scores)

    torch.manual_seed(0)
    model = Elsewhere(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True))
    with pytest.raises(ModelError, match="not computed from what its decoder returns"):
        evaluate_likelihood(model, [Example([5, 6, 7], [False, True, True])])


def test_a_dynamic_rotation_is_refused_only_where_it_depends_on_earlier_rows() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    changes = {"rope_parameters": rope, "max_position_embeddings": 16}
    model = Architecture("Llama", changes).model(dtype=torch.float32)

    def example(length: int) -> Example:
        return Example([5] * length, [place > 2 for place in range(length)])

    assert evaluate_likelihood(model, [example(16), example(7)]).num_tokens == 17
    for records in ([example(7), example(17)], [example(17)]):
        with pytest.raises(ModelError, match=r"A record has 17 tokens.*past 16 by what came"):
            evaluate_likelihood(model, records)
