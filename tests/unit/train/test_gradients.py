"""How a batch is cut into waves of rows, and what comes of it."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.assets.architectures import ARCHITECTURES
from tests.assets.tiny_examples import tiny_examples
from tests.numerics.test_architectures import plan

from outcrop.data.pack import last_loss_place, num_row_tokens
from outcrop.data.records import Example
from outcrop.errors import EmptyLossError, NonFiniteLossError, StopRequested
from outcrop.models.lanes import Lanes
from outcrop.train.gradients import gather_gradients, micro_batches, waves
from outcrop.train.methods import Trainable, make_trainable
from outcrop.train.portions import Portions

BATCHES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(
        lambda drawn: Example(
            list(range(drawn[0])), [place == drawn[1] for place in range(drawn[0])]
        )
    ),
    max_size=12,
)
"""Records that begin alike, each with one token that carries loss or with none."""


def some_lanes(count: int) -> Lanes:
    """Lanes whose threads are never started."""
    lanes = Lanes(1)
    lanes.count = count
    return lanes


@given(BATCHES, st.integers(1, 100), st.integers(1, 4))
@settings(deadline=None)
def test_every_record_with_loss_is_in_one_wave(
    batch: list[Example], tokens: int, count: int
) -> None:
    found = waves(batch, Portions(tokens), some_lanes(count))
    dealt = [example for wave in found for hand in wave for example in hand]
    useful = [example for example in batch if any(example.loss_mask[1:])]
    assert sorted(map(id, dealt)) == sorted(map(id, useful))
    assert all(hand for wave in found for hand in wave)
    assert waves(batch, Portions(tokens), some_lanes(count)) == found


@given(BATCHES, st.integers(1, 100), st.integers(1, 4))
@settings(deadline=None)
def test_a_wave_has_no_more_hands_than_lanes_nor_tokens_than_allowed(
    batch: list[Example], tokens: int, count: int
) -> None:
    limit = max(1, tokens // count)
    for wave in waves(batch, Portions(tokens), some_lanes(count)):
        assert 1 <= len(wave) <= count
        costs = [num_row_tokens(hand) for hand in wave]
        if len(wave) == 1 and len(wave[0]) == 1:
            continue  # a record longer than a lane's share is alone, whatever its length
        assert sum(costs) <= max(tokens, count)
        assert max(costs) <= limit or len(wave) == 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_of_one_record_is_one_wave_for_all_threads(count: int) -> None:
    (example,) = tiny_examples(1)
    for tokens in (1, 10, 1000):
        assert waves([example], Portions(tokens), some_lanes(count)) == [[[example]]]


def test_what_cannot_be_dealt_evenly_is_one_row_for_all_threads() -> None:
    long, short = (Example([5] * n, [False] + [True] * (n - 1)) for n in (90, 10))
    assert waves([long, short], Portions(1000), some_lanes(2)) == [[[long, short]]]
    assert waves([long, long], Portions(1000), some_lanes(2)) == [[[long], [long]]]


def test_a_record_too_long_for_a_lane_is_a_wave_of_its_own() -> None:
    long, short = (Example([5] * n, [False] + [True] * (n - 1)) for n in (90, 10))
    found = waves([short, long, *[short] * 3], Portions(60), some_lanes(2))
    assert found[0] == [[long]]
    assert sorted(len(hand) for wave in found[1:] for hand in wave) == [2, 2]


def test_records_without_loss_are_in_no_wave() -> None:
    nothing = [Example([5, 6, 7], [True, False, False]), Example([5], [True]), Example([], [])]
    assert waves(nothing, Portions(), some_lanes(2)) == []


def trainable(name: str = "llama", dtype: torch.dtype = torch.float32) -> Trainable:
    architecture = ARCHITECTURES[name]
    model = architecture.model(dtype=dtype)
    return make_trainable(model, plan(architecture, "adapter"), 0)


BOTH = pytest.mark.parametrize("name", ["llama", "gpt2"])


@BOTH
def test_lengths_of_micro_batches_are_those_of_what_is_computed(name: str) -> None:
    batch, portions = tiny_examples(8), Portions(40)
    found = micro_batches(trainable(name), batch, portions, some_lanes(2))
    if name == "llama":
        assert sorted(n for lengths in found for n in lengths) == sorted(
            map(last_loss_place, batch)
        )
    else:
        assert [n for lengths in found for n in lengths] == [len(e.input_ids) for e in batch]
    assert len(found) > 1


@BOTH
def test_a_batch_without_loss_is_refused(name: str) -> None:
    with pytest.raises(EmptyLossError, match="no token of its records carries loss"):
        gather_gradients(trainable(name), [Example([5, 6], [True, False])])


@BOTH
def test_a_loss_that_is_no_number_is_refused(name: str) -> None:
    found = trainable(name)
    head = found.model.get_output_embeddings().weight
    with torch.no_grad():
        head[7] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the training loss became nan"):
        gather_gradients(found, tiny_examples(3))


@BOTH
def test_a_stop_is_heard_before_each_micro_batch_at_least(name: str) -> None:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    with pytest.raises(StopRequested):
        gather_gradients(trainable(name), tiny_examples(8), Portions(20), should_stop)
    assert asked == 4


@BOTH
def test_a_stop_is_heard_within_a_long_row(name: str) -> None:
    """Before each of the two layers of both passes, and before the row."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return False

    found = trainable(name)
    gather_gradients(found, tiny_examples(1), Portions(), should_stop)
    assert asked == 5
    for stop in range(1, 6):
        answers = iter([False] * (stop - 1) + [True])
        with pytest.raises(StopRequested):
            gather_gradients(found, tiny_examples(1), Portions(), partial(next, answers))


@BOTH
def test_an_interrupted_batch_leaves_no_trace_in_the_next(name: str) -> None:
    found, fresh, batch = trainable(name), trainable(name), tiny_examples(8)
    lanes = Lanes(2)
    answers = iter([False] * 3 + [True] * 100)
    with pytest.raises(StopRequested):
        gather_gradients(found, batch, Portions(20), lambda: next(answers), lanes)
    found.drop_gradients()
    one = gather_gradients(found, batch, Portions(20), lanes=lanes)
    other = gather_gradients(fresh, batch, Portions(20), lanes=lanes)
    lanes.close()
    assert one == other
    for master, same in zip(found.masters, fresh.masters, strict=True):
        assert master.grad is not None
        assert same.grad is not None
        assert torch.equal(master.grad, same.grad)


@BOTH
def test_the_same_batch_twice_gives_the_same_bits(name: str) -> None:
    results = []
    for _ in range(2):
        found, lanes = trainable(name), Lanes(2)
        loss, _ = gather_gradients(found, tiny_examples(8), Portions(60), lanes=lanes)
        lanes.close()
        grads = [master.grad for master in found.masters]
        results.append((loss, torch.cat([grad.flatten() for grad in grads if grad is not None])))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_gradients_of_batches_add_up() -> None:
    batch = tiny_examples(4)
    once, twice = trainable(dtype=torch.float64), trainable(dtype=torch.float64)
    gather_gradients(once, batch)
    doubled = [dataclasses.replace(example) for example in (*batch, *batch)]
    gather_gradients(twice, doubled)
    torch.testing.assert_close(once.masters[0].grad, twice.masters[0].grad)
