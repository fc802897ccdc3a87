"""A language model as the engine sees it: tokens in, scores for the next token out, with a cache.

Llama-shaped weights run through a forward pass of our own, which decodes one token about twice as
fast as the general one and needs no import of transformers (seconds of a cold start). Every other
architecture runs through transformers' own code. Modules are named as in transformers, so that an
adapter fits either. One sequence at a time; knows nothing of text.

Source: the arithmetic, rounding included, follows transformers' modeling_llama.

Axis suffixes: T tokens of this pass, S tokens so far, D model width, N heads (of logits: tokens
whose scores are wanted), G heads of keys and values, H width of a head, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from outcrop.errors import ModelError
from outcrop.models.load import compute_dtype
from outcrop.models.lora import LoraLinear

CACHE_STEP_TOKENS = 256
"""A cache grows by at least so many tokens, and by half of what it holds."""


class Network(Protocol):
    """What the engine needs of a model."""

    @property
    def module(self) -> nn.Module:
        """The weights, to which an adapter can be set."""

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together that the model can hold."""

    def new_cache(self) -> Any:
        """Return the memory of a new sequence."""

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""

    def forward(self, token_ids: Sequence[int], cache: Any, count: int = 1) -> Tensor:
        """Add tokens to the sequence; return the scores after its last `count`, logits_NV."""


def load_network(folder: Path, dtype: torch.dtype | None = None) -> Network:
    """Load the model of a folder in Hugging Face's layout.

    Args:
        dtype: the type to hold the weights in; None takes `compute_dtype()`.
    Raises:
        ModelError: the folder holds no model, an incomplete one, or one that cannot be run.
    """
    config = read_config(folder)
    dtype = dtype or compute_dtype()
    if is_plain_llama(config):
        weights = {name: tensor.to(dtype) for name, tensor in read_weights(folder).items()}
        return LlamaNetwork(config, weights)
    return GeneralNetwork(folder, dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no model: config.json cannot be read.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder} holds no model: config.json is not an object.")
    return config


