"""A Llama-shaped decoder as our own passes see it: its matrices, its shape, and what is trained.

For Llama, Mistral, Qwen2 and Qwen3: root-mean-square norms, rotated queries and keys, a gated
feed-forward part. The weights stay where transformers' module has them; only layers that read the
same input are laid together, and the module then looks into that. The passes are in passes.py.

Axis suffixes: I inputs, O outputs, R rank, D model width, V vocabulary, F half the width of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outcrop.models import kernels
from outcrop.models.lora import LoraLinear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Joined:
    """Linear layers that read the same input, as one."""

    names: tuple[str, ...]
    """Where transformers' module has them."""
    layers: tuple[nn.Linear | LoraLinear, ...]
    weight_OI: Tensor
    bias_O: Tensor | None
    widths: tuple[int, ...]
    """Outputs of each."""


@dataclass(frozen=True)
class JoinedTensors:
    """What is trained of a `Joined`, or its gradient; None for what is not."""

    weight_OI: Tensor | None = None
    bias_O: Tensor | None = None
    a_RI: Tensor | None = None
    """The A of all adapted parts, below each other."""
    bs_OR: tuple[Tensor | None, ...] = ()
    """The B of each part, times the adapter's scaling where it is computed with."""


@dataclass(frozen=True)
class Layer:
    """One layer of a decoder."""

    qkv: Joined
    out: Joined
    gate_up: Joined
    down: Joined
    norms: tuple[Tensor, ...]
    """Weights of the norms before attention and feed-forward part, then, where the model has them,
    of those of queries and keys; wide numbers."""
    norm_parameters: tuple[nn.Parameter, ...]
    """The same as transformers' module has them."""


@dataclass(frozen=True)
class LayerTensors:
    """What is trained of a layer, or its gradient."""

    qkv: JoinedTensors
    out: JoinedTensors
    gate_up: JoinedTensors
    down: JoinedTensors
    norms: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class ModelTensors:
    """What is trained of a model, or its gradient."""

    layers: tuple[LayerTensors, ...]
    table_VD: Tensor | None = None
    head_VD: Tensor | None = None
    norm_D: Tensor | None = None


@dataclass(frozen=True)
class Decoder:
    """Weights as the passes below use them, and the shape of the model."""

    layers: tuple[Layer, ...]
    table_VD: Tensor
    head_VD: Tensor
    """The same tensor as the table where the model ties them."""
    norm_D: Tensor
    parameters: tuple[nn.Parameter, ...]
    """Table, head where it is not the same, and last norm, as transformers' module has them."""
    frequencies_F: Tensor
    """Of the rotation, in radians a place; float64."""
    rotation_scale: float
    """What cosines and sines are multiplied by; 1 but for some ways of long contexts."""
    epsilon: float
    groups: int
    heads_a_group: int
    head_width: int
    window: int
    """Keys that a query sees, itself included; 0 for all before it."""
    work: ModelTensors
    """What is trained, or added by an adapter, as it is computed with: in the matrices' type, but
    norms and biases in wide numbers."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the matrices."""
        return self.head_VD.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_VD.device


