"""A decoder's forward and backward pass over packed rows, written out by hand.

For Llama-shaped models (Llama, Mistral, Qwen2, Qwen3): root-mean-square norms, rotated queries and
keys, a gated feed-forward part. Everything else runs through transformers' own code and autograd
(evaluate/likelihood.py). By hand, because then nothing is computed that no loss depends on, layers
that read the same input are one matrix product, activations are freed or computed again as memory
asks for, a run can be stopped between two layers, and several rows go through the same weights in
several threads at once.

The weights stay where transformers' module has them; only layers that are read together are laid
together, and the module then looks into that. An adapter's change and the frozen product are
rounded once, together, as models/lora.py explains.

Source: the mathematics follows transformers' modeling_llama, modeling_mistral, modeling_qwen2 and
modeling_qwen3; tests compare losses and gradients with them in float64.

Axis suffixes: T rows of tokens, D model width, I inputs, O outputs, R rank, L rows that carry loss,
V vocabulary, G groups of heads with common keys, S queries of a block, K keys, H width of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outcrop.models import kernels
from outcrop.models.kernels import Layout
from outcrop.models.lora import LoraLinear
from outcrop.models.rows import Row

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
BLOCK_ROWS = 256
"""Queries that are looked at together: bounds a matrix of scores, and what lies above its
diagonal is computed for nothing."""
KEPT_KEYS = 512
"""Weights of attention are kept for the backward pass up to so many keys, else computed again."""
HEAD_CHUNK_TOKENS = 512
"""Tokens whose scores over the vocabulary exist at once: 50 MB in bfloat16 at 49,152 words."""


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


@dataclass(frozen=True)
class _Kept:
    """What a layer's backward pass needs of its forward pass."""

    x_TD: Tensor
    normed_TD: Tensor
    scale_T: Tensor
    qkv_h: Tensor | None
    qk_norm: tuple[Tensor, ...]
    query: Tensor
    key: Tensor
    value: Tensor
    weights: tuple[Tensor | None, ...]
    attended_TO: Tensor
    out_h: Tensor | None
    x2_TD: Tensor
    normed2_TD: Tensor
    scale2_T: Tensor
    gate_up_TI: Tensor
    gate_up_h: Tensor | None
    down_h: Tensor | None


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
    return (
        getattr(config, "hidden_act", "silu") == "silu"
        and rope.get("rope_type", "default") in ("default", "llama3", "linear")
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and not getattr(config, "mlp_bias", False)
        # Some layers with a window and some without: left to transformers.
        and len(set(getattr(config, "layer_types", None) or ["one"])) == 1
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


@torch.no_grad()
def row_losses(
    decoder: Decoder,
    row: Row,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the loss of each token of a row that carries one, in nats, wide numbers.

    Args:
        check: called before each layer; what it raises ends the pass.
    """
    layout, work = _layout(decoder, row), decoder.work
    x_TD, change_TD = _embed(decoder, row), None
    for place, (layer, tensors) in enumerate(zip(decoder.layers, work.layers, strict=True)):
        check()
        sources = _sources(decoder, row) if place == len(decoder.layers) - 1 else None
        x_TD, change_TD, _ = _layer_forward(
            decoder, layer, tensors, x_TD, change_TD, layout, sources
        )
    losses, _ = _head(decoder, row, x_TD, change_TD, 0.0, None)
    return losses


@torch.no_grad()
def row_gradients(
    decoder: Decoder,
    gradients: ModelTensors,
    row: Row,
    scale: float,
    *,
    kept_layers: int,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Take the gradient of scale * the sum of a row's losses; return the losses.

    Args:
        gradients: is overwritten with the gradient. That of an adapter's B is still to be
            multiplied by the adapter's scaling.
        kept_layers: so many layers, the last ones, keep what their backward pass needs; the others
            keep only their input and are computed twice.
        check: called before each layer of both passes; what it raises ends them.
    """
    layout, work = _layout(decoder, row), decoder.work
    x_TD, change_TD = _embed(decoder, row), None
    last = len(decoder.layers) - 1
    sources = _sources(decoder, row)
    kept: list[_Kept | Tensor] = []
    for place, (layer, tensors) in enumerate(zip(decoder.layers, work.layers, strict=True)):
        check()
        x_TD, change_TD, whole = _layer_forward(
            decoder, layer, tensors, x_TD, change_TD, layout, sources if place == last else None
        )
        kept.append(whole if place > last - kept_layers else whole.x_TD)
        del whole
    losses, dx_TD = _head(decoder, row, x_TD, change_TD, scale, gradients)
    del x_TD, change_TD
    dout_TD = dx_TD.to(decoder.dtype)
    for place in range(last, -1, -1):
        check()
        layer, tensors, item = decoder.layers[place], work.layers[place], kept.pop()
        chosen = sources if place == last else None
        if isinstance(item, Tensor):
            item = _layer_forward(decoder, layer, tensors, item, None, layout, chosen)[2]
        needs_input = place > 0 or gradients.table_VD is not None
        dx_TD, dout_TD = _layer_backward(
            *(decoder, layer, tensors, gradients.layers[place], item),
            *(dx_TD, dout_TD, layout, chosen, needs_input),
        )
        del item
    if gradients.table_VD is not None:
        if gradients.table_VD is not gradients.head_VD:
            gradients.table_VD.zero_()
        ids_T = torch.tensor(row.input_ids, device=decoder.device)
        gradients.table_VD.index_add_(0, ids_T, dx_TD.to(gradients.table_VD.dtype))
    return losses


def _layout(decoder: Decoder, row: Row) -> Layout:
    positions = torch.tensor(row.position_ids, dtype=torch.float64)
    angles_TF = torch.outer(positions, decoder.frequencies_F.cpu())
    wide = kernels.wide(decoder.dtype)
    if wide == torch.float32:
        # As transformers has them: angles of float32 factors, so that both agree to the last place.
        angles_TF = torch.outer(positions.float(), decoder.frequencies_F.cpu().float())
    cosines_TF = (angles_TF.cos() * decoder.rotation_scale).to(decoder.device, wide)
    sines_TF = (angles_TF.sin() * decoder.rotation_scale).to(decoder.device, wide)
    return Layout(row.segments, cosines_TF, sines_TF, block_rows=BLOCK_ROWS, window=decoder.window)


def _embed(decoder: Decoder, row: Row) -> Tensor:
    table_VD = decoder.table_VD if decoder.work.table_VD is None else decoder.work.table_VD
    ids_T = torch.tensor(row.input_ids, device=decoder.device)
    return table_VD.index_select(0, ids_T).to(kernels.wide(decoder.dtype))


def _sources(decoder: Decoder, row: Row) -> Tensor:
    return torch.tensor(row.sources, device=decoder.device)


def _layer_forward(
    decoder: Decoder,
    layer: Layer,
    work: LayerTensors,
    x_TD: Tensor,
    change_TD: Tensor | None,
    layout: Layout,
    sources_L: Tensor | None,
) -> tuple[Tensor, Tensor, _Kept]:
    """Return (residual stream, what is still to be added to it, what the way back needs).

    Args:
        sources_L: the only rows whose output is needed; None for all.
    """
    norms = layer.norms if work.norms is None else work.norms
    x_TD, normed_TD, scale_T = kernels.norm_forward(
        x_TD, change_TD, norms[0], decoder.epsilon, decoder.dtype
    )
    qkv_TO, qkv_h = _joined_forward(layer.qkv, work.qkv, normed_TD)
    qk_norm: tuple[Tensor, ...] = ()
    if len(norms) > 2:
        qkv_TO, qk_norm = _head_norms_forward(decoder, norms, qkv_TO)
    query, key, value = kernels.split_heads(qkv_TO, layout, decoder.groups, decoder.heads_a_group)
    del qkv_TO
    blocks, weights = _attention_forward(decoder, layout, query, key, value)
    heads = decoder.groups * decoder.heads_a_group
    attended_TO = kernels.move_heads(blocks, layout, to_rows=True, heads=heads)
    residual_TD = x_TD
    if sources_L is not None:
        attended_TO, residual_TD = attended_TO[sources_L], x_TD[sources_L]
    out_TD, out_h = _joined_forward(layer.out, work.out, attended_TO)
    x2_TD, normed2_TD, scale2_T = kernels.norm_forward(
        residual_TD, out_TD, norms[1], decoder.epsilon, decoder.dtype
    )
    gate_up_TI, gate_up_h = _joined_forward(layer.gate_up, work.gate_up, normed2_TD)
    down_TD, down_h = _joined_forward(layer.down, work.down, kernels.gated_forward(gate_up_TI))
    kept = _Kept(
        *(x_TD, normed_TD, scale_T, qkv_h, qk_norm, query, key, value, weights, attended_TO),
        *(out_h, x2_TD, normed2_TD, scale2_T, gate_up_TI, gate_up_h, down_h),
    )
    return x2_TD, down_TD, kept


def _layer_backward(
    decoder: Decoder,
    layer: Layer,
    work: LayerTensors,
    gradients: LayerTensors,
    kept: _Kept,
    dx_TD: Tensor,
    dout_TD: Tensor,
    layout: Layout,
    sources_L: Tensor | None,
    needs_input: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the residual stream before the layer, wide and as matrices' type.

    Args:
        dx_TD: that after the layer; is changed.
        dout_TD: the same in the matrices' type.
        needs_input: False where nothing below is trained.
    """
    norms = layer.norms if work.norms is None else work.norms
    dnorms = gradients.norms
    dgated_TI, down_dh = _joined_input(layer.down, work.down, dout_TD)
    dgate_up_TI, gated_TI = kernels.gated_backward(dgated_TI, kept.gate_up_TI)
    _joined_parameters(
        work.down, gradients.down, layer.down, dout_TD, down_dh, gated_TI, kept.down_h
    )
    del dgated_TI, gated_TI
    dnormed_TD, dh = _joined_input(layer.gate_up, work.gate_up, dgate_up_TI)
    _joined_parameters(
        *(work.gate_up, gradients.gate_up, layer.gate_up, dgate_up_TI, dh),
        *(kept.normed2_TD, kept.gate_up_h),
    )
    del dgate_up_TI
    if dnorms is not None:
        _norm_weight(dnorms[1], dnormed_TD, kept.x2_TD, kept.scale2_T)
    dout_TD = kernels.norm_backward(dnormed_TD, kept.x2_TD, norms[1], kept.scale2_T, dx_TD)
    dattended_TO, dh = _joined_input(layer.out, work.out, dout_TD)
    _joined_parameters(
        work.out, gradients.out, layer.out, dout_TD, dh, kept.attended_TO, kept.out_h
    )
    if sources_L is not None:
        dattended_TO = _scatter(dattended_TO, sources_L, layout.num_rows)
        dx_TD = _scatter(dx_TD, sources_L, layout.num_rows)
    heads = decoder.groups * decoder.heads_a_group
    dblocks = kernels.move_heads(
        dattended_TO.view(layout.num_rows, heads, decoder.head_width), layout, to_rows=False
    )
    dquery, dkey, dvalue = _attention_backward(decoder, layout, kept, dblocks)
    dqkv_TO = kernels.merge_heads(
        dquery, dkey, dvalue, layout, decoder.groups, decoder.heads_a_group
    )
    if kept.qk_norm:
        dqkv_TO = _head_norms_backward(decoder, norms, dnorms, kept.qk_norm, dqkv_TO)
    dnormed_TD, dh = _joined_input(layer.qkv, work.qkv, dqkv_TO, needs_input=needs_input)
    _joined_parameters(work.qkv, gradients.qkv, layer.qkv, dqkv_TO, dh, kept.normed_TD, kept.qkv_h)
    if not needs_input:
        return dx_TD, dout_TD
    if dnorms is not None:
        _norm_weight(dnorms[0], dnormed_TD, kept.x_TD, kept.scale_T)
    return dx_TD, kernels.norm_backward(dnormed_TD, kept.x_TD, norms[0], kept.scale_T, dx_TD)


def _scatter(chosen: Tensor, sources_L: Tensor, num_rows: int) -> Tensor:
    return chosen.new_zeros(num_rows, chosen.shape[1]).index_add_(0, sources_L, chosen)


def _head(
    decoder: Decoder,
    row: Row,
    x_LD: Tensor,
    change_LD: Tensor | None,
    scale: float,
    gradients: ModelTensors | None,
) -> tuple[Tensor, Tensor]:
    """Return (losses, gradient of the residual stream), the second only where there is a scale."""
    work = decoder.work
    norm_D = decoder.norm_D if work.norm_D is None else work.norm_D
    head_VD = decoder.head_VD if work.head_VD is None else work.head_VD
    x_LD, normed_LD, scale_L = kernels.norm_forward(
        x_LD, change_LD, norm_D, decoder.epsilon, decoder.dtype
    )
    labels_L = torch.tensor(row.labels, device=decoder.device)
    dhead_VD = None if gradients is None else gradients.head_VD
    if dhead_VD is not None:
        dhead_VD.zero_()
    losses, dnormed = [], []
    for hidden_LD, labels in zip(
        normed_LD.split(HEAD_CHUNK_TOKENS), labels_L.split(HEAD_CHUNK_TOKENS), strict=True
    ):
        logits_LV = hidden_LD @ head_VD.t()
        losses.append(kernels.cross_entropy(logits_LV, labels, scale))
        if scale:
            dnormed.append(logits_LV @ head_VD)
            if dhead_VD is not None:
                dhead_VD += logits_LV.t() @ hidden_LD
    dx_LD = torch.zeros_like(x_LD)
    if scale:
        dnormed_LD = torch.cat(dnormed)
        if gradients is not None and gradients.norm_D is not None:
            _norm_weight(gradients.norm_D, dnormed_LD, x_LD, scale_L)
        kernels.norm_backward(dnormed_LD, x_LD, norm_D, scale_L, dx_LD)
    return torch.cat(losses), dx_LD


def _norm_weight(gradient_D: Tensor, dnormed_TD: Tensor, x_TD: Tensor, scale_T: Tensor) -> None:
    product_TD = dnormed_TD.to(x_TD.dtype) * x_TD
    torch.mv(product_TD.t(), scale_T, out=gradient_D)


def _joined_forward(
    joined: Joined, work: JoinedTensors, x_TI: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return (x W^T + scaling * x A^T B^T + bias, x A^T)."""
    weight_OI = joined.weight_OI if work.weight_OI is None else work.weight_OI
    bias_O = joined.bias_O if work.bias_O is None else work.bias_O
    h_TR = None
    if work.a_RI is None:
        y_TO = x_TI @ weight_OI.t()
    else:
        h_TR = x_TI @ work.a_RI.t()
        y_TO = x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])
        for part_TO, b_OR, part_TR in _parts(joined, work, y_TO, h_TR):
            if b_OR is None:
                part_TO.zero_()
            else:
                torch.mm(part_TR, b_OR.t(), out=part_TO)
        y_TO.addmm_(x_TI, weight_OI.t())
    if bias_O is not None:
        y_TO += bias_O
    return y_TO, h_TR


def _joined_input(
    joined: Joined, work: JoinedTensors, dy_TO: Tensor, *, needs_input: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of (the input, x A^T); the first is empty where it is not needed."""
    weight_OI = joined.weight_OI if work.weight_OI is None else work.weight_OI
    if work.a_RI is None:
        return (dy_TO @ weight_OI if needs_input else dy_TO.new_empty(0)), None
    dh_TR = dy_TO.new_empty(dy_TO.shape[0], work.a_RI.shape[0])
    for part_TO, b_OR, part_TR in _parts(joined, work, dy_TO, dh_TR):
        if b_OR is not None:
            torch.mm(part_TO, b_OR, out=part_TR)
    if not needs_input:
        return dy_TO.new_empty(0), dh_TR
    return (dh_TR @ work.a_RI).addmm_(dy_TO, weight_OI), dh_TR


def _joined_parameters(
    work: JoinedTensors,
    gradients: JoinedTensors,
    joined: Joined,
    dy_TO: Tensor,
    dh_TR: Tensor | None,
    x_TI: Tensor,
    h_TR: Tensor | None,
) -> None:
    """Write the gradients of what is trained."""
    if gradients.weight_OI is not None:
        torch.mm(dy_TO.t(), x_TI, out=gradients.weight_OI)
    if gradients.bias_O is not None:
        gradients.bias_O.copy_(dy_TO.to(gradients.bias_O.dtype).sum(0))
    if gradients.a_RI is None or dh_TR is None or h_TR is None:
        return
    torch.mm(dh_TR.t(), x_TI, out=gradients.a_RI)
    for (part_TO, b_OR, part_TR), db_OR in zip(
        _parts(joined, work, dy_TO, h_TR), gradients.bs_OR, strict=True
    ):
        if b_OR is not None and db_OR is not None:
            torch.mm(part_TO.t(), part_TR, out=db_OR)


def _parts(
    joined: Joined, work: JoinedTensors, y_TO: Tensor, h_TR: Tensor
) -> Iterable[tuple[Tensor, Tensor | None, Tensor]]:
    """Return for each part: its outputs, its B, its columns of x A^T (none where it has no B)."""
    first = rank = 0
    for width, b_OR in zip(joined.widths, work.bs_OR, strict=True):
        next_rank = rank + (0 if b_OR is None else b_OR.shape[1])
        yield y_TO[:, first : first + width], b_OR, h_TR[:, rank:next_rank]
        first, rank = first + width, next_rank


def _head_norms_forward(
    decoder: Decoder, norms: tuple[Tensor, ...], qkv_TO: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Norm each head of queries and keys. Returns (the rows, what the way back needs)."""
    wide = kernels.wide(decoder.dtype)
    out_TO, kept = qkv_TO.clone(), []
    for columns, weight_H in zip(_norm_columns(decoder), norms[2:], strict=True):
        heads = qkv_TO[:, columns].reshape(-1, decoder.head_width).to(wide)
        heads, normed, scale = kernels.norm_forward(
            heads, None, weight_H, decoder.epsilon, decoder.dtype
        )
        out_TO[:, columns] = normed.view(qkv_TO.shape[0], -1)
        kept += [heads, scale]
    return out_TO, tuple(kept)


def _head_norms_backward(
    decoder: Decoder,
    norms: tuple[Tensor, ...],
    dnorms: tuple[Tensor, ...] | None,
    kept: tuple[Tensor, ...],
    dqkv_TO: Tensor,
) -> Tensor:
    for place, columns in enumerate(_norm_columns(decoder)):
        heads, scale = kept[2 * place : 2 * place + 2]
        dnormed = dqkv_TO[:, columns].reshape(-1, decoder.head_width)
        if dnorms is not None:
            _norm_weight(dnorms[2 + place], dnormed, heads, scale)
        dheads = torch.zeros_like(heads)
        dheads = kernels.norm_backward(dnormed, heads, norms[2 + place], scale, dheads)
        dqkv_TO[:, columns] = dheads.view(dqkv_TO.shape[0], -1)
    return dqkv_TO


def _norm_columns(decoder: Decoder) -> tuple[slice, slice]:
    queries = decoder.groups * decoder.heads_a_group * decoder.head_width
    return slice(0, queries), slice(queries, queries + decoder.groups * decoder.head_width)


@dataclass(frozen=True)
class _Block:
    """A block of queries and the keys that it sees, as places in flat tensors."""

    rows: int
    queries: slice
    keys: slice
    """Of all segments' keys, those of this segment."""
    first: int
    end: int
    """Of the segment's keys, those that some query of the block sees."""


def _blocks(decoder: Decoder, layout: Layout) -> list[_Block]:
    heads = decoder.groups * decoder.heads_a_group
    blocks = []
    for place, start, rows in layout.blocks:
        segment = layout.segments[place]
        end = segment.prefix + start - segment.start + rows
        first = max(0, end - rows - layout.window + 1) if layout.window else 0
        width = decoder.head_width
        keys = layout.key_rows(segment)
        blocks.append(
            _Block(
                rows,
                slice(start * heads * width, (start + rows) * heads * width),
                slice(keys.start * decoder.groups * width, keys.stop * decoder.groups * width),
                first,
                end,
            )
        )
    return blocks


def _attention_forward(
    decoder: Decoder, layout: Layout, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return (blocks of outputs, laid out as the queries, the weights of attention to keep)."""
    output, kept = torch.empty_like(query), []
    for block in _blocks(decoder, layout):
        query_GSH, key_GKH, value_GKH = _operands(decoder, block, query, key, value)
        weights_GSK = _weights(decoder, layout, block, query_GSH, key_GKH)
        torch.bmm(weights_GSK, value_GKH, out=output[block.queries].view_as(query_GSH))
        kept.append(weights_GSK if block.end <= KEPT_KEYS else None)
    return output, tuple(kept)


def _attention_backward(
    decoder: Decoder, layout: Layout, kept: _Kept, doutput: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, laid out as they are."""
    dquery = torch.empty_like(kept.query)
    dkey, dvalue = torch.zeros_like(kept.key), torch.zeros_like(kept.value)
    scale = decoder.head_width**-0.5
    for block, weights_GSK in zip(_blocks(decoder, layout), kept.weights, strict=True):
        query_GSH, key_GKH, value_GKH = _operands(decoder, block, kept.query, kept.key, kept.value)
        dquery_GSH, dkey_GKH, dvalue_GKH = _operands(decoder, block, dquery, dkey, dvalue)
        doutput_GSH = doutput[block.queries].view_as(query_GSH)
        if weights_GSK is None:
            weights_GSK = _weights(decoder, layout, block, query_GSH, key_GKH)
        dvalue_GKH.baddbmm_(weights_GSK.transpose(1, 2), doutput_GSH)
        dscores_GSK = torch.bmm(doutput_GSH, value_GKH.transpose(1, 2))
        kernels.softmax_backward(weights_GSK, dscores_GSK, scale)
        torch.bmm(dscores_GSK, key_GKH, out=dquery_GSH)
        dkey_GKH.baddbmm_(dscores_GSK.transpose(1, 2), query_GSH)
    return dquery, dkey, dvalue


def _operands(
    decoder: Decoder, block: _Block, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of a block: queries of heads with common keys lie below each other."""
    groups, width = decoder.groups, decoder.head_width
    query_GSH = query[block.queries].view(groups, -1, width)
    key_GKH = key[block.keys].view(groups, -1, width)[:, block.first : block.end]
    value_GKH = value[block.keys].view(groups, -1, width)[:, block.first : block.end]
    return query_GSH, key_GKH, value_GKH


def _weights(
    decoder: Decoder, layout: Layout, block: _Block, query_GSH: Tensor, key_GKH: Tensor
) -> Tensor:
    scores_GSK = torch.bmm(query_GSH, key_GKH.transpose(1, 2))
    kernels.softmax_forward(scores_GSK, block.rows, decoder.head_width**-0.5, layout.window)
    return scores_GSK
