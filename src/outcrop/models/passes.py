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
    LayerTensors,
    ModelTensors,
)
from outcrop.models.kernels import Layout
from outcrop.models.rows import Row
from outcrop.models.workspace import Stack, Take, Workspace

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


@dataclass(frozen=True)
class _Rooms:
    """Where the tensors of a layer's forward pass lie."""

    stream: Take
    """The residual stream before the layer."""
    middle: Take
    """The residual stream inside the layer."""
    keep: Take
    """What else the way back needs."""
    change: Take
    """What is still to be added to the residual stream."""
    scratch: Stack
    """All that is of no use after the layer."""


@torch.no_grad()
def row_losses(
    decoder: Decoder,
    row: Row,
    check: Callable[[], None] = lambda: None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Return the loss of each token of a row that carries one, in nats, wide numbers.

    Args:
        check: called before each layer; what it raises ends the pass.
        workspace: to work in; None means one for this call.
    """
    placed, workspace = _place(decoder, row), workspace or Workspace()
    workspace.begin_row(decoder.device)
    room = workspace.layer
    x_TD, change_TD, last = _embed(decoder, placed, workspace), None, len(decoder.layers) - 1
    for place in range(len(decoder.layers)):
        check()
        pass_on = workspace.begin_layer(place)
        rooms = _Rooms(pass_on, pass_on, room.take, pass_on, room)
        sources = placed.sources_L if place == last else None
        x_TD, change_TD, _ = _layer_forward(
            decoder, place, x_TD, change_TD, placed.layout, sources, rooms
        )
    workspace.begin_layer(last + 1)
    losses, _ = _head(decoder, placed.labels_L, x_TD, change_TD, 0.0, None, workspace)
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
    workspace: Workspace | None = None,
) -> Tensor:
    """Take the gradient of scale * the sum of a row's losses; return the losses.

    Args:
        gradients: is overwritten with the gradient. That of an adapter's B is still to be
            multiplied by the adapter's scaling.
        kept_layers: so many layers, the last ones, keep what their backward pass needs; the others
            keep only their input and are computed twice.
        check: called before each layer of both passes; what it raises ends them.
        workspace: to work in; None means one for this call.
    """
    placed, workspace = _place(decoder, row), workspace or Workspace()
    layout, sources = placed.layout, placed.sources_L
    workspace.begin_row(decoder.device)
    room, row_take = workspace.layer, workspace.row.take
    x_TD, change_TD = _embed(decoder, placed, workspace), None
    last = len(decoder.layers) - 1
    kept: list[_Kept | Tensor] = []
    for place in range(len(decoder.layers)):
        check()
        pass_on, is_kept = workspace.begin_layer(place), place > last - kept_layers
        if is_kept:
            rooms = _Rooms(row_take, row_take, row_take, pass_on, room)
        else:
            rooms = _Rooms(row_take, pass_on, room.take, pass_on, room)
        chosen = sources if place == last else None
        x_TD, change_TD, whole = _layer_forward(
            decoder, place, x_TD, change_TD, layout, chosen, rooms
        )
        kept.append(whole if is_kept else whole.x_TD)
        del whole
    pass_on = workspace.begin_layer(last + 1)
    losses, dx_TD = _head(decoder, placed.labels_L, x_TD, change_TD, scale, gradients, workspace)
    del x_TD, change_TD
    dout_TD = pass_on(tuple(dx_TD.shape), decoder.dtype).copy_(dx_TD)
    for place in range(last, -1, -1):
        check()
        pass_on, item = workspace.begin_layer(place), kept.pop()
        chosen = sources if place == last else None
        if isinstance(item, Tensor):
            rooms = _Rooms(room.take, room.take, room.take, room.take, room)
            item = _layer_forward(decoder, place, item, None, layout, chosen, rooms)[2]
        needs_input = place > 0 or gradients.table_VD is not None
        dx_TD, dout_TD = _layer_backward(
            *(decoder, place, gradients.layers[place], item, dx_TD, dout_TD),
            *(layout, chosen, needs_input, workspace, pass_on),
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


def _embed(decoder: Decoder, placed: _Placed, workspace: Workspace) -> Tensor:
    table_VD = decoder.table_VD if decoder.work.table_VD is None else decoder.work.table_VD
    shape = len(placed.ids_T), table_VD.shape[1]
    found_TD = workspace.layer.take(shape, table_VD.dtype)
    torch.index_select(table_VD, 0, placed.ids_T, out=found_TD)
    return workspace.row.take(shape, kernels.wide(decoder.dtype)).copy_(found_TD)


def _layer_forward(
    decoder: Decoder,
    place: int,
    x_TD: Tensor,
    change_TD: Tensor | None,
    layout: Layout,
    sources_L: Tensor | None,
    rooms: _Rooms,
) -> tuple[Tensor, Tensor, _Kept]:
    """Return (residual stream, what is still to be added to it, what the way back needs).

    Args:
        place: of the layer.
        sources_L: the only rows whose output is needed; None for all.
    """
    layer, work = decoder.layers[place], decoder.work.layers[place]
    keep, scratch = rooms.keep, rooms.scratch
    norms = layer.norms if work.norms is None else work.norms
    x_TD, normed_TD, scale_T = kernels.norm_forward(
        x_TD, change_TD, norms[0], decoder.epsilon, decoder.dtype, keep, rooms.stream
    )
    qkv_TO, qkv_h = _joined_forward(layer.qkv, work.qkv, normed_TD, scratch.take, keep)
    qk_norm: tuple[Tensor, ...] = ()
    if len(norms) > 2:
        qkv_TO, qk_norm = _head_norms_forward(decoder, norms, qkv_TO, keep)
    attended_TO, attention = attention_forward(decoder, layout, qkv_TO, keep, scratch)
    residual_TD = x_TD
    if sources_L is not None:
        attended_TO = _choose(attended_TO, sources_L, keep)
        residual_TD = _choose(x_TD, sources_L, scratch.take)
    out_TD, out_h = _joined_forward(layer.out, work.out, attended_TO, scratch.take, keep)
    x2_TD, normed2_TD, scale2_T = kernels.norm_forward(
        residual_TD, out_TD, norms[1], decoder.epsilon, decoder.dtype, keep, rooms.middle
    )
    gate_up_TI, gate_up_h = _joined_forward(layer.gate_up, work.gate_up, normed2_TD, keep, keep)
    gated_TI = kernels.gated_forward(gate_up_TI, scratch.take)
    down_TD, down_h = _joined_forward(layer.down, work.down, gated_TI, rooms.change, keep)
    kept = _Kept(
        *(x_TD, normed_TD, scale_T, qkv_h, qk_norm, attention, attended_TO),
        *(out_h, x2_TD, normed2_TD, scale2_T, gate_up_TI, gate_up_h, down_h),
    )
    return x2_TD, down_TD, kept


def _layer_backward(
    decoder: Decoder,
    place: int,
    gradients: LayerTensors,
    kept: _Kept,
    dx_TD: Tensor,
    dout_TD: Tensor,
    layout: Layout,
    sources_L: Tensor | None,
    needs_input: bool,
    workspace: Workspace,
    pass_on: Take,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the residual stream before the layer, wide and as matrices' type.

    Args:
        dx_TD: that after the layer; is changed.
        dout_TD: the same in the matrices' type.
        needs_input: False where nothing below is trained.
        pass_on: gives room for the second result.
    """
    layer, work = decoder.layers[place], decoder.work.layers[place]
    scratch, take = workspace.layer, workspace.layer.take
    norms = layer.norms if work.norms is None else work.norms
    dnorms = gradients.norms
    dgated_TI, down_dh = _joined_input(layer.down, work.down, dout_TD, take)
    dgate_up_TI, gated_TI = kernels.gated_backward(dgated_TI, kept.gate_up_TI, take)
    _joined_parameters(
        work.down, gradients.down, layer.down, dout_TD, down_dh, gated_TI, kept.down_h
    )
    dnormed_TD, dh = _joined_input(layer.gate_up, work.gate_up, dgate_up_TI, take)
    _joined_parameters(
        *(work.gate_up, gradients.gate_up, layer.gate_up, dgate_up_TI, dh),
        *(kept.normed2_TD, kept.gate_up_h),
    )
    if dnorms is not None:
        _norm_weight(dnorms[1], dnormed_TD, kept.x2_TD, kept.scale2_T, scratch)
    dout_TD = kernels.norm_backward(dnormed_TD, kept.x2_TD, norms[1], kept.scale2_T, dx_TD, take)
    dattended_TO, dh = _joined_input(layer.out, work.out, dout_TD, take)
    _joined_parameters(
        work.out, gradients.out, layer.out, dout_TD, dh, kept.attended_TO, kept.out_h
    )
    if sources_L is not None:
        dattended_TO = _scatter(dattended_TO, sources_L, layout.num_rows, take)
        dx_TD = _scatter(dx_TD, sources_L, layout.num_rows, workspace.row.take)
    dqkv_TO = attention_backward(decoder, layout, kept.attention, dattended_TO, scratch)
    if kept.qk_norm:
        dqkv_TO = _head_norms_backward(decoder, norms, dnorms, kept.qk_norm, dqkv_TO, scratch)
    dnormed_TD, dh = _joined_input(layer.qkv, work.qkv, dqkv_TO, take, needs_input=needs_input)
    _joined_parameters(work.qkv, gradients.qkv, layer.qkv, dqkv_TO, dh, kept.normed_TD, kept.qkv_h)
    if not needs_input:
        return dx_TD, dout_TD
    if dnorms is not None:
        _norm_weight(dnorms[0], dnormed_TD, kept.x_TD, kept.scale_T, scratch)
    return dx_TD, kernels.norm_backward(
        dnormed_TD, kept.x_TD, norms[0], kept.scale_T, dx_TD, pass_on
    )


def _choose(rows: Tensor, sources_L: Tensor, take: Take) -> Tensor:
    chosen = take((len(sources_L), rows.shape[1]), rows.dtype)
    return torch.index_select(rows, 0, sources_L, out=chosen)


def _scatter(chosen: Tensor, sources_L: Tensor, num_rows: int, take: Take) -> Tensor:
    rows = take((num_rows, chosen.shape[1]), chosen.dtype).zero_()
    return kernels.add_rows(rows, sources_L, chosen)


def _head(
    decoder: Decoder,
    labels_L: Tensor,
    x_LD: Tensor,
    change_LD: Tensor | None,
    scale: float,
    gradients: ModelTensors | None,
    workspace: Workspace,
) -> tuple[Tensor, Tensor]:
    """Return (losses, gradient of the residual stream), the second only where there is a scale."""
    work, scratch = decoder.work, workspace.layer
    norm_D = decoder.norm_D if work.norm_D is None else work.norm_D
    head_VD = decoder.head_VD if work.head_VD is None else work.head_VD
    x_LD, normed_LD, scale_L = kernels.norm_forward(
        x_LD, change_LD, norm_D, decoder.epsilon, decoder.dtype, scratch.take
    )
    chunk = HEAD_CHUNK_TOKENS[decoder.device.type]
    dhead_VD = None if gradients is None else gradients.head_VD
    dnormed_LD, losses = scratch.take(tuple(normed_LD.shape), decoder.dtype), []
    for hidden_LD, labels, dhidden_LD in zip(
        normed_LD.split(chunk), labels_L.split(chunk), dnormed_LD.split(chunk), strict=True
    ):
        with scratch.part():
            logits_LV = _product(hidden_LD, head_VD.t(), scratch.take)
            losses.append(kernels.cross_entropy(logits_LV, labels, scale))
            if scale:
                torch.mm(logits_LV, head_VD, out=dhidden_LD)
                if dhead_VD is not None:
                    product_VD = _product(logits_LV.t(), hidden_LD, scratch.take)
                    if len(losses) == 1:
                        dhead_VD.copy_(product_VD)
                    else:
                        dhead_VD += product_VD
    dx_LD = workspace.row.take(tuple(x_LD.shape), x_LD.dtype).zero_()
    if scale:
        if gradients is not None and gradients.norm_D is not None:
            _norm_weight(gradients.norm_D, dnormed_LD, x_LD, scale_L, scratch)
        kernels.norm_backward(dnormed_LD, x_LD, norm_D, scale_L, dx_LD, scratch.take)
    return torch.cat(losses), dx_LD


def _norm_weight(
    gradient_D: Tensor, dnormed_TD: Tensor, x_TD: Tensor, scale_T: Tensor, scratch: Stack
) -> None:
    with scratch.part():
        product_TD = scratch.take(tuple(x_TD.shape), x_TD.dtype)
        torch.mul(dnormed_TD, x_TD, out=product_TD)
        torch.mv(product_TD.t(), scale_T, out=gradient_D)


def _product(left: Tensor, right: Tensor, take: Take) -> Tensor:
    return torch.mm(left, right, out=take((left.shape[0], right.shape[1]), left.dtype))


def _joined_forward(
    joined: Joined, work: JoinedTensors, x_TI: Tensor, take: Take, keep: Take
) -> tuple[Tensor, Tensor | None]:
    """Return (x W^T + scaling * x A^T B^T + bias, x A^T).

    Args:
        keep: gives room for the second result, `take` for the first.
    """
    weight_OI = joined.weight_OI if work.weight_OI is None else work.weight_OI
    bias_O = joined.bias_O if work.bias_O is None else work.bias_O
    h_TR = None
    if work.a_RI is None:
        y_TO = _product(x_TI, weight_OI.t(), take)
    else:
        h_TR = _product(x_TI, work.a_RI.t(), keep)
        y_TO = take((x_TI.shape[0], weight_OI.shape[0]), x_TI.dtype)
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
    joined: Joined, work: JoinedTensors, dy_TO: Tensor, take: Take, *, needs_input: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of (the input, x A^T); the first is empty where it is not needed."""
    weight_OI = joined.weight_OI if work.weight_OI is None else work.weight_OI
    if work.a_RI is None:
        return (_product(dy_TO, weight_OI, take) if needs_input else dy_TO.new_empty(0)), None
    dh_TR = take((dy_TO.shape[0], work.a_RI.shape[0]), dy_TO.dtype)
    for part_TO, b_OR, part_TR in _parts(joined, work, dy_TO, dh_TR):
        if b_OR is not None:
            torch.mm(part_TO, b_OR, out=part_TR)
    if not needs_input:
        return dy_TO.new_empty(0), dh_TR
    return _product(dh_TR, work.a_RI, take).addmm_(dy_TO, weight_OI), dh_TR


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
    decoder: Decoder, norms: tuple[Tensor, ...], qkv_TO: Tensor, keep: Take
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Norm each head of queries and keys, in place. Returns (the rows, what the way back needs)."""
    wide, kept = kernels.wide(decoder.dtype), []
    for columns, weight_H in zip(_norm_columns(decoder), norms[2:], strict=True):
        heads = _heads(decoder, qkv_TO[:, columns], wide, keep)
        _, normed, scale = kernels.norm_forward(
            heads, None, weight_H, decoder.epsilon, decoder.dtype, keep
        )
        qkv_TO[:, columns] = normed.view(qkv_TO.shape[0], -1)
        kept += [heads, scale]
    return qkv_TO, tuple(kept)


def _head_norms_backward(
    decoder: Decoder,
    norms: tuple[Tensor, ...],
    dnorms: tuple[Tensor, ...] | None,
    kept: tuple[Tensor, ...],
    dqkv_TO: Tensor,
    scratch: Stack,
) -> Tensor:
    for place, columns in enumerate(_norm_columns(decoder)):
        heads, scale = kept[2 * place : 2 * place + 2]
        with scratch.part():
            dnormed = _heads(decoder, dqkv_TO[:, columns], dqkv_TO.dtype, scratch.take)
            if dnorms is not None:
                _norm_weight(dnorms[2 + place], dnormed, heads, scale, scratch)
            dheads = scratch.take(tuple(heads.shape), heads.dtype).zero_()
            dheads = kernels.norm_backward(
                dnormed, heads, norms[2 + place], scale, dheads, scratch.take
            )
            dqkv_TO[:, columns] = dheads.view(dqkv_TO.shape[0], -1)
    return dqkv_TO


def _heads(decoder: Decoder, columns: Tensor, dtype: torch.dtype, take: Take) -> Tensor:
    """Return a copy of some columns with a row for each head."""
    copy = take((columns.shape[0], columns.shape[1]), dtype).copy_(columns)
    return copy.view(-1, decoder.head_width)


def _norm_columns(decoder: Decoder) -> tuple[slice, slice]:
    queries = decoder.groups * decoder.heads_a_group * decoder.head_width
    return slice(0, queries), slice(queries, queries + decoder.groups * decoder.head_width)
