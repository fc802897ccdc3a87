"""Adapters to measure with: they change the shipped model a little, and mean nothing.

In peft's layout, as custom models have it, and in GGUF for llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from benchmarks.serving_work import RANK
from safetensors.numpy import load_file

from outcrop.models.load import load_base
from outcrop.models.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ALL_LINEARS,
    TENSOR_PREFIX,
    LoraConfig,
    adapter_of,
    attach,
    save_adapter,
)

CHANGE = 1e-3
"""Standard deviation of the values of B, which a real adapter begins with as noughts."""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Source: llama.cpp, llama-arch.cpp."""


def write_adapters(
    weights: Path,
    folder: Path,
    count: int,
    *,
    rank: int = RANK,
    targets: Sequence[str] = ALL_LINEARS,
) -> list[Path]:
    """Write adapters that differ, unless they are there, and return their folders."""
    folders = [folder / str(number) for number in range(count)]
    missing = [place for place in folders if not (place / ADAPTER_CONFIG).exists()]
    if not missing:
        return folders
    model = load_base(weights)
    config = LoraConfig(rank=rank, alpha=2.0 * rank, targets=tuple(targets))
    for number, place in enumerate(folders):
        if place not in missing:
            continue
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in attach(model, config, number):
                if parameter.shape[1] == rank:
                    parameter.normal_(0, CHANGE, generator=generator)
        save_adapter(adapter_of(model, config), place, "benchmark")
    return folders


def write_gguf_adapter(weights: Path, adapter: Path, file: Path) -> None:
    """Write an adapter of a Llama in GGUF.

    The rows of B of queries and keys are put in the order that llama.cpp has them in: pairs that
    are turned together lie side by side. Source: llama.cpp, convert_hf_to_gguf.py, `permute`.
    """
    config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    heads = {
        "self_attn.q_proj": int(config["num_attention_heads"]),
        "self_attn.k_proj": int(config["num_key_value_heads"]),
    }
    settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(settings["lora_alpha"]))
    for name, values in sorted(load_file(adapter / ADAPTER_WEIGHTS).items()):
        layer, _, rest = name.removeprefix(f"{TENSOR_PREFIX}model.layers.").partition(".")
        module, _, side = rest.partition(".lora_")
        letter = side[0].lower()
        if letter == "b" and module in heads:
            values = _side_by_side(values, heads[module])
        tensor = np.ascontiguousarray(values, dtype=np.float32)
        writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[module]}.weight.lora_{letter}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