def is_plain_llama(config: dict[str, Any]) -> bool:
    """Return whether our own forward pass covers everything a config.json asks for."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return (
        config.get("model_type") == "llama"
        and config.get("hidden_act", "silu") == "silu"
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
        and config.get("pretraining_tp", 1) == 1
        and "quantization_config" not in config
    )


def default_device() -> torch.device:
    """Return where models are held: the first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class KeyValueCache:
    """Keys and values of one sequence, one pair of tensors a layer, grown as needed."""

    def __init__(self, num_layers: int) -> None:
        self.length = 0
        self._capacity = 0
        self._keys_GSH: list[Tensor] = [torch.empty(0)] * num_layers
        self._values_GSH: list[Tensor] = [torch.empty(0)] * num_layers

    def add(self, layer: int, key_GTH: Tensor, value_GTH: Tensor) -> tuple[Tensor, Tensor]:
        """Add this pass's keys and values to a layer; returns all of them, past ones included."""
        end = self.length + key_GTH.shape[1]
        if layer == 0 and end > self._capacity:
            self._capacity = end + max(CACHE_STEP_TOKENS, end // 2)
        if self.length == 0 or self._keys_GSH[layer].shape[1] < self._capacity:
            self._keys_GSH[layer] = self._grown(self._keys_GSH[layer], key_GTH)
            self._values_GSH[layer] = self._grown(self._values_GSH[layer], value_GTH)
        self._keys_GSH[layer][:, self.length : end] = key_GTH
        self._values_GSH[layer][:, self.length : end] = value_GTH
        return self._keys_GSH[layer][:, :end], self._values_GSH[layer][:, :end]

    def advance(self, num_tokens: int) -> None:
        """Count the tokens that every layer has got."""
        self.length += num_tokens

    def _grown(self, old_GSH: Tensor, like_GTH: Tensor) -> Tensor:
        num_heads, _, width = like_GTH.shape
        new_GSH = like_GTH.new_empty(num_heads, self._capacity, width)
        if self.length:
            new_GSH[:, : self.length] = old_GSH[:, : self.length]
        return new_GSH


class _Embedding(nn.Module):
    """A table alone: nn.Embedding's start values would import torch's compiler, which takes 1 s."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, width))


class _Attention(nn.Module):
    def __init__(self, config: dict[str, Any], head_width: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        queries = config["num_attention_heads"] * head_width
        keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_width
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class _Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x_TD: Tensor) -> Tensor:
        x32_TD = x_TD.float()
        scale_T1 = torch.rsqrt(x32_TD.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * (x32_TD * scale_T1).to(x_TD.dtype)


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any], head_width: int) -> None:
        super().__init__()
        width, epsilon = config["hidden_size"], config.get("rms_norm_eps", 1e-6)
        self.self_attn = _Attention(config, head_width)
        self.mlp = _Mlp(config)
        self.input_layernorm = _Norm(width, epsilon)
        self.post_attention_layernorm = _Norm(width, epsilon)


class _Body(nn.Module):
    def __init__(self, config: dict[str, Any], head_width: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embed_tokens = _Embedding(config["vocab_size"], width)
        self.layers = nn.ModuleList(
            _Layer(config, head_width) for _ in range(config["num_hidden_layers"])
        )
        self.norm = _Norm(width, config.get("rms_norm_eps", 1e-6))


class _Llama(nn.Module):
    def __init__(self, config: dict[str, Any], head_width: int) -> None:
        super().__init__()
        self.model = _Body(config, head_width)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)


class LlamaNetwork:
    """Weights of a Llama and the forward pass over them."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        heads = config["num_attention_heads"]
        self.head_width = config.get("head_dim") or config["hidden_size"] // heads
        self.max_context = config["max_position_embeddings"]
        self.vocabulary = config["vocab_size"]
        with torch.device("meta"):
            self.module = _Llama(config, self.head_width)
        if config.get("tie_word_embeddings") and "model.embed_tokens.weight" in weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights = {
            name: tensor for name, tensor in weights.items() if not name.endswith("inv_freq")
        }
        try:
            self.module.load_state_dict(weights, assign=True)
        except (RuntimeError, AttributeError) as error:
            raise ModelError(f"The weights do not fit config.json: {error}") from error
        self.module.requires_grad_(False).eval().to(default_device())
        self._layers = cast(list[_Layer], list(self.module.model.layers))
        self._cos_SH, self._sin_SH = self._rotations(config)

    def new_cache(self) -> KeyValueCache:
        """Return the memory of a new sequence."""
        return KeyValueCache(len(self._layers))

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], cache: KeyValueCache, count: int = 1) -> Tensor:
        """Add tokens to the sequence; return the scores after its last `count`, logits_NV."""
        body = self.module.model
        start, end = cache.length, cache.length + len(token_ids)
        cos_TH, sin_TH = self._cos_SH[start:end], self._sin_SH[start:end]
        mask_TS = self._mask(start, end)
        ids_T = torch.tensor(token_ids, device=cos_TH.device)
        x_TD = nn.functional.embedding(ids_T, body.embed_tokens.weight)
        for number, layer in enumerate(self._layers):
            attention, mlp = layer.self_attn, layer.mlp
            h_TD = layer.input_layernorm(x_TD)
            query_NTH = self._heads(linear(attention.q_proj, h_TD))
            key_GTH = self._heads(linear(attention.k_proj, h_TD))
            value_GTH = self._heads(linear(attention.v_proj, h_TD))
            query_NTH = _rotate(query_NTH, cos_TH, sin_TH)
            key_GTH = _rotate(key_GTH, cos_TH, sin_TH)
            keys_GSH, values_GSH = cache.add(number, key_GTH, value_GTH)
            y_TD = _attend(query_NTH, keys_GSH, values_GSH, mask_TS)
            x_TD = x_TD + linear(attention.o_proj, y_TD)
            h_TD = layer.post_attention_layernorm(x_TD)
            gate_TI = nn.functional.silu(linear(mlp.gate_proj, h_TD))
            x_TD = x_TD + linear(mlp.down_proj, gate_TI * linear(mlp.up_proj, h_TD))
        cache.advance(len(token_ids))
        return linear(self.module.lm_head, body.norm(x_TD[-count:]))

    def _heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.view(x_TD.shape[0], -1, self.head_width).transpose(0, 1)

    def _mask(self, start: int, end: int) -> Tensor | None:
        if end - start == 1:
            return None  # the newest token sees everything
        ones_TS = torch.ones(end - start, end, dtype=torch.bool, device=self._cos_SH.device)
        return ones_TS.tril(diagonal=start)

    def _rotations(self, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rope = config.get("rope_parameters") or {}
        theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.int64).float()
        frequencies = 1.0 / (theta ** (exponents / self.head_width))
        angles_SF = torch.outer(torch.arange(self.max_context).float(), frequencies)
        angles_SH = torch.cat((angles_SF, angles_SF), dim=-1)
        weight = self.module.lm_head.weight
        return angles_SH.cos().to(weight), angles_SH.sin().to(weight)


