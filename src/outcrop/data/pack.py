"""Lay examples end to end into micro-batches without padding.

A micro-batch is one row of tokens with the length of each example in it. Attention must stay
inside an example, and positions begin anew with each; whoever computes with the row sees to the
first, the positions are given here. It knows plain lists only, no tensors.

`lay_row` also leaves out what no loss depends on, and lays what all examples begin with only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from outcrop.data.records import Example
from outcrop.models.rows import Row, Segment

IGNORE_INDEX = -100
"""The label of a token that carries no loss. Source: torch's cross_entropy, transformers."""
MAX_MICRO_BATCH_TOKENS = 1024
"""Tokens of one forward pass. A longer record is a micro-batch of its own. On 135 million
parameters, 2048 is no faster and takes 1.2 GB more."""

MIN_SHARED_TOKENS = 4
"""A shorter common beginning is not worth a segment of its own."""


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


def lay_row(examples: Sequence[Example]) -> Row:
    """Lay examples into one row for a decoder.

    Tokens after the last one that carries loss are left out, and that one too: it is predicted, but
    predicts nothing. What all examples begin with, up to the first token that carries loss in any
    of them, is laid once: its keys, values and hidden states do not depend on what follows.

    Args:
        examples: each with at least one token that carries loss (the first of an example cannot).
    """
    prefix = _shared_tokens(examples)
    row = Row(list(examples[0].input_ids[:prefix]), list(range(prefix)), [], [], [])
    if prefix:
        row.segments.append(Segment(0, prefix, 0))
    for example in examples:
        start = len(row.input_ids)
        places = [place for place, carries in enumerate(example.loss_mask) if carries and place]
        end = places[-1]
        row.input_ids.extend(example.input_ids[prefix:end])
        row.position_ids.extend(range(prefix, end))
        if end > prefix:
            row.segments.append(Segment(start, end - prefix, prefix))
        shift = start - prefix
        row.sources.extend(place - 1 if place <= prefix else place - 1 + shift for place in places)
        row.labels.extend(example.input_ids[place] for place in places)
    return row


def gather(examples: Iterable[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Put examples together for `lay_row`, in the order they come, up to `max_tokens` a row.

    A longer example is alone; one without a token that carries loss is left out.
    """
    row: list[Example] = []
    num_tokens = 0
    for example in examples:
        length = last_loss_place(example)
        if not length:
            continue
        if row and num_tokens + length > max_tokens:
            yield row
            row, num_tokens = [], 0
        row.append(example)
        num_tokens += length
    if row:
        yield row


def num_row_tokens(examples: Sequence[Example]) -> int:
    """Return the length of the row that `lay_row` makes of examples."""
    prefix = _shared_tokens(examples)
    return prefix + sum(last_loss_place(example) - prefix for example in examples)


def last_loss_place(example: Example) -> int:
    """Return the place of the last token that carries loss; 0 for none."""
    place = len(example.loss_mask) - 1
    while place > 0 and not example.loss_mask[place]:
        place -= 1
    return max(place, 0)


def deal(examples: Sequence[Example], hands: int) -> list[list[Example]]:
    """Deal examples into so many hands of about the same number of tokens; some may be empty.

    The longest goes first, each to the hand with the fewest tokens. The same examples in the same
    order are dealt the same way.
    """
    dealt: list[list[Example]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        place = totals.index(min(totals))
        dealt[place].append(example)
        totals[place] += len(example.input_ids)
    return dealt


def _shared_tokens(examples: Sequence[Example]) -> int:
    """Return how many tokens are worth laying once."""
    if len(examples) < 2:
        return 0
    first = examples[0]
    most = min(_first_loss_place(example) for example in examples)
    count = 0
    while count < most and all(
        example.input_ids[count] == first.input_ids[count] for example in examples
    ):
        count += 1
    return count if count >= MIN_SHARED_TOKENS else 0


def _first_loss_place(example: Example) -> int:
    return next(place for place, carries in enumerate(example.loss_mask) if carries and place)
