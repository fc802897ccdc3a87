"""Packing loses nothing, keeps the order, and never lets one example predict another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.pack import IGNORE_INDEX, pack
from outcrop.data.records import Example

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
