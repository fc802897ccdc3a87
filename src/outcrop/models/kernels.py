"""The operations between the matrix products of a decoder, forward and backward.

Each is one function with two bodies: a pass of compiled C over memory (kernels.c), and the same
mathematics in torch's operations (pointwise.py). The first is for the CPU in bfloat16 and float32,
and needs a C compiler once for each machine and data directory; without one, on a GPU (where
torch.compile makes kernels of them) and in float64, the second does. Backward functions are called
by hand (decoder.py), so nothing here is a node of a graph.

Where a function takes a `take`, its results lie in room that this gives; None means new tensors.

Wide numbers (the residual stream, norms, losses) are float32; float64 where the matrices are.

Axis suffixes: T rows (tokens), D model width, I inner width, V vocabulary, L rows that carry loss.
Blocks and segments are those of `Layout`.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from outcrop.models import pointwise
from outcrop.models.compiled import (
    NoCompilerError,
    keep_libraries_in,
    library_folder,
    load_library,
)
from outcrop.models.flash import Spans, in_fixed_order
from outcrop.models.fused import Fused
from outcrop.models.pointwise import wide as wide
from outcrop.models.rows import Segment
from outcrop.models.workspace import Take

logger = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-std=c11", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math"),
)
MACHINE_FLAGS = (
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd"),
    ("-mcpu=native", "-fopenmp-simd"),
    ("-fopenmp-simd",),
)
"""The first that the compiler takes are used: not every one has OpenMP, or knows its machine."""
WIDEST_HEAD = 1024
"""Numbers in a head at most: kernels.c sums up that many at a time."""
TYPES = {torch.bfloat16: ("-DBFLOAT16",), torch.float32: ()}
SIGNATURES = {
    "norm_forward": "nnaaaaxaa",
    "norm_backward": "nnaaaaaa",
    "gated_forward": "nnaa",
    "gated_backward": "nnaaaa",
    "split_heads": "naanaaannnaaaaaa",
    "merge_heads": "naanaaannnaaaaaa",
    "move_heads": "naannaan",
    "softmax_forward": "nnnnxa",
    "softmax_backward": "nnxaa",
    "cross_entropy": "nnaaxa",
}
"""The C functions and their arguments: n a number, x a float, a an address."""
_Table = ctypes.Array[ctypes.c_int64]
_norm_forward = Fused(pointwise.norm_forward, rows=(0, 1))
_norm_backward = Fused(pointwise.norm_backward, rows=(0, 1, 3, 4))
_gated_forward = Fused(pointwise.gated_forward, rows=(0,))
_gated_backward = Fused(pointwise.gated_backward, rows=(0, 1))
_rotate_rows = Fused(pointwise.rotate_rows, rows=(0, 1, 2))
_merge_rows = Fused(pointwise.merge_rows, rows=(0, 1, 2, 3, 4))
_cross_entropy = Fused(pointwise.cross_entropy_in_one, rows=(0, 1), plain=pointwise.cross_entropy)
_losses_only = Fused(pointwise.losses_only, rows=(0, 1))
_ARGUMENT_TYPES = {"n": ctypes.c_long, "x": ctypes.c_float, "a": ctypes.c_void_p}


class Layout:
    """Who attends to whom in a row of tokens, and by which position each is rotated."""

    def __init__(
        self,
        segments: Sequence[Segment],
        cosines_TF: Tensor,
        sines_TF: Tensor,
        *,
        block_rows: int,
        window: int = 0,
        spans: Spans | None = None,
    ) -> None:
        """
        Args:
            segments: in the order of their rows, without gaps. A shared prefix is the first one.
            cosines_TF: of each row's angles, wide numbers; F is half the width of a head.
            block_rows: so many queries of a segment are looked at together at most.
            window: keys that a query sees, itself included; 0 for all before it.
            spans: the same for flash attention, which needs no blocks; None where there is none.
        """
        self.spans = spans
        self.segments = tuple(segments)
        self.window = window
        self.cosines_TF, self.sines_TF = cosines_TF, sines_TF
        self.blocks = tuple(
            (place, segment.start + first, min(block_rows, segment.length - first))
            for place, segment in enumerate(segments)
            for first in range(0, segment.length, block_rows)
        )
        """(segment, first row, rows) of each block of queries."""
        self.num_rows = sum(segment.length for segment in segments)
        self.num_keys = sum(segment.prefix + segment.length for segment in segments)
        self._block_starts = _table([start for _, start, _ in self.blocks])
        self._block_lengths = _table([rows for _, _, rows in self.blocks])
        self._starts = _table([segment.start for segment in segments])
        self._lengths = _table([segment.length for segment in segments])
        self._prefixes = _table([segment.prefix for segment in segments])

    @property
    def block_arguments(self) -> tuple[int, _Table, _Table]:
        """What kernels take to know the blocks."""
        return len(self.blocks), self._block_starts, self._block_lengths

    @property
    def segment_arguments(self) -> tuple[int, _Table, _Table, _Table]:
        """What kernels take to know the segments."""
        return len(self.segments), self._starts, self._lengths, self._prefixes

    def key_rows(self, segment: Segment) -> slice:
        """Return where a segment's keys are, among those of all segments."""
        first = 0
        for other in self.segments:
            total = other.prefix + other.length
            if other is segment:
                return slice(first, first + total)
            first += total
        raise ValueError(segment)


