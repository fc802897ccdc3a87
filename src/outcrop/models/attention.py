"""Attention of a decoder's rows, forward and backward: in blocks on the CPU, by flash attention on
a GPU.

Either way a row's queries, keys and values come as one matrix, and their gradient goes back so.

Axis suffixes: T rows (tokens), O columns of all heads, G groups of heads with common keys, S
queries of a block, K keys, H width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outcrop.models import flash, kernels
from outcrop.models.decoder import Decoder
from outcrop.models.kernels import Layout

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


def attention_forward(decoder: Decoder, layout: Layout, qkv_TO: Tensor) -> tuple[Tensor, Kept]:
    """Return (the output, (T, heads of queries * width), what the backward pass needs)."""
    if layout.spans is not None:
        rows = kernels.rotate_rows(qkv_TO, layout, decoder.groups, decoder.heads_a_group)
        return flash.forward(rows, layout.spans, decoder.groups, layout.window)
    heads = decoder.groups * decoder.heads_a_group
    query, key, value = kernels.split_heads(qkv_TO, layout, decoder.groups, decoder.heads_a_group)
    blocks, weights = _blocks_forward(decoder, layout, query, key, value)
    output_TO = kernels.move_heads(blocks, layout, to_rows=True, heads=heads)
    return output_TO, KeptBlocks(query, key, value, weights)


def attention_backward(decoder: Decoder, layout: Layout, kept: Kept, doutput_TO: Tensor) -> Tensor:
    """Return the gradient of the queries, keys and values, (T, O), from that of the output."""
    if isinstance(kept, flash.Kept):
        assert layout.spans is not None
        parts = flash.backward(kept, doutput_TO, layout.spans, decoder.groups, layout.window)
        return kernels.merge_rows(*parts, layout)
    heads = decoder.groups * decoder.heads_a_group
    dblocks = kernels.move_heads(
        doutput_TO.view(layout.num_rows, heads, decoder.head_width), layout, to_rows=False
    )
    dquery, dkey, dvalue = _blocks_backward(decoder, layout, kept, dblocks)
    return kernels.merge_heads(dquery, dkey, dvalue, layout, decoder.groups, decoder.heads_a_group)


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


def _blocks_backward(
    decoder: Decoder, layout: Layout, kept: KeptBlocks, doutput: Tensor
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
