"""The packed path against transformers' own forward pass with padding, labels and a separate add.

The reference pads, computes the scores of all tokens, takes the loss with labels and adds the
adapter's output to the layer's. Both sides are float32, so only the order of sums differs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from tests.assets.tiny_examples import tiny_examples
from tests.assets.tiny_model import frozen_tiny_model, tiny_model
from tests.assets.tiny_plan import tiny_plan
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from outcrop.data.pack import IGNORE_INDEX, pack
from outcrop.data.records import Example
from outcrop.evaluate.attention import packed_attention
from outcrop.evaluate.likelihood import num_loss_tokens, token_losses
from outcrop.models.lora import Adapter, LoraConfig, LoraLinear, adapter_of, attach
from outcrop.train.gradients import gather_gradients
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.portions import Portions

CONFIG = LoraConfig(rank=4, alpha=10.0)
EXAMPLES = tiny_examples(8)
PLAN = tiny_plan(
    learning_rate=1e-3,
    warmup_steps=0,
    lora_rank=CONFIG.rank,
    lora_alpha=CONFIG.alpha,
    lora_targets=CONFIG.targets,
)


class SeparateAdd(nn.Module):
    """The textbook form: the layer's output plus the adapter's."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a = nn.Parameter(lora_a.clone())
        self.lora_b = nn.Parameter(lora_b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return cast("Tensor", self.linear(x)) + CONFIG.scaling * (x @ self.lora_a.T @ self.lora_b.T)


def trained_model() -> tuple[LlamaForCausalLM, Adapter]:
    """The tiny model with an adapter as after some training: B is not zero."""
    model = frozen_tiny_model()
    attach(model, CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.lora_b is not None:
            module.lora_b.data.normal_(0, 0.1, generator=generator)
    return model, adapter_of(model, CONFIG)


def reference_model(adapter: Adapter) -> LlamaForCausalLM:
    model = frozen_tiny_model()
    for name, (lora_a, lora_b) in adapter.tensors.items():
        parent, _, last = name.rpartition(".")
        linear = cast("nn.Linear", model.get_submodule(name))
        setattr(model.get_submodule(parent), last, SeparateAdd(linear, lora_a, lora_b))
    return model


def reference_loss(model: LlamaForCausalLM, examples: list[Example]) -> Tensor:
    width = max(len(example.input_ids) for example in examples)
    input_ids, attention_mask, labels = [], [], []
    for example in examples:
        length = len(example.input_ids)
        fill = width - length
        input_ids.append(example.input_ids + [0] * fill)
        attention_mask.append([1] * length + [0] * fill)
        labels.append(
            [
                token if carries_loss else IGNORE_INDEX
                for token, carries_loss in zip(example.input_ids, example.loss_mask, strict=True)
            ]
            + [IGNORE_INDEX] * fill
        )
    loss: Tensor = model(
        input_ids=torch.tensor(input_ids),
        attention_mask=torch.tensor(attention_mask),
        labels=torch.tensor(labels),
    ).loss
    return loss


@pytest.mark.parametrize("chunk_tokens", [512, 5])
def test_loss_and_adapter_gradients_equal_the_plain_reference(chunk_tokens: int) -> None:
    model, adapter = trained_model()
    (batch,) = pack(EXAMPLES, 10_000)
    with packed_attention(model):
        loss = token_losses(model, batch, chunk_tokens).mean()
    loss.backward()

    reference = reference_model(adapter)
    wanted = reference_loss(reference, EXAMPLES)
    wanted.backward()

    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    for name in adapter.tensors:
        found, expected = model.get_submodule(name), reference.get_submodule(name)
        for part in ("lora_a", "lora_b"):
            gradient, standard = getattr(found, part).grad, getattr(expected, part).grad
            error = (gradient - standard).norm() / standard.norm()
            assert error < 2e-6, f"{name}.{part}"
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(parameter.grad is None for parameter in frozen)


def test_full_gradients_equal_the_plain_reference() -> None:
    model, reference = tiny_model(), tiny_model()
    (batch,) = pack(EXAMPLES, 10_000)
    with packed_attention(model):
        token_losses(model, batch).mean().backward()
    reference_loss(reference, EXAMPLES).backward()
    for (name, found), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert found.grad is not None
        assert expected.grad is not None
        error = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 2e-6, name


def gradients(trainable: Trainable) -> list[Tensor]:
    collected = []
    for master in trainable.masters:
        assert master.grad is not None
        collected.append(master.grad.clone())
    return collected


@pytest.mark.parametrize("method", ["adapter", "full"])
def test_accumulated_micro_batches_equal_one_big_batch(method: str) -> None:
    plan = dataclasses.replace(PLAN, method=method)
    results = []
    for micro_batch_tokens in (10_000, 30, 1):
        model = frozen_tiny_model()
        trainable = make_trainable(model, plan, seed=0)
        loss, num_tokens = gather_gradients(
            trainable, EXAMPLES, Portions(tokens=micro_batch_tokens)
        )
        assert num_tokens == sum(map(num_loss_tokens, EXAMPLES))
        results.append((loss, gradients(trainable)))
    (whole_loss, whole), *others = results
    for loss, parts in others:
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        for part, one in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, one, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["adapter", "full"])
def test_activations_computed_twice_give_the_same_gradients(method: str) -> None:
    plan = dataclasses.replace(PLAN, method=method)
    results = []
    for kept_tokens in (10_000, 0):
        trainable = make_trainable(frozen_tiny_model(), plan, seed=0)
        loss, _ = gather_gradients(trainable, EXAMPLES, Portions(kept_tokens=kept_tokens))
        results.append((loss, gradients(trainable)))
        assert not any(module.training for module in trainable.model.modules())
    (kept_loss, kept), (loss, again) = results
    assert loss == kept_loss
    for one, other in zip(kept, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-8)


def test_bfloat16_model_accumulates_in_float32_masters() -> None:
    model: Any = frozen_tiny_model()
    model.to(torch.bfloat16)
    trainable = make_trainable(model, dataclasses.replace(PLAN, method="full"), seed=0)
    gather_gradients(trainable, EXAMPLES, Portions(tokens=30))
    assert {tensor.dtype for tensor in gradients(trainable)} == {torch.float32}
    live = model.model.layers[0].mlp.down_proj.weight
    before, masters = live.detach().clone(), [master.clone() for master in trainable.masters]
    with torch.no_grad():
        for master in trainable.masters:
            master.mul_(1.0005)
    trainable.apply_masters()
    assert torch.equal(live, before)  # too small for bfloat16, kept in the master
    assert not torch.equal(trainable.masters[0], masters[0])
