"""Write a custom model so that others can use it: as an adapter, as a whole model, or as GGUF.

    adapter   adapter_config.json, adapter_model.safetensors: peft's layout
    merged    config.json, model.safetensors, tokenizer: Hugging Face's layout
    gguf      model.gguf, for llama.cpp and what is built on it

An adapter is added to the weights in float32, where a change that is small against a weight is not
lost; only then are they rounded to the type that was asked for. Loads torch.
LIMIT: merged and gguf hold the model once in float32, 4 bytes a parameter, and one tensor more.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from outcrop.errors import ModelError
from outcrop.models.artifact import ADAPTER_CONFIG, copy_weights, read_artifact
from outcrop.models.exported import BASE_FOLDER, GGUF_FILE, TOKENIZER_FILES
from outcrop.models.files import read_json
from outcrop.models.gguf_file import Described, check_gguf, rope_type, write_gguf
from outcrop.models.load import load_base
from outcrop.models.lora import ADAPTER_WEIGHTS, load_adapter, weight_changes
from outcrop.models.templates import CONFIG_FILE, TEMPLATE_FILE, chat_template

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def export_adapter(artifact: Path, folder: Path, base_model: str) -> None:
    """Write the adapter, and the weights that it belongs to where those are the model's own.

    Args:
        folder: is made where it does not exist.
        base_model: what `base_model_name_or_path` says where the weights are a base model's.
    Raises:
        ModelError: the model was trained as a whole and has no adapter.
    """
    found = read_artifact(artifact)
    if found.adapter is None:
        raise ModelError(
            "This model has no adapter: all its weights are its own. Export it as merged or gguf."
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found.adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    config = read_json(found.adapter / ADAPTER_CONFIG)
    config["base_model_name_or_path"] = base_model
    if found.weights is not None:
        config["base_model_name_or_path"] = BASE_FOLDER
        copy_weights(found.weights, folder / BASE_FOLDER)
    text = json.dumps(config, indent=2) + "\n"
    (folder / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def export_merged(
    base_folder: Path, artifact: Path, folder: Path, data_type: str, *, template: str
) -> None:
    """Write the whole model in Hugging Face's layout, its adapter merged into the weights.

    Args:
        data_type: f32, f16 or bf16.
        template: chat template, for a tokenizer that has none.
    Raises:
        ModelError: the model cannot be read, or float16 cannot hold it.
    """
    model = merged_model(base_folder, artifact)
    module: nn.Module = model
    module.to(DTYPES[data_type])
    if data_type == "f16":
        for name, parameter in model.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ModelError(
                    f"{name} has numbers that float16 cannot hold. Export it as f32 or bf16."
                )
    tensors = model.state_dict()
    for name in model.all_tied_weights_keys:
        tensors.pop(name, None)
    model.save_pretrained(folder, state_dict=tensors, safe_serialization=True)
    # Its base's: that is what a custom model is trained and served with.
    for name in TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)
    if _template_of(base_folder) is None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")


def export_gguf(
    base_folder: Path,
    artifact: Path,
    folder: Path,
    data_type: str,
    described: Described,
    *,
    template: str,
) -> None:
    """Write the whole model as one GGUF file, its adapter merged into the weights.

    Args:
        data_type: f32, f16, bf16 or q8_0.
        template: chat template, for a tokenizer that has none.
    Raises:
        ModelError: the model cannot be read, or llama.cpp would not answer as it does.
    """
    check_exportable_as_gguf(base_folder, artifact)
    model = merged_model(base_folder, artifact)
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name, None)

    def reader(tensor: torch.Tensor) -> Callable[[], npt.NDArray[np.float32]]:
        return lambda: tensor.float().numpy()

    config = model.config.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(
        folder / GGUF_FILE,
        config,
        base_folder,
        [(name, tuple(tensor.shape), reader(tensor)) for name, tensor in state.items()],
        data_type,
        described,
        template=template,
        rope_factors=_rope_factors(model) if rope_type(config) == "llama3" else None,
    )


def check_exportable_as_gguf(base_folder: Path, artifact: Path) -> None:
    """Refuse, before anything is computed, what `export_gguf` refuses."""
    weights = read_artifact(artifact).weights or base_folder
    check_gguf(read_json(weights / "config.json"), base_folder)


def merged_model(base_folder: Path, artifact: Path) -> LlamaForCausalLM:
    """Return a custom model as one network in float32, its adapter added to the weights.

    Raises:
        ModelError: it cannot be read, or its parts do not fit each other.
    """
    found = read_artifact(artifact)
    model = load_base(found.weights or base_folder, torch.float32)
    if found.adapter is None:
        return model
    changes = weight_changes(model, load_adapter(found.adapter))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in changes:
            parameters[name].add_(changes[name])
    return model


def _template_of(folder: Path) -> str | None:
    config = folder / CONFIG_FILE
    return chat_template(folder, read_json(config) if config.is_file() else {})


def _rope_factors(model: LlamaForCausalLM) -> npt.NDArray[np.float32]:
    """Return by how much each wave of the rotation is stretched, as the model itself computes it.

    Source: llama.cpp divides the frequencies by the tensor rope_freqs.
    """
    rotary = model.model.rotary_emb
    stretched = rotary.inv_freq.double()
    base = float(model.config.to_dict()["rope_parameters"]["rope_theta"])
    width = 2 * len(stretched)
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors: npt.NDArray[np.float32] = (plain / stretched).float().numpy()
    return factors
