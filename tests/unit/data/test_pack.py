"""Packing loses nothing, keeps the order, and never lets one example predict another.

So do rows in which what examples have in common is laid once.
"""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.pack import (
    IGNORE_INDEX,
    MIN_SHARED_TOKENS,
    deal,
    gather,
    last_loss_place,
    lay_row,
    num_row_tokens,
    pack,
)
from outcrop.data.records import Example
from outcrop.models.rows import Row, Segment

EXAMPLES = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12).map(
        lambda pairs: Example([token for token, _ in pairs], [carries for _, carries in pairs])
    ),
    max_size=12,
)


@given(EXAMPLES, st.integers(1, 20))
def test_every_token_is_packed_once_and_in_order(examples: list[Example], limit: int) -> None:
    batches = list(pack(examples, limit))
    assert [token for batch in batches for token in batch.input_ids] == [
        token for example in examples for token in example.input_ids
    ]
    assert [length for batch in batches for length in batch.lengths] == [
        len(example.input_ids) for example in examples if example.input_ids
    ]
    for batch in batches:
        assert len(batch.input_ids) <= limit or len(batch.lengths) == 1
        assert batch.position_ids == [place for length in batch.lengths for place in range(length)]


@given(EXAMPLES, st.integers(1, 20))
def test_labels_are_the_tokens_that_carry_loss(examples: list[Example], limit: int) -> None:
    labels = [label for batch in pack(examples, limit) for label in batch.labels]
    assert labels == [
        token if carries and place else IGNORE_INDEX
        for example in examples
        for place, (token, carries) in enumerate(
            zip(example.input_ids, example.loss_mask, strict=True)
        )
    ]


def test_rows_are_filled_as_long_as_the_next_example_fits() -> None:
    examples = [Example([1] * length, [True] * length) for length in (3, 3, 4, 9, 1)]
    assert [batch.lengths for batch in pack(examples, 10)] == [[3, 3, 4], [9, 1]]


def test_an_example_above_the_limit_is_a_row_of_its_own() -> None:
    examples = [Example([1] * length, [True] * length) for length in (2, 30, 2)]
    assert [batch.lengths for batch in pack(examples, 10)] == [[2], [30], [2]]


WITH_LOSS = st.tuples(
    st.lists(st.integers(0, 9), max_size=8),
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.lists(st.booleans(), max_size=12)),
        min_size=1,
        max_size=6,
    ),
).map(lambda drawn: [_example(drawn[0], rest, mask) for rest, mask in drawn[1]])
"""Examples that may begin alike, each with at least one token that carries loss."""


def _example(beginning: list[int], rest: list[int], mask: list[bool]) -> Example:
    ids = [*beginning, *rest, 1, 2]
    carries = [*mask, *[False] * len(ids)][: len(ids)]
    if not any(carries[1:]):
        carries[-1] = True
    return Example(ids, carries)


def _contexts(row: Row) -> list[list[int]]:
    """What each source can see: the tokens at the start of its record, up to itself."""
    found = []
    for source in row.sources:
        (segment,) = [
            part for part in row.segments if part.start <= source < part.start + part.length
        ]
        own = range(segment.start, source + 1)
        found.append([row.input_ids[place] for place in (*range(segment.prefix), *own)])
    return found


@given(WITH_LOSS)
def test_every_token_that_carries_loss_is_predicted_once_from_all_before_it(
    examples: list[Example],
) -> None:
    row = lay_row(examples)
    wanted = [
        (example.input_ids[:place], example.input_ids[place])
        for example in examples
        for place, carries in enumerate(example.loss_mask)
        if carries and place
    ]
    assert list(zip(_contexts(row), row.labels, strict=True)) == wanted


@given(WITH_LOSS)
def test_a_rows_segments_follow_each_other_and_places_are_those_in_the_record(
    examples: list[Example],
) -> None:
    row = lay_row(examples)
    end = 0
    for segment in row.segments:
        assert segment.start == end
        assert segment.length > 0
        end += segment.length
        places = row.position_ids[segment.start : end]
        assert places == list(range(segment.prefix, segment.prefix + segment.length))
    assert end == len(row.input_ids) == len(row.position_ids) == num_row_tokens(examples)
    assert {segment.prefix for segment in row.segments[1:]} <= {row.segments[-1].prefix}


@given(WITH_LOSS)
def test_what_is_laid_once_carries_no_loss_and_what_nothing_depends_on_is_left_out(
    examples: list[Example],
) -> None:
    row = lay_row(examples)
    last = [max(p for p, carries in enumerate(e.loss_mask) if carries and p) for e in examples]
    assert [last_loss_place(example) for example in examples] == last
    is_shared = len(row.input_ids) < sum(last)
    prefix = row.segments[0].length if is_shared else 0
    assert len(row.input_ids) == sum(last) - prefix * (len(last) - 1)
    assert not is_shared or prefix >= MIN_SHARED_TOKENS
    for example in examples:
        assert not any(example.loss_mask[1:prefix])
        assert example.input_ids[:prefix] == row.input_ids[:prefix]


def test_a_beginning_is_laid_once_as_far_as_all_have_it_and_none_has_loss() -> None:
    def example(ids: list[int], first_loss: int) -> Example:
        return Example(ids, [place >= first_loss for place in range(len(ids))])

    first, second = example([7, 7, 7, 7, 7, 1, 2], 5), example([7, 7, 7, 7, 7, 1, 3], 6)
    assert lay_row([first, second]).segments == [
        Segment(0, 5, 0),
        Segment(5, 1, 5),
        Segment(6, 1, 5),
    ]
    assert lay_row([first]).segments == [Segment(0, 6, 0)]
    too_little = example([7, 7, 7, 8, 8, 1], 4)
    assert [segment.prefix for segment in lay_row([first, too_little]).segments] == [0, 0]
    # Nothing of its own is left of a record whose only token with loss follows what is shared.
    ends = Example([7, 7, 7, 7, 7, 9], [False] * 5 + [True])
    row = lay_row([first, ends])
    assert row.segments == [Segment(0, 5, 0), Segment(5, 1, 5)]
    assert (row.sources, row.labels) == ([4, 5, 4], [1, 2, 9])


@given(EXAMPLES, st.integers(1, 30))
def test_gathering_keeps_the_order_and_leaves_out_what_has_no_loss(
    examples: list[Example], limit: int
) -> None:
    hands = list(gather(examples, limit))
    assert [example for hand in hands for example in hand] == [
        example for example in examples if any(example.loss_mask[1:])
    ]
    for hand in hands:
        assert len(hand) == 1 or sum(map(last_loss_place, hand)) <= limit
    for hand, after in itertools.pairwise(hands):
        assert sum(map(last_loss_place, [*hand, after[0]])) > limit


@given(EXAMPLES, st.integers(1, 5))
def test_dealing_loses_nothing_and_is_the_same_each_time(
    examples: list[Example], hands: int
) -> None:
    dealt = deal(examples, hands)
    assert len(dealt) == hands
    assert sorted(id(example) for hand in dealt for example in hand) == sorted(map(id, examples))
    assert deal(examples, hands) == dealt


@given(EXAMPLES, st.integers(1, 5))
def test_no_hand_has_more_than_its_share_and_one_example(
    examples: list[Example], hands: int
) -> None:
    lengths = [len(example.input_ids) for example in examples]
    totals = [sum(len(example.input_ids) for example in hand) for hand in deal(examples, hands)]
    assert max(totals) <= sum(lengths) / hands + max(lengths, default=0)