def make_decoder(model: nn.Module) -> Decoder | None:
    """Return the passes for a model of transformers, or None where its kind is not covered.

    The module's linear layers are laid together in memory, so it must not be moved after. Adapters
    are taken over as they are now.
    """
    config: Any = model.config
    if config.model_type not in MODEL_TYPES or not _is_covered(config):
        return None
    body: Any = model.get_submodule("model")
    dtype = body.embed_tokens.weight.dtype
    names = {id(module): name for name, module in model.named_modules()}
    layers = []
    for module in body.layers:
        attention, mlp = module.self_attn, module.mlp
        norms = [module.input_layernorm, module.post_attention_layernorm]
        if config.model_type == "qwen3":
            norms += [attention.q_norm, attention.k_norm]
        layers.append(
            Layer(
                qkv=_join(names, attention.q_proj, attention.k_proj, attention.v_proj),
                out=_join(names, attention.o_proj),
                gate_up=_join(names, mlp.gate_proj, mlp.up_proj),
                down=_join(names, mlp.down_proj),
                norms=tuple(norm.weight.detach().to(kernels.wide(dtype)) for norm in norms),
                norm_parameters=tuple(norm.weight for norm in norms),
            )
        )
    lm_head: Any = model.get_submodule("lm_head")
    table, head = body.embed_tokens.weight, lm_head.weight
    groups = config.num_key_value_heads or config.num_attention_heads
    attention = body.layers[0].self_attn
    return Decoder(
        layers=tuple(layers),
        table_VD=table.detach(),
        head_VD=head.detach(),
        norm_D=body.norm.weight.detach().to(kernels.wide(dtype)),
        parameters=(table, *(() if head is table else (head,)), body.norm.weight),
        frequencies_F=body.rotary_emb.inv_freq.detach().double(),
        rotation_scale=float(body.rotary_emb.attention_scaling),
        epsilon=config.rms_norm_eps,
        groups=groups,
        heads_a_group=config.num_attention_heads // groups,
        head_width=attention.head_dim,
        window=_window(config),
        work=ModelTensors(
            tuple(
                LayerTensors(
                    qkv=_adapted(layer.qkv),
                    out=_adapted(layer.out),
                    gate_up=_adapted(layer.gate_up),
                    down=_adapted(layer.down),
                )
                for layer in layers
            )
        ),
    )


def _is_covered(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    head_width = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return (
        getattr(config, "hidden_act", "silu") == "silu"
        and rope.get("rope_type", "default") in ("default", "llama3", "linear")
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not getattr(config, "mlp_bias", False)
        # Some layers with a window and some without, or other kinds: left to transformers.
        and kinds in ({"full_attention"}, {"sliding_attention"})
        and getattr(config, "is_causal", True)
        and head_width <= kernels.WIDEST_HEAD
    )


def _window(config: Any) -> int:
    types = getattr(config, "layer_types", None)
    if types:
        return config.sliding_window if types[0] == "sliding_attention" else 0
    return (getattr(config, "sliding_window", None) or 0) if config.model_type == "mistral" else 0


def _join(names: dict[int, str], *layers: nn.Linear | LoraLinear) -> Joined:
    linears = [layer.linear if isinstance(layer, LoraLinear) else layer for layer in layers]
    weight_OI = _laid_together(linears)
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias_O = None if not biases else torch.cat([bias.detach() for bias in biases])
    return Joined(
        names=tuple(names[id(layer)] for layer in layers),
        layers=layers,
        weight_OI=weight_OI,
        bias_O=bias_O,
        widths=tuple(linear.out_features for linear in linears),
    )


def _laid_together(linears: Sequence[nn.Linear]) -> Tensor:
    """Return the weights below each other in one matrix, into which the layers look from now on."""
    weights = [linear.weight.detach() for linear in linears]
    rows, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    places = [weight.data_ptr() for weight in weights]
    wanted = itertools.accumulate(
        (weight.nbytes for weight in weights[:-1]), initial=weights[0].data_ptr()
    )
    stores = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(stores) == 1 and places == list(wanted):
        return weights[0].as_strided((rows, inputs), (inputs, 1))
    together = torch.cat(weights)
    for linear, part in zip(linears, together.split([len(w) for w in weights]), strict=True):
        linear.weight.data = part
    return together


def _adapted(joined: Joined) -> JoinedTensors:
    """Return the adapters that layers have, as they are computed with."""
    dtype, parts_RI = joined.weight_OI.dtype, []
    bs_OR: list[Tensor | None] = []
    for layer in joined.layers:
        if not isinstance(layer, LoraLinear) or layer.lora_a is None or layer.lora_b is None:
            bs_OR.append(None)
            continue
        parts_RI.append(layer.lora_a.detach().to(dtype))
        bs_OR.append((layer.lora_b.detach() * layer.scaling).to(dtype))
    if not parts_RI:
        return JoinedTensors()
    return JoinedTensors(a_RI=torch.cat(parts_RI), bs_OR=tuple(bs_OR))
