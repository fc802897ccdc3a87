"""The likelihood of packed records."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.assets.tiny_examples import tiny_examples
from tests.assets.tiny_model import VOCABULARY, frozen_tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM

from outcrop.data.pack import pack
from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, StopRequested
from outcrop.evaluate.attention import packed_attention
from outcrop.evaluate.likelihood import (
    evaluate_likelihood,
    num_loss_tokens,
    perplexity,
    token_losses,
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return frozen_tiny_model()


def losses(model: LlamaForCausalLM, *examples: Example) -> Tensor:
    (batch,) = pack(examples, 10_000)
    with torch.no_grad(), packed_attention(model):
        return token_losses(model, batch)


def test_loss_is_of_exactly_the_tokens_under_the_mask(model: LlamaForCausalLM) -> None:
    example = Example([5, 6, 7, 8, 9], [False, False, True, False, True])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    surprise = -torch.log_softmax(logits.double(), dim=-1)
    wanted = torch.stack([surprise[1, 7], surprise[3, 9]]).float()
    torch.testing.assert_close(losses(model, example), wanted, rtol=1e-4, atol=1e-5)


def test_records_in_one_row_do_not_see_each_other(model: LlamaForCausalLM) -> None:
    first, second, third = tiny_examples(3)
    changed = dataclasses.replace(first, input_ids=[(t + 1) % VOCABULARY for t in first.input_ids])
    count = num_loss_tokens(first)
    together = losses(model, first, second, third)
    after_change = losses(model, changed, second, third)
    assert not torch.equal(together[:count], after_change[:count])
    assert torch.equal(together[count:], after_change[count:])
    torch.testing.assert_close(losses(model, second), together[count:][: num_loss_tokens(second)])


def test_first_token_of_a_record_is_not_predicted_from_the_one_before(
    model: LlamaForCausalLM,
) -> None:
    whole = Example([5, 6, 7], [True, True, True])
    assert num_loss_tokens(whole) == 2
    assert losses(model, whole, whole).numel() == 4


def test_cutting_into_micro_batches_and_chunks_changes_nothing(model: LlamaForCausalLM) -> None:
    examples = tiny_examples(9)
    (batch,) = pack(examples, 10_000)
    with torch.no_grad(), packed_attention(model):
        whole = token_losses(model, batch)
        chunked = token_losses(model, batch, chunk_tokens=7)
        pieces = torch.cat([token_losses(model, piece) for piece in pack(examples, 30)])
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(pieces, whole)


def test_mean_is_over_tokens_not_over_records(model: LlamaForCausalLM) -> None:
    examples = tiny_examples(5)
    likelihood = evaluate_likelihood(model, examples)
    every = losses(model, *examples)
    assert likelihood.num_tokens == every.numel() == sum(map(num_loss_tokens, examples))
    assert likelihood.loss == pytest.approx(float(every.mean()), rel=1e-6)
    assert likelihood.perplexity == pytest.approx(math.exp(likelihood.loss))


def test_evaluation_leaves_the_model_as_it_was(model: LlamaForCausalLM) -> None:
    before = model.config._attn_implementation
    evaluate_likelihood(model, tiny_examples(2))
    assert model.config._attn_implementation == before
    with pytest.raises(StopRequested):
        evaluate_likelihood(model, tiny_examples(2), should_stop=lambda: True)
    assert model.config._attn_implementation == before


def test_records_without_any_label_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(EmptyLossError):
        evaluate_likelihood(model, [Example([4, 5, 6], [True, False, False])])


def test_perplexity_of_a_huge_loss_is_infinite() -> None:
    assert perplexity(1e6) == math.inf
    assert perplexity(0.0) == 1.0
