"""A tiny random model of each architecture that transformers defines and Outcrop trains.

Two layers, 32 wide, 4 heads, made in a moment, in float64. Weights are large enough to have
opinions, and biases, norms and the like are not at their first values, so that leaving one out is
seen. Sliding windows are shorter than the records they are tried with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers import LlamaForCausalLM

VOCABULARY = 96
WINDOW = 6
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2_SHAPE = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 512,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model, and what its layers are called."""

    kind: str
    """Name of the configuration class in transformers, without "Config"."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    linears: tuple[str, ...] = LLAMA_LINEARS
    by_hand: bool = False
    """Whether Outcrop has passes of its own for it."""

    @property
    def config(self) -> Any:
        """A new configuration."""
        settings = {**COMMON, **self.changes}
        if self.kind == "GPT2":
            wanted = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
            settings = {name: COMMON[name] for name in wanted} | GPT2_SHAPE | dict(self.changes)
        return getattr(transformers, f"{self.kind}Config")(**settings)

    @property
    def name(self) -> str:
        """The class of the model, as config.json names it."""
        return str(type(self.model()).__name__)

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
        """A model with its own numbers, frozen and in evaluation mode."""
        torch.manual_seed(seed)
        assert not in_float64(), "the rotation's frequencies are float32, as they are in a run"
        model: Any = transformers.AutoModelForCausalLM.from_config(self.config)
        draw = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            noise = torch.empty_like(parameter).normal_(0, 0.15, generator=draw)
            with torch.no_grad():
                parameter += noise
        model.to(dtype).requires_grad_(False).eval()
        found: LlamaForCausalLM = model
        return found


def in_float64() -> bool:
    """Whether this is inside `InFloat64`."""
    return torch.ones(1).float().dtype == torch.float64


def _llama(**changes: Any) -> Architecture:
    return Architecture("Llama", changes, by_hand=True)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama(tie_word_embeddings=True),
    "llama untied": _llama(tie_word_embeddings=False),
    "llama with biases": _llama(attention_bias=True),
    "llama with wide heads": _llama(head_dim=12),
    "llama with one key head": _llama(num_key_value_heads=1),
    "llama with rope of Llama 3": _llama(rope_parameters=LLAMA3_ROPE),
    "llama with linear rope": _llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
    ),
    "llama with biases everywhere": Architecture(
        "Llama", {"attention_bias": True, "mlp_bias": True}
    ),
    "mistral": Architecture("Mistral", {"sliding_window": None}, by_hand=True),
    "mistral with a window": Architecture("Mistral", {"sliding_window": WINDOW}, by_hand=True),
    "qwen2": Architecture("Qwen2", {"tie_word_embeddings": True}, by_hand=True),
    "qwen2 with windows in some layers": Architecture(
        "Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Architecture("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}, by_hand=True),
    "qwen3 with windows": Architecture(
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
        by_hand=True,
    ),
    "gemma": Architecture("Gemma", {"head_dim": 12}),
    "gemma2": Architecture(
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Architecture(
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi": Architecture(
        "Phi",
        {"qk_layernorm": True},
        linears=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    ),
    "phi3": Architecture(
        "Phi3",
        {"sliding_window": WINDOW},
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "phi3 with long rope": Architecture(
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 3.0, 5.0, 9.0],
            },
            "original_max_position_embeddings": 24,
            "sliding_window": None,
        },
        linears=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
    "gpt2": Architecture("GPT2", linears=("c_attn", "c_proj", "c_fc")),
    "gpt2 untied": Architecture(
        "GPT2",
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
        linears=("c_attn", "c_proj", "c_fc"),
    ),
    "gpt_neox": Architecture(
        "GPTNeoX",
        {"num_key_value_heads": None},
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "gpt_neox tied, not parallel": Architecture(
        "GPTNeoX",
        {"num_key_value_heads": None, "tie_word_embeddings": True, "use_parallel_residual": False},
        linears=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "granite": Architecture(
        "Granite",
        {
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.7,
        },
    ),
    "cohere": Architecture("Cohere", {"logit_scale": 0.2, "use_qk_norm": True}),
    "olmo2": Architecture("Olmo2"),
    "smollm3": Architecture("SmolLM3", {"no_rope_layers": [1, 0]}),
    "starcoder2": Architecture(
        "Starcoder2",
        {"sliding_window": WINDOW},
        linears=("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
    ),
}
"""What is tried in every respect; the first of each family is its plain form."""


class InFloat64(TorchFunctionMode):
    """Lets transformers' definitions compute in float64 where they say float32.

    Norms, rotations and the softmax of attention are float32 in them whatever the model is in;
    compared with that, nothing could be said beyond seven digits.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function with float64 instead of float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        changed = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **changed)
