"""Attention of packed rows on a GPU: torch's flash attention, forward and backward called by hand.

Rows stay as they are, (tokens, heads, width of a head): the kernel is told where records begin and
end, and takes fewer heads of keys than of queries. Of a prefix that records share, keys and values
are repeated before each record's own; a record's last query sees its last key, which is how the
kernel aligns queries that are fewer than keys.

Source: torch's aten::_flash_attention_forward and _backward, and flash attention's README (2.1:
causal masks are aligned to the bottom right corner). The backward pass adds in a fixed order only
under torch.use_deterministic_algorithms; torch's own source says so.

Axis suffixes: T rows (tokens), K keys of all segments, N heads (queries, keys and values, in this
order), W width of a head, P rows of the shared prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outcrop.models.rows import Segment

LARGEST_WIDTH, WIDEST, WIDTH_STEP = 192, 256, 8
"""Widths of a head that the kernel takes both ways on every GPU it knows: multiples of the last up
to the first, and the second."""
LEAST_CAPABILITY = (8, 0)
"""Ampere; the kernel has no other bodies."""


@dataclass(frozen=True)
class SpanNumbers:
    """Who attends to whom, as numbers on the CPU; `Spans` has them on the GPU."""

    query_ends: Tensor
    """Rows before each segment and after the last, from 0."""
    key_ends: Tensor
    """Keys likewise."""
    most_queries: int
    most_keys: int
    """Of one segment."""
    key_rows_K: Tensor
    """The row of each key; empty where keys are the rows, because nothing is shared."""
    own_keys_T: Tensor
    """The key of each row that is not a repetition; empty likewise."""
    repeated: Tensor
    """The keys that repeat the prefix, segment after segment, P for each; empty likewise."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What has to be brought to the GPU."""
        return (
            *(self.query_ends, self.key_ends),
            *(self.key_rows_K, self.own_keys_T, self.repeated),
        )


@dataclass(frozen=True)
class Spans:
    """Who attends to whom, on the GPU; as in `SpanNumbers`."""

    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int
    key_rows_K: Tensor
    own_keys_T: Tensor
    repeated_SP: Tensor


@dataclass(frozen=True)
class Kept:
    """What the backward pass needs."""

    rows_TNW: Tensor
    output_TNW: Tensor
    log_sums: Tensor
    random: tuple[Tensor, Tensor]
    """Of a dropout that there is not."""


