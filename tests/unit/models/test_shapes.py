"""Weights are those of the model that config.json describes, number for number, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.assets.architectures import ARCHITECTURES
from tests.assets.tiny_model import write_tiny_model

from outcrop.errors import ModelError
from outcrop.models.safetensors_header import TensorEntry, read_header
from outcrop.models.shapes import check_finite, check_shapes, described_model

NAME = "model.safetensors"
WHERE = "s3://bucket/model/"


def headers(folder: Path) -> dict[str, dict[str, TensorEntry]]:
    path = folder / NAME
    with path.open("rb") as stream:
        return {NAME: read_header(stream, path.stat().st_size, WHERE + NAME)}


def check(folder: Path) -> int:
    return check_shapes(described_model(folder, WHERE), headers(folder), WHERE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "phi3", "gpt_neox"])
def test_a_saved_model_is_taken_with_its_number_of_parameters(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[name].model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert check(tmp_path) == sum(parameter.numel() for parameter in model.parameters())


def test_names_without_the_models_prefix_and_left_over_masks_are_taken(tmp_path: Path) -> None:
    ARCHITECTURES["gpt2"].model(dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / NAME)
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(short, tmp_path / NAME)
    assert check(tmp_path) > 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


def changed(folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(folder / NAME)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / NAME)
    return folder


LAYER = "model.layers.1.mlp.up_proj.weight"


def test_another_shape_is_refused_with_both(folder: Path) -> None:
    changed(folder, **{LAYER: torch.zeros(64, 96)})
    with pytest.raises(ModelError, match=rf"{NAME}: the tensor {LAYER} has the shape \[64, 96\], "):
        check(folder)


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    changed(folder, **{LAYER: None})
    with pytest.raises(ModelError, match=f"lacks 1 of the .* The first is {LAYER} of shape"):
        check(folder)


def test_a_tensor_of_another_model_is_refused_by_name(folder: Path) -> None:
    changed(folder, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(96, 64)})
    with pytest.raises(
        ModelError, match=r"layers\.9\.mlp.up_proj.weight of shape .* is no part of"
    ):
        check(folder)


def test_a_configuration_that_describes_nothing_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(
        path.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 0')
    )
    with pytest.raises(ModelError, match=r"config\.json describes no model: "):
        described_model(folder, WHERE)


def test_a_model_type_of_another_architecture_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "Qwen2ForCausalLM"))
    with pytest.raises(ModelError, match="Qwen2ForCausalLM, and its model_type llama is a Llama"):
        described_model(folder, WHERE)


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_that_is_not_finite_is_refused_with_its_place(
    folder: Path, number: float, dtype: torch.dtype
) -> None:
    tensor = torch.zeros(96, 64, dtype=dtype)
    tensor[1, 2] = number
    changed(folder, **{LAYER: tensor})
    with pytest.raises(ModelError, match=rf"the tensor {LAYER} holds {number} at place 66, and 1 "):
        check_finite(folder, [NAME], WHERE, lambda: None)


def test_finite_numbers_pass(folder: Path) -> None:
    check_finite(folder, [NAME], WHERE, lambda: None)
