"""Lay examples end to end into micro-batches without padding.

A micro-batch is one row of tokens with the length of each example in it. Attention must stay
inside an example, and positions begin anew with each; whoever computes with the row sees to the
first, the positions are given here. It knows plain lists only, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from outcrop.data.records import Example

IGNORE_INDEX = -100
"""The label of a token that carries no loss. Source: torch's cross_entropy, transformers."""


@dataclass(frozen=True)
class MicroBatch:
    """Some examples in one row."""

    input_ids: list[int]
    position_ids: list[int]
    """Place of each token in its example, from 0."""
    labels: list[int]
    """The token itself where it carries loss, else IGNORE_INDEX; not shifted. The first token of
    an example never carries loss: nothing comes before it that could predict it."""
    lengths: list[int]
    """Tokens of each example, in order; their sum is the length of the row."""


def pack(examples: Iterable[Example], max_tokens: int) -> Iterator[MicroBatch]:
    """Put examples together, in the order they come, as long as they fit into `max_tokens`.

    An example longer than that is a micro-batch of its own; an empty one is left out.
    """
    row: list[Example] = []
    num_tokens = 0
    for example in examples:
        length = len(example.input_ids)
        if not length:
            continue
        if row and num_tokens + length > max_tokens:
            yield _lay(row)
            row, num_tokens = [], 0
        row.append(example)
        num_tokens += length
    if row:
        yield _lay(row)


def _lay(row: list[Example]) -> MicroBatch:
    batch = MicroBatch([], [], [], [])
    for example in row:
        length = len(example.input_ids)
        batch.input_ids.extend(example.input_ids)
        batch.position_ids.extend(range(length))
        batch.labels.extend(
            token if carries_loss and place else IGNORE_INDEX
            for place, (token, carries_loss) in enumerate(
                zip(example.input_ids, example.loss_mask, strict=True)
            )
        )
        batch.lengths.append(length)
    return batch