def fits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernel can do it; if not, attention is done in blocks, and slowly."""
    return (
        device.type == "cuda"
        # AMD's GPUs are called cuda too, and have another kernel, which nobody has tried here.
        and torch.version.hip is None
        and dtype in (torch.bfloat16, torch.float16)
        and width % WIDTH_STEP == 0
        and (width <= LARGEST_WIDTH or width == WIDEST)
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def span_numbers(segments: Sequence[Segment]) -> SpanNumbers:
    """Return who attends to whom.

    Args:
        segments: in the order of their rows, without gaps. Either none has a prefix, or the first
            one is the prefix of all others.
    """
    lengths = [segment.length for segment in segments]
    prefix = segments[-1].prefix
    shares = prefix > 0
    if shares:
        assert lengths[0] == prefix, "the first segment is the shared prefix"
    assert segments[0].prefix == 0
    assert {segment.prefix for segment in segments[1:]} <= {prefix}, "one prefix for all"
    totals = [segment.prefix + segment.length for segment in segments]
    query_ends = torch.tensor([0, *lengths]).cumsum(0)
    key_ends = torch.tensor([0, *totals]).cumsum(0)
    nothing = torch.empty(0, dtype=torch.long)
    key_rows, own, repeated = nothing, nothing, nothing
    if shares:
        first = torch.arange(prefix)
        rows = [first]
        for segment in segments[1:]:
            rows += [first, torch.arange(segment.start, segment.start + segment.length)]
        key_rows = torch.cat(rows)
        begins = key_ends[1:-1]
        repeated = (begins[:, None] + first).flatten()
        is_own = torch.ones(len(key_rows), dtype=torch.bool)
        is_own[repeated] = False
        own = is_own.nonzero()[:, 0]
    return SpanNumbers(
        *(query_ends, key_ends),
        # With a single query the kernel would lay its sums out in another way.
        *(max(2, *lengths), max(2, *totals)),
        *(key_rows, own, repeated),
    )


def place_spans(numbers: SpanNumbers, tensors: Sequence[Tensor]) -> Spans:
    """Return the spans with these numbers, whose tensors are on the GPU now."""
    query_ends, key_ends, key_rows, own, repeated = tensors
    segments = max(1, len(query_ends) - 2)
    return Spans(
        *(query_ends.to(torch.int32), key_ends.to(torch.int32)),
        *(numbers.most_queries, numbers.most_keys),
        *(key_rows, own, repeated.view(segments, -1)),
    )


def forward(rows_TNW: Tensor, spans: Spans, groups: int, window: int) -> tuple[Tensor, Kept]:
    """Return (the output, (T, heads * W), what the backward pass needs).

    Args:
        rows_TNW: rotated queries, keys and values.
        groups: heads of keys, and as many of values.
        window: keys that a query sees, itself included; 0 for all before it.
    """
    query, key, value = _operands(rows_TNW, spans, groups)
    output, log_sums, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        *(query, key, value, spans.query_ends, spans.key_ends),
        *(spans.most_queries, spans.most_keys, 0.0, True, False),
        **_rule(rows_TNW, window),
    )
    return output.flatten(1), Kept(rows_TNW, output, log_sums, (seed, offset))


def backward(
    kept: Kept, doutput_TO: Tensor, spans: Spans, groups: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, each (T, its heads, W)."""
    query, key, value = _operands(kept.rows_TNW, spans, groups)
    with in_fixed_order():
        dquery, dkey, dvalue = torch.ops.aten._flash_attention_backward(
            doutput_TO.view(kept.output_TNW.shape),
            *(query, key, value, kept.output_TNW, kept.log_sums),
            *(spans.query_ends, spans.key_ends, spans.most_queries, spans.most_keys),
            *(0.0, True, *kept.random),
            **_rule(kept.rows_TNW, window),
        )
    return dquery, _folded(dkey, spans), _folded(dvalue, spans)


@contextmanager
def in_fixed_order() -> Iterator[None]:
    """Have torch's operations on a GPU add in a fixed order, inside this `with`, for all threads.

    Only where it is needed: everywhere, it would also refuse what never adds in another order
    here, and fill all new memory.
    """
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fills


def _operands(rows_TNW: Tensor, spans: Spans, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = rows_TNW.shape[1] - 2 * groups
    query, pairs = rows_TNW.split([heads, 2 * groups], dim=1)
    if len(spans.key_rows_K):
        pairs = pairs.index_select(0, spans.key_rows_K)
    key, value = pairs.split(groups, dim=1)
    return query, key, value


def _rule(rows_TNW: Tensor, window: int) -> dict[str, float | int | None]:
    return {
        "scale": rows_TNW.shape[2] ** -0.5,
        "window_size_left": window - 1 if window else None,
        "window_size_right": 0 if window else None,
    }


def _folded(dkeys_KNW: Tensor, spans: Spans) -> Tensor:
    """Return the gradient of rows: that of the prefix's is the sum over all that repeat it."""
    if not len(spans.own_keys_T):
        return dkeys_KNW
    drows = dkeys_KNW.index_select(0, spans.own_keys_T)
    wide = torch.float64 if drows.dtype == torch.float64 else torch.float32
    prefix = spans.repeated_SP.shape[1]
    repeated = dkeys_KNW.index_select(0, spans.repeated_SP.flatten())
    sums = repeated.view(-1, prefix, *drows.shape[1:]).sum(0, dtype=wide)
    drows[:prefix] = (drows[:prefix].to(wide) + sums).to(drows.dtype)
    return drows
