"""Adapters on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.assets.tiny_model import frozen_tiny_model, tiny_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from outcrop.errors import ModelError
from outcrop.models.load import has_fast_bfloat16
from outcrop.models.lora import (
    ALL_LINEARS,
    Adapter,
    LoraConfig,
    LoraLinear,
    adapter_of,
    attach,
    load_adapter,
    save_adapter,
    set_adapter,
)

CONFIG = LoraConfig(rank=4, alpha=8.0)
IDS = torch.tensor([[5, 17, 3, 44, 9]])


@pytest.fixture
def model() -> LlamaForCausalLM:
    return frozen_tiny_model()


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def trained(model: LlamaForCausalLM, config: LoraConfig = CONFIG, seed: int = 3) -> Adapter:
    """An adapter as after some training: B is not zero any more."""
    attach(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoraLinear) and module.lora_b is not None:
            with torch.no_grad():
                module.lora_b.normal_(0, 0.05, generator=generator)
    return adapter_of(model, config)


def test_new_adapter_changes_nothing_yet(model: LlamaForCausalLM) -> None:
    before = logits(model)
    attach(model, CONFIG, seed=0)
    torch.testing.assert_close(logits(model), before)


def test_only_the_adapter_can_be_trained(model: LlamaForCausalLM) -> None:
    parameters = attach(model, CONFIG, seed=0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in learning} == {id(parameter) for parameter in parameters}
    assert len(parameters) == 2 * 2 * len(ALL_LINEARS)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_first_values_depend_on_seed_and_name_only(model: LlamaForCausalLM) -> None:
    attach(model, CONFIG, seed=1)
    first = adapter_of(model, CONFIG)
    torch.rand(100)
    other = tiny_model(seed=9)
    attach(other, dataclasses.replace(CONFIG, targets=("q_proj",)), seed=1)
    second = adapter_of(other, CONFIG)
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(first.tensors[name][0], second.tensors[name][0])
    attach(other, CONFIG, seed=2)
    assert not torch.equal(adapter_of(other, CONFIG).tensors[name][0], first.tensors[name][0])


@pytest.mark.parametrize("bias", [False, True])
def test_layer_agrees_with_the_formula_and_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    holder: Any = nn.Module()
    holder.q_proj = nn.Linear(24, 40, bias=bias).double().requires_grad_(False)
    weight, offset = holder.q_proj.weight, holder.q_proj.bias
    config = LoraConfig(rank=3, alpha=7.0, targets=("q_proj",))
    lora_a, lora_b = attach(holder, config, seed=0)
    lora_a.data, lora_b.data = lora_a.data.double(), torch.randn(40, 3, dtype=torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)

    y = holder.q_proj(x)
    y.square().sum().backward()
    found = [x.grad, lora_a.grad, lora_b.grad]
    x.grad = lora_a.grad = lora_b.grad = None

    wanted = nn.functional.linear(x, weight, offset) + 7 / 3 * (x @ lora_a.T @ lora_b.T)
    wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted)
    for gradient, expected in zip(found, [x.grad, lora_a.grad, lora_b.grad], strict=True):
        # The adapter's gradients are float32 whatever the layer computes in.
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert weight.grad is None


def test_small_change_survives_bfloat16() -> None:
    if not has_fast_bfloat16():
        pytest.skip("this machine computes in float32")
    torch.manual_seed(0)
    holder: Any = nn.Module()
    holder.q_proj = nn.Linear(256, 512, bias=False).to(torch.bfloat16).requires_grad_(False)
    weight = holder.q_proj.weight.double()
    lora_a, lora_b = attach(holder, LoraConfig(4, 4.0, ("q_proj",)), seed=0)
    lora_b.data = torch.randn(512, 4) * 2e-4
    x = torch.randn(300, 256).to(torch.bfloat16)
    with torch.no_grad():
        y = holder.q_proj(x).double()
        rounded = x @ holder.q_proj.linear.weight.T
        separate = rounded + (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T
        base = x.double() @ weight.T
        change = x.double() @ lora_a.double().T @ lora_b.double().T

    def kept(output: Tensor) -> float:
        return float(((output - base) * change).sum() / change.square().sum())

    assert change.norm() / base.norm() < 1e-3
    assert kept(y) == pytest.approx(1.0, abs=0.1)
    assert kept(separate.double()) < 0.6  # what adding to the rounded output would lose


def test_set_adapter_answers_as_training_left_it(model: LlamaForCausalLM) -> None:
    base = logits(model)
    adapter = trained(model)
    after_training = logits(model)
    assert not torch.allclose(after_training, base)
    fresh = frozen_tiny_model()
    set_adapter(fresh, adapter)
    assert torch.equal(logits(fresh), after_training)


def test_base_answers_bit_by_bit_as_before_without_its_adapter(model: LlamaForCausalLM) -> None:
    base = logits(model)
    adapter = trained(tiny_model())
    set_adapter(model, adapter)
    assert not torch.equal(logits(model), base)
    set_adapter(model, None)
    assert torch.equal(logits(model), base)


def test_adapters_of_different_reach_replace_each_other(model: LlamaForCausalLM) -> None:
    wide = trained(tiny_model())
    narrow = trained(tiny_model(), LoraConfig(2, 2.0, ("q_proj", "v_proj")), seed=5)
    expected = frozen_tiny_model()
    set_adapter(expected, narrow)
    set_adapter(model, wide)
    set_adapter(model, narrow)
    assert torch.equal(logits(model), logits(expected))


def test_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    model: LlamaForCausalLM,
) -> None:
    base = logits(model)
    narrower = trained(tiny_model(hidden_size=32))
    with pytest.raises(ModelError, match=r"does not fit the model: model\.layers\.0\.self_attn"):
        set_adapter(model, narrower)
    shallow = trained(tiny_model(num_hidden_layers=1))
    with pytest.raises(ModelError, match="only in one of them"):
        set_adapter(model, shallow)
    assert torch.equal(logits(model), base)


def test_model_without_the_named_layers_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ModelError, match="no linear layer named c_attn"):
        attach(model, LoraConfig(targets=("c_attn",)), seed=0)


def test_saved_adapter_comes_back_and_gives_the_same_bytes(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    adapter = trained(model)
    save_adapter(adapter, tmp_path / "one", "Tiny")
    save_adapter(adapter, tmp_path / "two", "Tiny")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    back = load_adapter(tmp_path / "one")
    assert back.config == adapter.config
    assert back.tensors.keys() == adapter.tensors.keys()
    for name, pair in adapter.tensors.items():
        assert torch.equal(back.tensors[name][0], pair[0])
        assert torch.equal(back.tensors[name][1], pair[1])


def test_files_have_the_names_peft_reads(model: LlamaForCausalLM, tmp_path: Path) -> None:
    save_adapter(trained(model), tmp_path, "Tiny")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{key}.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 2 * len(ALL_LINEARS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert sorted(config["target_modules"]) == sorted(ALL_LINEARS)


def test_adapter_of_another_kind_is_refused_by_name(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    save_adapter(trained(model), tmp_path, "Tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    with pytest.raises(ModelError, match="use_dora"):
        load_adapter(tmp_path)


def test_unfinished_or_damaged_adapter_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(tmp_path / "nowhere")
    save_adapter(trained(model), tmp_path, "Tiny")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    tensors["something.else"] = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(ModelError, match="no lora_B for"):
        load_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapter(tmp_path)
