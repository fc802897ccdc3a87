"""The rows of a pass: all are used, and no account's prompt holds up another's."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.serve.sharing import (
    LEAST_ROWS,
    batch_beside,
    max_min,
    rows_beside,
    share_prompts,
    share_room,
)

PROMPTS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 9000)), max_size=30)


@given(st.lists(st.integers(1, 400), max_size=20), st.integers(1, 256))
def test_a_pass_is_filled_and_no_prompt_takes_more_than_it_has(
    lengths: list[int], room: int
) -> None:
    shares = share_room(lengths, room)
    assert sum(shares) == min(room, sum(lengths))
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    if lengths:
        assert shares[0] >= min(lengths[0], room // 4)


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [([256, 256], [256, 0]), ([8000, 100], [156, 100]), ([100, 8000, 50], [100, 106, 50])],
)
def test_short_prompts_do_not_wait_for_long_ones(lengths: list[int], shares: list[int]) -> None:
    assert share_room(lengths, 256) == shares


@given(st.dictionaries(st.text(max_size=2), st.integers(0, 500), max_size=9), st.integers(0, 999))
def test_nobody_who_wants_more_gets_less_than_another(wanted: dict[str, int], room: int) -> None:
    given_to = max_min(wanted, room)
    assert sum(given_to.values()) == min(room, sum(wanted.values()))
    most = max(given_to.values(), default=0)
    for name, rows in given_to.items():
        assert 0 <= rows <= wanted[name]
        if rows < wanted[name]:
            assert rows >= most - 1


@given(PROMPTS, st.integers(1, 512))
def test_prompts_of_all_accounts_have_an_even_part_of_a_pass(
    prompts: list[tuple[str, int]], room: int
) -> None:
    shares = share_prompts(prompts, room)
    assert sum(shares) == min(room, sum(length for _, length in prompts))
    assert all(0 <= share <= length for share, (_, length) in zip(shares, prompts, strict=True))
    for account in {account for account, _ in prompts}:
        own = sum(s for s, (owner, _) in zip(shares, prompts, strict=True) if owner == account)
        wanted = sum(length for owner, length in prompts if owner == account)
        assert own >= min(wanted, room // len({owner for owner, _ in prompts}))


def test_a_huge_prompt_leaves_room_for_those_of_other_accounts() -> None:
    assert share_prompts([("a", 8000), ("b", 300), ("a", 8000)], 256) == [128, 128, 0]
    assert share_prompts([("a", 8000), ("b", 40)], 256) == [216, 40]
    assert share_prompts([("a", 8000), ("a", 40)], 256) == share_room([8000, 40], 256)


@given(st.integers(1, 64), st.floats(0, 64), st.floats(0.05, 1))
def test_beside_a_reservation_a_pass_costs_no_more_than_one_of_answers(
    slots: int, cost: float, prompt_cost: float
) -> None:
    rows = rows_beside(slots, cost, prompt_cost)
    assert rows >= LEAST_ROWS
    assert rows == LEAST_ROWS or cost + rows * prompt_cost <= slots + 1e-9


def test_beside_others_every_batch_request_takes_part_in_its_turn() -> None:
    numbers = list(range(40))
    assert batch_beside(numbers[:16], 64, 5) == set(numbers[:16])
    passes = [batch_beside(numbers, 64, turn) for turn in range(40)]
    assert {len(taken) for taken in passes} == {16}
    counts = Counter(number for taken in passes for number in taken)
    assert set(counts.values()) == {16}
