"""Weights and adapters in the order in which the compiled pass reads them.

Matrices become strips (`formats.py`). Gate and up projection become one matrix of 16 rows of the
one, 16 of the other, in turn, so that what belongs together is computed together. An adapter's B
has the order of the matrix it changes, its A's are one below the other.

A model's matrices are held in bfloat16, or in fewer bits where `precision` says so: all of them in
8 bits, or those of the layers in 4 and the head in 8. An embedding that is not the head stays in
bfloat16: only one row of it is read for a token. Adapters are bfloat16 always.

Covers decoders of Llama's build: Llama, Mistral, Qwen 2 and Qwen 3.

Axis suffixes: O outputs, I inputs, R rank, S positions, F half the width of a head.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from outcrop.errors import ModelError
from outcrop.models.lora import Adapter
from outcrop.serve.formats import STRIP, PackedMatrix, is_bfloat16, pack_matrix
from outcrop.serve.forward import (
    MOST_SHARED_HEADS,
    WIDEST_HEAD,
    PackedAdapter,
    PackedLayer,
    PackedModel,
    Shape,
    pack_few_bits,
    rounds_rows,
    wide_room,
)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
LINEAR_MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""In the order of forward.LINEARS."""
PRECISIONS = ("auto", "bfloat16", "int8", "int4")
"""What a model's matrices may be held in; auto is bfloat16, but for what `pack_model` says."""
FEW_BITS = ("int8", "int4")
LINE_BYTES = 64
_SPEEDS = ("default", "linear", "llama3")


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """Return the shape of a model by its config.json; None where the compiled pass does not fit."""
    if config.get("model_type") not in MODEL_TYPES or "quantization_config" in config:
        return None
    rope = _rope(config)
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    head = int(config.get("head_dim") or width // heads)
    window = 0
    if config.get("use_sliding_window", config["model_type"] == "mistral"):
        window = int(config.get("sliding_window") or 0)
    kinds = config.get("layer_types") or ()
    fits = (
        config.get("hidden_act", "silu") == "silu"
        and rope.get("rope_type", rope.get("type", "default")) in _SPEEDS
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not config.get("mlp_bias")
        and not (config["model_type"] == "llama" and config.get("attention_bias"))
        and config.get("pretraining_tp", 1) == 1
        and len(set(kinds)) <= 1
        and not (window and kinds and kinds[0] == "full_attention")
        # What the compiled loops take for granted.
        and heads % groups == 0
        and heads // groups <= MOST_SHARED_HEADS
        and head <= WIDEST_HEAD
        and head % 2 == 0 == width % 2 == inner % 2
        and (heads * head) % STRIP == 0 == (groups * head) % STRIP
    )
    if not fits:
        return None
    return Shape(
        layers=int(config["num_hidden_layers"]),
        width=width,
        inner=-(-inner // STRIP) * STRIP,
        heads=heads,
        groups=groups,
        head=head,
        vocabulary=int(config["vocab_size"]),
        epsilon=float(config.get("rms_norm_eps", 1e-6)),
        window=window,
    )


def pack_model(
    config: Mapping[str, Any],
    shape: Shape,
    weights: Mapping[str, Tensor],
    precision: str = "auto",
    kept: Mapping[str, PackedMatrix] | None = None,
) -> PackedModel:
    """Pack a model's weights, which are named as in transformers.

    Args:
        precision: one of PRECISIONS. Where a pass computes in float32, auto keeps a matrix float32
            that is so and that bfloat16 would round: training that computes in float32 moves many
            weights by less than half the last place of a bfloat16 number.
        kept: matrices that need not be packed, by the names that `PackedModel.matrices` has.
    Raises:
        ModelError: a tensor is missing or has another shape.
    """

    def take(name: str, *wanted: int) -> Tensor:
        found = weights.get(name)
        if found is None or tuple(found.shape) != wanted:
            has = "is missing" if found is None else f"has the shape {tuple(found.shape)}"
            raise ModelError(f"The weights do not fit config.json: {name} {has}, {wanted} fits.")
        return found

    def bias(prefix: str) -> Tensor | None:
        names = [f"{prefix}{module}.bias" for module in LINEAR_MODULES["qkv"]]
        if names[0] not in weights:
            return None
        return torch.cat(
            [take(name, size).float() for name, size in zip(names, outputs["qkv"], strict=True)]
        )

    def head_norm(name: str) -> Tensor | None:
        return take(name, shape.head).float().contiguous() if name in weights else None

    keeps = precision == "auto" and not rounds_rows()

    def pack(
        name: str, make: Callable[..., Tensor], *parts: Any, precision: str = precision
    ) -> PackedMatrix:
        found = (kept or {}).get(name)
        return found or _pack(make(*parts), precision=precision, keeps=keeps)

    width, given_inner = shape.width, int(config["intermediate_size"])
    queries, keys = shape.heads * shape.head, shape.groups * shape.head
    outputs = {
        "qkv": (queries, keys, keys),
        "out": (width,),
        "gate_up": (given_inner, given_inner),
        "down": (width,),
    }
    inputs = {"qkv": width, "out": queries, "gate_up": width, "down": given_inner}
    layers = []
    for number in range(shape.layers):
        prefix = f"model.layers.{number}."
        matrices = {
            linear: [
                take(f"{prefix}{module}.weight", size, inputs[linear])
                for module, size in zip(modules, outputs[linear], strict=True)
            ]
            for linear, modules in LINEAR_MODULES.items()
        }
        layers.append(
            PackedLayer(
                norms=(
                    take(f"{prefix}input_layernorm.weight", width).float().contiguous(),
                    take(f"{prefix}post_attention_layernorm.weight", width).float().contiguous(),
                ),
                matrices=(
                    pack(f"{number}.qkv", torch.cat, matrices["qkv"]),
                    pack(f"{number}.out", torch.cat, matrices["out"]),
                    pack(f"{number}.gate_up", in_turn, matrices["gate_up"], shape.inner),
                    pack(f"{number}.down", wider, matrices["down"][0], shape.inner),
                ),
                qkv_bias=bias(prefix),
                query_norm=head_norm(f"{prefix}self_attn.q_norm.weight"),
                key_norm=head_norm(f"{prefix}self_attn.k_norm.weight"),
            )
        )
    embedding = take("model.embed_tokens.weight", shape.vocabulary, width)
    head = embedding
    if not config.get("tie_word_embeddings") and "lm_head.weight" in weights:
        head = take("lm_head.weight", shape.vocabulary, width)
    cosines_SF, sines_SF = rotations(config, shape.head)
    return PackedModel(
        shape,
        layers,
        take("model.norm.weight", width).float().contiguous(),
        cosines_SF,
        sines_SF,
        pack("lm_head", lambda: head, precision="int8" if precision == "int4" else precision),
        None
        if head is embedding
        else pack(
            "embedding",
            lambda: embedding,
            precision="bfloat16" if precision in FEW_BITS else precision,
        ),
    )


def _pack(matrix_OI: Tensor, *, precision: str, keeps: bool) -> PackedMatrix:
    if precision == "auto":
        is_wide = matrix_OI.dtype in (torch.float32, torch.float64)
        precision = "float32" if keeps and is_wide and not is_bfloat16(matrix_OI) else "bfloat16"
    if precision in FEW_BITS:
        return pack_few_bits(matrix_OI, precision, wide_room)
    return pack_matrix(matrix_OI, precision, wide_room)


def pack_adapter(adapter: Adapter, shape: Shape, given_inner: int) -> PackedAdapter:
    """Pack an adapter, its scaling folded into B as `set_adapter` does.

    Args:
        given_inner: the inner width that the adapter's model has, before it is rounded up.
    Raises:
        ModelError: the adapter does not fit a model of this shape.
    """
    rank, scaling = adapter.config.rank, adapter.config.scaling
    stored_rank = rank + rank % 2
    queries, keys = shape.heads * shape.head, shape.groups * shape.head
    sizes = {
        "q_proj": (queries, shape.width),
        "k_proj": (keys, shape.width),
        "v_proj": (keys, shape.width),
        "o_proj": (shape.width, queries),
        "gate_proj": (given_inner, shape.width),
        "up_proj": (given_inner, shape.width),
        "down_proj": (shape.width, given_inner),
    }
    wanted = {
        f"model.layers.{number}.{module}"
        for number in range(shape.layers)
        for modules in LINEAR_MODULES.values()
        for module in modules
        if module.rpartition(".")[2] in adapter.config.targets
    }
    odd = sorted(wanted ^ adapter.tensors.keys())
    if odd or not wanted:
        what = odd[0] if odd else ", ".join(adapter.config.targets)
        raise ModelError(f"The adapter does not fit the model: {what} is only in one of them.")

    def pair_of(number: int, module: str) -> tuple[Tensor, Tensor]:
        outputs, inputs = sizes[module.rpartition(".")[2]]
        name = f"model.layers.{number}.{module}"
        pair = adapter.tensors.get(name)
        if pair is None:
            return torch.zeros(stored_rank, inputs), torch.zeros(outputs, stored_rank)
        a_RI, b_OR = pair
        if tuple(a_RI.shape) != (rank, inputs) or tuple(b_OR.shape) != (outputs, rank):
            raise ModelError(
                f"The adapter does not fit the model: {name} has shapes {tuple(a_RI.shape)} and "
                f"{tuple(b_OR.shape)}, where {(rank, inputs)} and {(outputs, rank)} are needed."
            )
        b_OR = wider(b_OR * scaling, stored_rank)
        return torch.nn.functional.pad(a_RI, (0, 0, 0, stored_rank - rank)), b_OR

    layers = []
    for number in range(shape.layers):
        linears: list[tuple[Tensor, Tensor] | None] = []
        for linear, modules in LINEAR_MODULES.items():
            if not any(f"model.layers.{number}.{module}" in adapter.tensors for module in modules):
                linears.append(None)
                continue
            pairs = [pair_of(number, module) for module in modules]
            a = torch.cat([a_RI for a_RI, _ in pairs])
            parts = [b_OR for _, b_OR in pairs]
            b = in_turn(parts, shape.inner) if linear == "gate_up" else torch.cat(parts)
            a = wider(a, shape.inner) if linear == "down" else a
            linears.append((_bfloat16(a), _bfloat16(b)))
        layers.append(linears)
    return PackedAdapter(stored_rank, in_one_piece(layers))


def in_one_piece(
    layers: Sequence[Sequence[tuple[Tensor, Tensor] | None]],
) -> list[list[tuple[Tensor, Tensor] | None]]:
    """Return copies that lie in one mapping of memory, which goes back whole when they go.

    As hundreds of small pieces they would leave holes between those of other adapters: a server
    that had read a thousand held twice the memory that it kept adapters in.
    """
    pairs = [pair for linears in layers for pair in linears if pair is not None]
    room = sum(_room(tensor) for pair in pairs for tensor in pair)
    memory = torch.frombuffer(mmap.mmap(-1, max(room, 1)), dtype=torch.uint8)
    first = 0

    def placed(tensor: Tensor) -> Tensor:
        nonlocal first
        place = memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        first += _room(tensor)
        return place.copy_(tensor)

    return [
        [None if pair is None else (placed(pair[0]), placed(pair[1])) for pair in linears]
        for linears in layers
    ]


def _room(tensor: Tensor) -> int:
    """Return a tensor's bytes, up to the next line of a cache."""
    return -(-tensor.nbytes // LINE_BYTES) * LINE_BYTES


def in_turn(matrices: Sequence[Tensor], outputs: int) -> Tensor:
    """Return 16 rows of one matrix, 16 of the next, in turn, each first of `outputs` rows."""
    more = [(0, 0, 0, outputs - matrix.shape[0]) for matrix in matrices]
    wide = [torch.nn.functional.pad(*pair) for pair in zip(matrices, more, strict=True)]
    halves = [matrix.view(-1, STRIP, matrix.shape[1]) for matrix in wide]
    return torch.stack(halves, dim=1).reshape(len(halves) * outputs, -1)


def wider(matrix_OI: Tensor, inputs: int) -> Tensor:
    """Return the matrix with columns of noughts, up to so many."""
    return torch.nn.functional.pad(matrix_OI, (0, inputs - matrix_OI.shape[1]))


def rotations(config: Mapping[str, Any], head: int) -> tuple[Tensor, Tensor]:
    """Return (cosines_SF, sines_SF) of all positions, float32.

    Source: Su et al., RoFormer (arXiv 2104.09864), for the angles; transformers'
    modeling_rope_utils for what "linear" and "llama3" make of the frequencies.
    """
    rope = _rope(config)
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    frequencies = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        factor = float(rope["factor"])
        if kind == "linear":
            frequencies = frequencies / factor
        else:
            length = 2 * torch.pi / frequencies
            low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
            turns = float(rope["original_max_position_embeddings"]) / length
            smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            frequencies = frequencies * ((1 - smooth) / factor + smooth)
    positions = torch.arange(int(config["max_position_embeddings"]), dtype=torch.float64)
    angles_SF = torch.outer(positions, frequencies)
    return angles_SF.cos().float(), angles_SF.sin().float()


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return found


def _bfloat16(matrix_OI: Tensor) -> Tensor:
    return pack_matrix(matrix_OI, "bfloat16").data
