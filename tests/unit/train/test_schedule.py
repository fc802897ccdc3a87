"""Learning rates and moments of evaluation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.train.schedule import EVALUATIONS_PER_EPOCH, evaluation_steps, learning_rate


def test_rate_rises_to_the_peak_and_falls_towards_zero() -> None:
    rates = [learning_rate(step, 10, 4, 1.0) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, 50, 0, 3e-4) == 3e-4


@given(st.integers(1, 300), st.integers(0, 250))
def test_no_step_is_without_effect_and_none_is_above_the_peak(total: int, warmup: int) -> None:
    for step in range(total):
        assert 0 < learning_rate(step, total, warmup, 2.0) <= 2.0


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 1000))
def test_each_epoch_ends_with_an_evaluation_and_has_few(
    steps: int, batch_size: int, validation: int
) -> None:
    points = evaluation_steps(steps, batch_size, validation)
    assert steps in points
    assert len(points) <= EVALUATIONS_PER_EPOCH
    assert all(0 < point <= steps for point in points)


def test_one_short_epoch_is_still_seen_several_times() -> None:
    assert evaluation_steps(100, 8, 100) == {25, 50, 75, 100}


def test_much_validation_data_is_evaluated_rarely() -> None:
    assert evaluation_steps(100, 8, 200) == {50, 100}
    assert evaluation_steps(100, 8, 1000) == {100}


def test_without_validation_data_there_is_no_evaluation() -> None:
    assert evaluation_steps(100, 8, 0) == set()
