"""A random Llama of two layers, made in a moment, with weights large enough to have opinions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a model of 2 layers, 64 wide, 4 heads on 2 key heads, float32, tied embeddings."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def frozen_tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return the model as `load_base` would: frozen and in evaluation mode."""
    model = tiny_model(seed, **changes)
    model.requires_grad_(False)
    model.eval()
    return model


def write_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write that model as a folder that `load_base` reads, and return the folder."""
    tiny_model(seed, **changes).save_pretrained(folder)
    return folder
