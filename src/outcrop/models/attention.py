"""Attention of a decoder's rows, forward and backward: in blocks on the CPU, by flash attention on
a GPU.

Either way a row's queries, keys and values come as one matrix, and their gradient goes back so.

Axis suffixes: T rows (tokens), O columns of all heads, G groups of heads with common keys, S
queries of a block, K keys, H width of a head.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from outcrop.models import flash, kernels
from outcrop.models.decoder import Decoder
from outcrop.models.kernels import Layout
from outcrop.models.workspace import Stack, Take

BLOCK_ROWS = 256
"""Queries that are looked at together: bounds a matrix of scores, and what lies above its
diagonal is computed for nothing."""
KEPT_KEYS = 512
"""Weights of attention are kept for the backward pass up to so many keys, else computed again."""


@dataclass(frozen=True)
class KeptBlocks:
    """What the backward pass of attention in blocks needs."""

    query: Tensor
    key: Tensor
    value: Tensor
    weights: tuple[Tensor | None, ...]


Kept = KeptBlocks | flash.Kept


def attention_forward(
    decoder: Decoder, layout: Layout, qkv_TO: Tensor, keep: Take, scratch: Stack
) -> tuple[Tensor, Kept]:
    """Return (the output, (T, heads of queries * width), what the backward pass needs).

    Args:
        keep: gives room for both results.
    """
    if layout.spans is not None:
        rows = kernels.rotate_rows(qkv_TO, layout, decoder.groups, decoder.heads_a_group)
        return flash.forward(rows, layout.spans, decoder.groups, layout.window)
    heads = decoder.groups * decoder.heads_a_group
    query, key, value = kernels.split_heads(
        qkv_TO, layout, decoder.groups, decoder.heads_a_group, keep
    )
    blocks, weights = _blocks_forward(decoder, layout, query, key, value, keep, scratch)
    output_TO = kernels.move_heads(blocks, layout, to_rows=True, heads=heads, take=keep)
    return output_TO, KeptBlocks(query, key, value, weights)


def attention_backward(
    decoder: Decoder, layout: Layout, kept: Kept, doutput_TO: Tensor, scratch: Stack
) -> Tensor:
    """Return the gradient of the queries, keys and values, (T, O), from that of the output."""
    if isinstance(kept, flash.Kept):
        assert layout.spans is not None
        parts = flash.backward(kept, doutput_TO, layout.spans, decoder.groups, layout.window)
        return kernels.merge_rows(*parts, layout)
    heads = decoder.groups * decoder.heads_a_group
    dblocks = kernels.move_heads(
        doutput_TO.view(layout.num_rows, heads, decoder.head_width),
        layout,
        to_rows=False,
        take=scratch.take,
    )
    dquery, dkey, dvalue = _blocks_backward(decoder, layout, kept, dblocks, scratch)
    return kernels.merge_heads(
        *(dquery, dkey, dvalue, layout, decoder.groups, decoder.heads_a_group, scratch.take)
    )


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
    heads, blocks = decoder.groups * decoder.heads_a_group, []
    for place, start, rows in layout.blocks:
        segment = layout.segments[place]
        end = segment.prefix + start - segment.start + rows
        first = max(0, end - rows - layout.window + 1) if layout.window else 0
        query_numbers, key_numbers = heads * decoder.head_width, decoder.groups * decoder.head_width
        keys = layout.key_rows(segment)
        blocks.append(
            _Block(
                rows,
                slice(start * query_numbers, (start + rows) * query_numbers),
                slice(keys.start * key_numbers, keys.stop * key_numbers),
                first,
                end,
            )
        )
    return blocks


def _blocks_forward(
    decoder: Decoder,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Take,
    scratch: Stack,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return (blocks of outputs, laid out as the queries, the weights of attention to keep)."""
    output, kept = scratch.take(tuple(query.shape), query.dtype), []
    for block in _blocks(decoder, layout):
        query_GSH, key_GKH, value_GKH = _operands(decoder, block, query, key, value)
        is_kept = block.end <= KEPT_KEYS
        with nullcontext() if is_kept else scratch.part():
            take = keep if is_kept else scratch.take
            weights_GSK = _weights(decoder, layout, block, query_GSH, key_GKH, take)
            torch.bmm(weights_GSK, value_GKH, out=output[block.queries].view_as(query_GSH))
        kept.append(weights_GSK if is_kept else None)
    return output, tuple(kept)


def _blocks_backward(
    decoder: Decoder, layout: Layout, kept: KeptBlocks, doutput: Tensor, scratch: Stack
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, laid out as they are."""
    dquery, dkey, dvalue = (
        scratch.take(tuple(tensor.shape), tensor.dtype)
        for tensor in (kept.query, kept.key, kept.value)
    )
    dkey.zero_()
    dvalue.zero_()
    scale = decoder.head_width**-0.5
    for block, weights_GSK in zip(_blocks(decoder, layout), kept.weights, strict=True):
        query_GSH, key_GKH, value_GKH = _operands(decoder, block, kept.query, kept.key, kept.value)
        dquery_GSH, dkey_GKH, dvalue_GKH = _operands(decoder, block, dquery, dkey, dvalue)
        doutput_GSH = doutput[block.queries].view_as(query_GSH)
        with scratch.part():
            if weights_GSK is None:
                weights_GSK = _weights(decoder, layout, block, query_GSH, key_GKH, scratch.take)
            dvalue_GKH.baddbmm_(weights_GSK.transpose(1, 2), doutput_GSH)
            dscores_GSK = scratch.take(tuple(weights_GSK.shape), weights_GSK.dtype)
            torch.bmm(doutput_GSH, value_GKH.transpose(1, 2), out=dscores_GSK)
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
    decoder: Decoder,
    layout: Layout,
    block: _Block,
    query_GSH: Tensor,
    key_GKH: Tensor,
    take: Take,
) -> Tensor:
    groups, rows, _ = query_GSH.shape
    scores_GSK = take((groups, rows, key_GKH.shape[1]), query_GSH.dtype)
    torch.bmm(query_GSH, key_GKH.transpose(1, 2), out=scores_GSK)
    kernels.softmax_forward(scores_GSK, block.rows, decoder.head_width**-0.5, layout.window)
    return scores_GSK