class GeneralNetwork:
    """Any causal language model that transformers knows."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from outcrop.models.load import load_base

        module: Any = load_base(folder, dtype)
        self.module: Any = module.to(default_device())
        config = self.module.config
        self.max_context = int(getattr(config, "max_position_embeddings", None) or 2048)
        self.vocabulary = int(self.module.get_input_embeddings().weight.shape[0])

    def new_cache(self) -> Any:
        """Return the memory of a new sequence."""
        from transformers import DynamicCache

        return DynamicCache(config=self.module.config)

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], cache: Any, count: int = 1) -> Tensor:
        """Add tokens to the sequence; return the scores after its last `count`, logits_NV."""
        device = self.module.get_input_embeddings().weight.device
        logits: Tensor = self.module(
            input_ids=torch.tensor([list(token_ids)], device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=count,
        ).logits
        return logits[0, -count:]


def linear(layer: nn.Module, x_TI: Tensor) -> Tensor:
    """Return a linear layer's output, its adapter included where it has one.

    With an adapter the frozen product goes onto the change and is rounded once, as in training.
    One token takes products with a vector: in bfloat16 on a CPU they take half the time.
    """
    single = x_TI.shape[0] == 1
    if isinstance(layer, LoraLinear):
        if layer.lora_a is not None and layer.lora_b is not None:
            weight_OI, a_RI, b_OR = layer.linear.weight, layer.lora_a, layer.lora_b
            if single:
                x_I = x_TI[0]
                return torch.mv(b_OR, torch.mv(a_RI, x_I)).addmv_(weight_OI, x_I).unsqueeze(0)
            return ((x_TI @ a_RI.t()) @ b_OR.t()).addmm_(x_TI, weight_OI.t())
        layer = layer.linear
    weight: Any = layer.weight
    return torch.mv(weight, x_TI[0]).unsqueeze(0) if single else nn.functional.linear(x_TI, weight)


def _rotate(x_NTH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    half = x_NTH.shape[-1] // 2
    turned_NTH = torch.cat((-x_NTH[..., half:], x_NTH[..., :half]), dim=-1)
    return x_NTH * cos_TH + turned_NTH * sin_TH


def _attend(
    query_NTH: Tensor, keys_GSH: Tensor, values_GSH: Tensor, mask_TS: Tensor | None
) -> Tensor:
    num_heads, num_tokens, width = query_NTH.shape
    if num_tokens == 1:
        # Queries that share keys become the rows of one small matrix: no key is read twice.
        query_GRH = query_NTH.reshape(keys_GSH.shape[0], -1, width)
        y_GRH = nn.functional.scaled_dot_product_attention(
            query_GRH[None], keys_GSH[None], values_GSH[None]
        )
        return y_GRH.reshape(1, num_heads * width)
    y_NTH = nn.functional.scaled_dot_product_attention(
        query_NTH[None], keys_GSH[None], values_GSH[None], attn_mask=mask_TS, enable_gqa=True
    )[0]
    return y_NTH.transpose(0, 1).reshape(num_tokens, num_heads * width)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model's folder, named as they are there.

    Raises:
        ModelError: a file is missing or damaged.
    """
    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            weights.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
    return weights


def weight_bytes(folder: Path) -> int:
    """Return the size of the files that `read_weights` reads; of those that are there."""
    return sum(file.stat().st_size for file in _weight_files(folder) if file.is_file())


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(table["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}") from error
