"""A decoder's forward and backward pass over packed rows, written out by hand.

By hand, because then nothing is computed that no loss depends on, layers that read the same input
are one matrix product, activations are freed or computed again as memory asks for, a run can be
stopped between two layers, and several rows go through the same weights in several threads at once.

An adapter's change and the frozen product are rounded once, together, as models/lora.py explains.

Source: the mathematics follows transformers' modeling_llama, modeling_mistral, modeling_qwen2 and
modeling_qwen3; tests compare losses and gradients with them in float64.

Axis suffixes: T rows of tokens, D model width, I inputs, O outputs, R rank, L rows that carry loss,
V vocabulary, F half the width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from outcrop.models import flash, kernels
from outcrop.models.attention import BLOCK_ROWS, Kept, attention_backward, attention_forward
from outcrop.models.decoder import (
    Decoder,
    Joined,
    JoinedTensors,
    Layer,
    LayerTensors,
    ModelTensors,
)
from outcrop.models.kernels import Layout
from outcrop.models.rows import Row

HEAD_CHUNK_TOKENS = {"cpu": 512, "cuda": 4096}
"""Tokens whose scores over the vocabulary exist at once, by the kind of device: 50 MB in bfloat16
at 49,152 words on the CPU."""


@dataclass(frozen=True)
class _Kept:
    """What a layer's backward pass needs of its forward pass."""

    x_TD: Tensor
    normed_TD: Tensor
    scale_T: Tensor
    qkv_h: Tensor | None
    qk_norm: tuple[Tensor, ...]
    attention: Kept
    attended_TO: Tensor
    out_h: Tensor | None
    x2_TD: Tensor
    normed2_TD: Tensor
    scale2_T: Tensor
    gate_up_TI: Tensor
    gate_up_h: Tensor | None
    down_h: Tensor | None


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
    placed, work = _place(decoder, row), decoder.work
    x_TD, change_TD = _embed(decoder, placed), None
    for place, (layer, tensors) in enumerate(zip(decoder.layers, work.layers, strict=True)):
        check()
        sources = placed.sources_L if place == len(decoder.layers) - 1 else None
        x_TD, change_TD, _ = _layer_forward(
            decoder, layer, tensors, x_TD, change_TD, placed.layout, sources
        )
    losses, _ = _head(decoder, placed.labels_L, x_TD, change_TD, 0.0, None)
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
    placed, work = _place(decoder, row), decoder.work
    layout, sources = placed.layout, placed.sources_L
    x_TD, change_TD = _embed(decoder, placed), None
    last = len(decoder.layers) - 1
    kept: list[_Kept | Tensor] = []
    for place, (layer, tensors) in enumerate(zip(decoder.layers, work.layers, strict=True)):
        check()
        x_TD, change_TD, whole = _layer_forward(
            decoder, layer, tensors, x_TD, change_TD, layout, sources if place == last else None
        )
        kept.append(whole if place > last - kept_layers else whole.x_TD)
        del whole
    losses, dx_TD = _head(decoder, placed.labels_L, x_TD, change_TD, scale, gradients)
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
        table_VD = gradients.table_VD
        kernels.add_rows(table_VD, placed.ids_T, dx_TD.to(table_VD.dtype))
    return losses


@dataclass(frozen=True)
class _Placed:
    """A row where the weights are."""

    ids_T: Tensor
    sources_L: Tensor
    labels_L: Tensor
    layout: Layout


def _place(decoder: Decoder, row: Row) -> _Placed:
    """Bring a row to where the weights are, in one copy that nothing waits for."""
    device, spans = decoder.device, None
    lists = (row.input_ids, row.sources, row.labels, row.position_ids)
    parts = [torch.tensor(numbers, dtype=torch.long) for numbers in lists]
    if flash.fits(device, decoder.dtype, decoder.head_width):
        spans = flash.span_numbers(row.segments)
        parts += spans.tensors
    together = torch.cat(parts)
    if device.type == "cuda":
        together = together.pin_memory()
    together = together.to(device, non_blocking=True)
    ids_T, sources_L, labels_L, positions_T, *others = together.split([len(p) for p in parts])
    cosines_TF, sines_TF = _angles(decoder, positions_T)
    layout = Layout(
        *(row.segments, cosines_TF, sines_TF),
        block_rows=BLOCK_ROWS,
        window=decoder.window,
        spans=None if spans is None else flash.place_spans(spans, others),
    )
    return _Placed(ids_T, sources_L, labels_L, layout)


def _angles(decoder: Decoder, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation, wide numbers."""
    wide = kernels.wide(decoder.dtype)
    # In float32 where it is wide, as transformers has them, so that both agree to the last place.
    angles_TF = torch.outer(positions_T.to(wide), decoder.frequencies_F.to(wide))
    return angles_TF.cos() * decoder.rotation_scale, angles_TF.sin() * decoder.rotation_scale


def _embed(decoder: Decoder, placed: _Placed) -> Tensor:
    table_VD = decoder.table_VD if decoder.work.table_VD is None else decoder.work.table_VD
    return table_VD.index_select(0, placed.ids_T).to(kernels.wide(decoder.dtype))


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
    attended_TO, attention = attention_forward(decoder, layout, qkv_TO)
    del qkv_TO
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
        *(x_TD, normed_TD, scale_T, qkv_h, qk_norm, attention, attended_TO),
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
    dqkv_TO = attention_backward(decoder, layout, kept.attention, dattended_TO)
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
    return kernels.add_rows(chosen.new_zeros(num_rows, chosen.shape[1]), sources_L, chosen)


def _head(
    decoder: Decoder,
    labels_L: Tensor,
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
    chunk = HEAD_CHUNK_TOKENS[decoder.device.type]
    dhead_VD = None if gradients is None else gradients.head_VD
    losses, dnormed = [], []
    for hidden_LD, labels in zip(normed_LD.split(chunk), labels_L.split(chunk), strict=True):
        logits_LV = hidden_LD @ head_VD.t()
        losses.append(kernels.cross_entropy(logits_LV, labels, scale))
        if scale:
            dnormed.append(logits_LV @ head_VD)
            if dhead_VD is not None:
                product_VD = logits_LV.t() @ hidden_LD
                if len(losses) == 1:
                    dhead_VD.copy_(product_VD)
                else:
                    dhead_VD += product_VD
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