def norm_forward(
    x_TD: Tensor,
    change_TD: Tensor | None,
    weight_D: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    take: Take | None = None,
    take_sum: Take | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a change to the residual stream and take its root-mean-square norm.

    Args:
        x_TD: wide numbers, as are `weight_D` and the first and the last result.
        dtype: of the matrices, and so of `change_TD` and the second result.
        take_sum: gives the room for the first result, which is `x_TD` itself without a change.
    Returns:
        (sum_TD, normed_TD, scale_T)
    """
    kernels = _kernels(x_TD, dtype)
    if kernels is None:
        found: tuple[Tensor, Tensor, Tensor] = _norm_forward(
            x_TD, change_TD, weight_D, epsilon, dtype
        )
        return found
    rows, width = x_TD.shape
    sum_TD = x_TD if change_TD is None else _room(take_sum or take, x_TD, rows, width)
    normed_TD = _room(take, x_TD, rows, width, dtype=dtype)
    scale_T = _room(take, x_TD, rows)
    kernels.norm_forward(
        *(rows, width, _at(x_TD), _at(change_TD), _at(sum_TD), _at(weight_D)),
        *(epsilon, _at(normed_TD), _at(scale_T)),
    )
    return sum_TD, normed_TD, scale_T


def norm_backward(
    dnormed_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    scale_T: Tensor,
    dx_TD: Tensor,
    take: Take | None = None,
) -> Tensor:
    """Add the gradient through a norm to `dx_TD`, in place; return that in the matrices' type."""
    dtype = dnormed_TD.dtype
    kernels = _kernels(x_TD, dtype)
    if kernels is None:
        rounded_TD: Tensor = _norm_backward(dnormed_TD, x_TD, weight_D, scale_T, dx_TD)
        return rounded_TD
    rows, width = x_TD.shape
    out_TD = _room(take, x_TD, rows, width, dtype=dtype)
    kernels.norm_backward(
        *(rows, width, _at(dnormed_TD), _at(x_TD), _at(weight_D), _at(scale_T)),
        *(_at(dx_TD), _at(out_TD)),
    )
    return out_TD


def gated_forward(gate_up_TI: Tensor, take: Take | None = None) -> Tensor:
    """Return silu(gate) * up, half as wide as the argument, whose rows hold gate, then up."""
    kernels = _kernels(gate_up_TI, gate_up_TI.dtype)
    rows, width = gate_up_TI.shape[0], gate_up_TI.shape[1] // 2
    if kernels is None:
        gated_TI: Tensor = _gated_forward(gate_up_TI)
        return gated_TI
    out_TI = _room(take, gate_up_TI, rows, width)
    kernels.gated_forward(rows, width, _at(gate_up_TI), _at(out_TI))
    return out_TI


def gated_backward(
    dout_TI: Tensor, gate_up_TI: Tensor, take: Take | None = None
) -> tuple[Tensor, Tensor]:
    """Return (the gradient of `gate_up_TI`, what `gated_forward` gave)."""
    kernels = _kernels(gate_up_TI, gate_up_TI.dtype)
    rows, width = dout_TI.shape
    if kernels is None:
        found: tuple[Tensor, Tensor] = _gated_backward(dout_TI, gate_up_TI)
        return found
    dgate_up_TI = _room(take, gate_up_TI, *gate_up_TI.shape)
    out_TI = _room(take, gate_up_TI, rows, width)
    kernels.gated_backward(
        *(rows, width, _at(dout_TI), _at(gate_up_TI), _at(dgate_up_TI), _at(out_TI))
    )
    return dgate_up_TI, out_TI


def split_heads(
    rows: Tensor, layout: Layout, groups: int, heads_a_group: int, take: Take | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn rows of queries, keys and values into what attention multiplies, rotated.

    Args:
        rows: (T, (groups * heads_a_group + 2 * groups) * width of a head).
    Returns:
        (query, key, value): flat; a query block lies as (groups, heads_a_group, its rows, width of
        a head), a segment's keys and values as (groups, its prefix and its rows, width).
    """
    heads = groups * heads_a_group
    width = rows.shape[1] // (heads + 2 * groups)
    query = _room(take, rows, layout.num_rows * heads * width)
    key = _room(take, rows, layout.num_keys * groups * width)
    value = _room(take, rows, len(key))
    kernels = _kernels(rows, rows.dtype)
    if kernels is not None:
        kernels.split_heads(
            *layout.block_arguments,
            *layout.segment_arguments,
            *(groups, heads_a_group, width // 2, _at(rows)),
            *(_at(layout.cosines_TF), _at(layout.sines_TF), _at(query), _at(key), _at(value)),
        )
        return query, key, value
    turned, values = rows.split([(heads + groups) * width, groups * width], dim=1)
    turned = _rotate(turned.unflatten(1, (-1, width)), layout, 1).to(rows.dtype)
    queries, keys = turned.split([heads, groups], dim=1)
    values = values.unflatten(1, (-1, width))
    move_heads(queries.contiguous(), layout, to_rows=False, blocks=query)
    for segment in layout.segments:
        place = layout.key_rows(segment)
        part = slice(place.start * groups * width, place.stop * groups * width)
        own = slice(segment.start, segment.start + segment.length)
        for flat, table in ((key, keys), (value, values)):
            seen = torch.cat([table[: segment.prefix], table[own]])
            flat[part] = seen.transpose(0, 1).reshape(-1)
    return query, key, value


def merge_heads(
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    layout: Layout,
    groups: int,
    heads_a_group: int,
    take: Take | None = None,
) -> Tensor:
    """Return the gradient of what `split_heads` took, from those of what it gave."""
    heads = groups * heads_a_group
    width = dquery.numel() // (layout.num_rows * heads)
    rows = _room(take, dquery, layout.num_rows, (heads + 2 * groups) * width)
    kernels = _kernels(rows, rows.dtype)
    if kernels is not None:
        kernels.merge_heads(
            *layout.block_arguments,
            *layout.segment_arguments,
            *(groups, heads_a_group, width // 2, _at(dquery), _at(dkey), _at(dvalue)),
            *(_at(layout.cosines_TF), _at(layout.sines_TF), _at(rows)),
        )
        return rows
    queries = move_heads(dquery, layout, to_rows=True, heads=heads).view(-1, heads, width)
    sums = []
    for flat in (dkey, dvalue):
        total = torch.zeros(
            layout.num_rows, groups, width, dtype=wide(rows.dtype), device=rows.device
        )
        for segment in layout.segments:
            place = layout.key_rows(segment)
            part = flat[place.start * groups * width : place.stop * groups * width]
            seen = part.view(groups, -1, width).transpose(0, 1)
            total[: segment.prefix] += seen[: segment.prefix]
            total[segment.start : segment.start + segment.length] += seen[segment.prefix :]
        sums.append(total)
    queries = _rotate(queries, layout, -1)
    keys = _rotate(sums[0], layout, -1)
    return torch.cat([queries, keys, sums[1]], dim=1).flatten(1).to(rows.dtype)


def rotate_rows(rows_TO: Tensor, layout: Layout, groups: int, heads_a_group: int) -> Tensor:
    """Return (T, heads of queries, keys and values, width of a head), the first two rotated: what
    flash attention takes. The counterpart of `split_heads`."""
    heads = groups * heads_a_group
    rows_TNW = rows_TO.view(len(rows_TO), heads + 2 * groups, -1)
    turned_TNW: Tensor = _rotate_rows(rows_TNW, layout.cosines_TF, layout.sines_TF, heads + groups)
    return turned_TNW


def merge_rows(dquery_TNW: Tensor, dkey_TNW: Tensor, dvalue_TNW: Tensor, layout: Layout) -> Tensor:
    """Return the gradient of what `rotate_rows` took, from those of the parts of what it gave."""
    merged_TO: Tensor = _merge_rows(
        dquery_TNW, dkey_TNW, dvalue_TNW, layout.cosines_TF, layout.sines_TF
    )
    return merged_TO


def add_rows(target_TD: Tensor, places_L: Tensor, rows_LD: Tensor) -> Tensor:
    """Add each row to the row of the target at its place, in place, in the same order each time."""
    with in_fixed_order() if target_TD.is_cuda else nullcontext():
        target_TD.index_add_(0, places_L, rows_LD)
    return target_TD


def move_heads(
    tensor: Tensor,
    layout: Layout,
    *,
    to_rows: bool,
    heads: int = 0,
    blocks: Tensor | None = None,
    take: Take | None = None,
) -> Tensor:
    """Bring heads from the blocks of queries into rows, or back.

    Args:
        tensor: flat blocks, or (T, heads, width) where they go back.
        heads: needed for flat blocks.
        blocks: receives the blocks where there is room for them already.
    Returns:
        (T, heads * width), or flat blocks.
    """
    if to_rows:
        width = tensor.numel() // (layout.num_rows * heads)
        rows = _room(take, tensor, layout.num_rows, heads * width)
        blocks = tensor
    else:
        heads, width = tensor.shape[1:]
        rows = tensor
        blocks = _room(take, tensor, tensor.numel()) if blocks is None else blocks
    kernels = _kernels(tensor, tensor.dtype)
    if kernels is not None:
        kernels.move_heads(
            *layout.block_arguments, *(heads, width, _at(blocks), _at(rows), int(to_rows))
        )
        return rows if to_rows else blocks
    for _, start, length in layout.blocks:
        in_rows = rows.view(-1, heads, width)[start : start + length]
        in_block = blocks[start * heads * width : (start + length) * heads * width]
        if to_rows:
            in_rows.copy_(in_block.view(heads, length, width).transpose(0, 1))
        else:
            in_block.copy_(in_rows.transpose(0, 1).reshape(-1))
    return rows if to_rows else blocks


def softmax_forward(scores: Tensor, length: int, scale: float, window: int = 0) -> None:
    """Turn scores into weights, in place.

    Args:
        scores: (matrices, a multiple of `length`, keys). The last `length` of the keys are the
            queries' own: each sees itself and those before it.
        window: how many keys a query sees, itself included; 0 for all.
    """
    kernels = _kernels(scores, scores.dtype)
    keys = scores.shape[-1]
    if kernels is not None:
        kernels.softmax_forward(
            *(scores.numel() // (length * keys), length, keys, window, scale),
            _at(scores),
        )
        return
    place = torch.arange(keys, device=scores.device)
    own = torch.arange(keys - length, keys, device=scores.device)[:, None]
    hidden = place > own
    if window:
        hidden |= place <= own - window
    shown = (scores.view(-1, length, keys).to(wide(scores.dtype)) * scale).masked_fill_(
        hidden, float("-inf")
    )
    scores.copy_(torch.softmax(shown, dim=-1).view_as(scores))


def softmax_backward(weights: Tensor, gradient: Tensor, scale: float) -> None:
    """Turn the gradient of weights into that of the scores they were made from, in place."""
    kernels = _kernels(weights, weights.dtype)
    keys = weights.shape[-1]
    if kernels is not None:
        rows = weights.numel() // keys
        kernels.softmax_backward(rows, keys, scale, _at(weights), _at(gradient))
        return
    p, d = weights.to(wide(weights.dtype)), gradient.to(wide(weights.dtype))
    gradient.copy_(scale * p * (d - (p * d).sum(-1, keepdim=True)))


def cross_entropy(logits_LV: Tensor, labels_L: Tensor, scale: float) -> Tensor:
    """Return each row's loss in wide numbers.

    Where `scale` is not 0, the logits become the gradient of scale * the sum of the losses.
    """
    kernels = _kernels(logits_LV, logits_LV.dtype)
    if kernels is not None:
        losses_L = torch.empty(logits_LV.shape[0])
        kernels.cross_entropy(
            *(*logits_LV.shape, _at(logits_LV), _at(labels_L), scale),
            _at(losses_L),
        )
        return losses_L
    if not scale:
        plain_L: Tensor = _losses_only(logits_LV, labels_L)
        return plain_L
    # As a tensor: a constant would be compiled in, and it is another one in each step.
    factor = torch.full((), scale, dtype=wide(logits_LV.dtype), device=logits_LV.device)
    changed_L: Tensor = _cross_entropy(logits_LV, labels_L, factor)
    return changed_L


def are_compiled(dtype: torch.dtype) -> bool:
    """Return whether the compiled bodies run for matrices of this type on the CPU.

    Two runs with different answers agree only within rounding.
    """
    return dtype in TYPES and _library(dtype) is not None


def keep_kernels_in(folder: Path | None) -> None:
    """Say where compiled kernels are kept, for this process; None means that none are used.

    Before, it is a folder of this user's cache.
    """
    keep_libraries_in(folder)
    _library.cache_clear()


def _table(numbers: Sequence[int]) -> _Table:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _room(take: Take | None, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return room for a tensor of a shape, of a tensor's type where no other is named."""
    dtype = dtype or like.dtype
    return like.new_empty(shape, dtype=dtype) if take is None else take(shape, dtype)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rotate(x: Tensor, layout: Layout, sign: int) -> Tensor:
    """Rotate (T, heads, width) by the rows' angles, in wide numbers."""
    return pointwise.rotate(x, layout.cosines_TF, sign * layout.sines_TF)


def _kernels(tensor: Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled functions for a call, or None where torch's operations are to do it."""
    if dtype not in TYPES or tensor.device.type != "cpu":
        return None
    return _library(dtype)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        if library_folder() is not None:
            _share_openmp()
        library = load_library(
            "outcrop.models", "kernels.c", (*FLAGS, *TYPES[dtype]), MACHINE_FLAGS
        )
    except NoCompilerError as error:
        logger.info("%s: training is slower", error)
        return None
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the kernels could not be compiled, training is slower: %s", error)
        return None
    if library is None:
        return None
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_ARGUMENT_TYPES[letter] for letter in arguments]
        function.restype = None
    return library


@cache
def _share_openmp() -> None:
    """Let libraries that are loaded from now on find the OpenMP that torch has brought along."""
    for file in sorted(Path(torch.__file__).parent.glob("lib/libgomp*")):
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
