"""Adapters on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.assets.architectures import ARCHITECTURES
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
    weight_changes,
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


def doubled(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model in float64, its adapter's parameters included."""
    model.double()
    return model


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(CONFIG, id="same shape"),
        pytest.param(LoraConfig(9, 8.0), id="larger rank, smaller scaling"),
        pytest.param(LoraConfig(16, 32.0), id="larger rank, same scaling"),
        pytest.param(LoraConfig(4, 3.0), id="other alpha"),
    ],
)
@pytest.mark.parametrize("targets", [ALL_LINEARS, ("q_proj", "down_proj")])
def test_adapter_that_goes_on_from_another_is_at_first_the_same_function(
    config: LoraConfig, targets: tuple[str, ...]
) -> None:
    before, after = tiny_model(), tiny_model()
    start = trained(before, dataclasses.replace(CONFIG, targets=targets))
    attach(after, config, seed=5, start=start)
    wanted = logits(doubled(before))
    assert not torch.allclose(wanted, logits(doubled(tiny_model())))
    # B is kept in float32; a factor that is no power of two is rounded there, once.
    exact = math.log2(start.config.scaling / config.scaling).is_integer()
    tolerance = 1e-12 if exact else 1e-6
    torch.testing.assert_close(logits(doubled(after)), wanted, rtol=tolerance, atol=tolerance)


def test_what_a_larger_adapter_has_more_begins_as_a_new_one() -> None:
    start = trained(tiny_model(), LoraConfig(4, 8.0, ("q_proj",)))
    model, fresh = tiny_model(), tiny_model()
    config = LoraConfig(6, 12.0, ("q_proj", "up_proj"))
    attach(model, config, seed=5, start=start)
    attach(fresh, config, seed=5)
    grown, new = adapter_of(model, config), adapter_of(fresh, config)
    assert grown.tensors.keys() == new.tensors.keys()
    for name, (a_RI, b_OR) in grown.tensors.items():
        if name in start.tensors:
            assert torch.equal(a_RI[:4], start.tensors[name][0])
            assert torch.equal(b_OR[:, :4], start.tensors[name][1])
            assert torch.equal(a_RI[4:], new.tensors[name][0][4:])
            assert not b_OR[:, 4:].any()
        else:
            assert torch.equal(a_RI, new.tensors[name][0])
            assert not b_OR.any()


@pytest.mark.parametrize(
    "config", [LoraConfig(3, 8.0), LoraConfig(8, 8.0, ("q_proj", "k_proj"))], ids=str
)
def test_a_smaller_adapter_cannot_go_on_from_a_larger_one(config: LoraConfig) -> None:
    start = trained(tiny_model())
    with pytest.raises(ModelError, match=r"rank 4 on q_proj, .* it is smaller"):
        attach(tiny_model(), config, seed=0, start=start)


def test_an_adapter_of_another_model_cannot_be_gone_on_from() -> None:
    start = trained(tiny_model(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"does not fit the model: model\.layers\.1"):
        attach(tiny_model(), CONFIG, seed=0, start=start)


@pytest.mark.parametrize("alpha", [8.0, 7.0])
def test_merged_adapter_equals_unmerged(alpha: float) -> None:
    config = dataclasses.replace(CONFIG, alpha=alpha)
    model, merged = tiny_model(), tiny_model()
    adapter = trained(model, config)
    changes = weight_changes(merged, adapter)
    assert {change.dtype for change in changes.values()} == {torch.float32}
    doubled(merged)
    weights = dict(merged.named_parameters())
    with torch.no_grad():
        for name, (a_RI, b_OR) in adapter.tensors.items():
            exact = b_OR.double() @ a_RI.double() * config.scaling
            torch.testing.assert_close(changes[f"{name}.weight"].double(), exact)
            weights[f"{name}.weight"].add_(exact)
    tolerance = 1e-9 if alpha == 8.0 else 1e-6
    wanted = logits(doubled(model))
    torch.testing.assert_close(logits(merged), wanted, rtol=tolerance, atol=tolerance)


def test_an_adapter_that_does_not_fit_is_not_merged() -> None:
    adapter = trained(tiny_model(hidden_size=32))
    with pytest.raises(ModelError, match="does not fit the model"):
        weight_changes(tiny_model(), adapter)


TURNED = ARCHITECTURES["gpt2"]
"""Its linear layers are transformers' Conv1D, whose weights lie as (inputs, outputs)."""


def test_layers_with_turned_weights_have_adapters_as_others_do(tmp_path: Path) -> None:
    config = LoraConfig(4, 8.0, TURNED.linears)
    model, fresh, merged = (TURNED.model(dtype=torch.float32) for _ in range(3))
    base = logits(model)
    attach(model, config, seed=0)
    torch.testing.assert_close(logits(model), base)
    adapter = trained(model, config)
    assert adapter.fan_in_fan_out
    a_RI, b_OR = adapter.tensors["transformer.h.0.attn.c_attn"]
    assert (a_RI.shape, b_OR.shape) == ((4, 32), (96, 4))

    save_adapter(adapter, tmp_path, "Tiny")
    set_adapter(fresh, load_adapter(tmp_path))
    assert torch.equal(logits(fresh), logits(model))

    weights = dict(merged.named_parameters())
    for name, change in weight_changes(merged, adapter).items():
        assert change.shape == weights[name].shape
        with torch.no_grad():
            weights[name].add_(change)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), base, rtol=1e-2, atol=1e-2)


def test_peft_is_told_that_weights_are_turned_where_they_are(
    model: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As peft's own: its tensors lie the same way for both, and the base's weight is turned."""
    turned = TURNED.model(dtype=torch.float32)
    save_adapter(trained(turned, LoraConfig(4, 8.0, TURNED.linears)), tmp_path / "turned", "T")
    save_adapter(trained(model), tmp_path / "plain", "T")
    told = {
        name: json.loads((tmp_path / name / "adapter_config.json").read_text())["fan_in_fan_out"]
        for name in ("turned", "plain")
    }
    assert told == {"turned": True, "plain": False}
    assert load_adapter(tmp_path / "turned").fan_in_fan_out
    tensors = load_file(tmp_path / "turned" / "adapter_model.safetensors")
    key = "base_model.model.transformer.h.0.mlp.c_fc"
    assert tensors[f"{key}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{key}.lora_B.weight"].shape == (48, 4)


def test_an_adapter_of_a_float64_model_has_float64_masters() -> None:
    parameters = attach(TURNED.model(), LoraConfig(4, 8.0, TURNED.linears), seed=0)
    assert {parameter.dtype for parameter in parameters} == {torch.float64}
