"""Loading a folder of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.assets.tiny_model import write_tiny_model

from outcrop.errors import ModelError
from outcrop.models.load import compute_dtype, has_fast_bfloat16, load_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


def test_model_comes_frozen_and_in_evaluation_mode(folder: Path) -> None:
    model = load_base(folder, torch.float32)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_default_type_is_bfloat16_only_where_it_is_fast(folder: Path) -> None:
    expected = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    assert compute_dtype() == expected
    assert load_base(folder).dtype == expected


def test_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere holds no model: config\.json is missing"):
        load_base(tmp_path / "nowhere")


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(folder)


def test_missing_tensor_is_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(folder)


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "surprise"
    config["auto_map"] = {
        "AutoConfig": "surprise.Config",
        "AutoModelForCausalLM": "surprise.Model",
    }
    (folder / "config.json").write_text(json.dumps(config))
    witness = tmp_path / "it_ran"
    (folder / "surprise.py").write_text(f"open({str(witness)!r}, 'w')\n")
    with pytest.raises(ModelError):
        load_base(folder)
    assert not witness.exists()
