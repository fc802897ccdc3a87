"""Lanes: tasks at the same time, results in order, errors when all have ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from outcrop.models.lanes import Lanes

WAIT = 30.0


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    found = Lanes(3)
    yield found
    found.close()


def test_results_come_in_the_order_of_the_tasks(lanes: Lanes) -> None:
    done = [threading.Event() for _ in range(3)]

    def task(number: int) -> Callable[[], int]:
        def run() -> int:
            # Each waits for the one after it, so that they end in the opposite order.
            if number < 2:
                assert done[number + 1].wait(WAIT)
            done[number].set()
            return number

        return run

    assert lanes.run([task(number) for number in range(3)]) == [0, 1, 2]


def test_tasks_run_at_the_same_time_each_in_a_thread_of_its_own(lanes: Lanes) -> None:
    meeting = threading.Barrier(3, timeout=WAIT)

    def task() -> tuple[int, int]:
        meeting.wait()
        return threading.get_ident(), torch.get_num_threads()

    found = lanes.run([task] * 3)
    assert len({thread for thread, _ in found}) == 3
    assert threading.get_ident() not in {thread for thread, _ in found}
    assert {count for _, count in found} == {1}


def test_the_first_error_is_raised_when_all_have_ended(lanes: Lanes) -> None:
    ended, go = [], threading.Event()

    def fails_late() -> None:
        assert go.wait(WAIT)
        ended.append("late")
        raise ValueError("of the first task")

    def fails_soon() -> None:
        go.set()
        raise KeyError("of the second task")

    def works() -> None:
        assert go.wait(WAIT)
        ended.append("works")

    with pytest.raises(ValueError, match="of the first task"):
        lanes.run([fails_late, fails_soon, works])
    assert sorted(ended) == ["late", "works"]
    assert lanes.run([lambda: 1, lambda: 2]) == [1, 2]


def test_a_single_task_runs_in_the_callers_thread_with_all_its_threads() -> None:
    torch.set_num_threads(2)
    lanes = Lanes(2)
    try:
        lanes.run([lambda: None, lambda: None])
        found = lanes.run([lambda: (threading.get_ident(), torch.get_num_threads())])
    finally:
        lanes.close()
    assert found == [(threading.get_ident(), 2)]


def test_one_lane_has_no_threads_and_runs_tasks_one_after_the_other() -> None:
    before = threading.active_count()
    lanes, seen = Lanes(1), []

    def task(number: int) -> Callable[[], None]:
        return lambda: seen.append((number, threading.get_ident()))

    lanes.run([task(number) for number in range(3)])
    lanes.close()
    assert seen == [(number, threading.get_ident()) for number in range(3)]
    assert threading.active_count() == before


def test_the_threads_end_when_the_lanes_are_closed() -> None:
    before = set(threading.enumerate())
    lanes = Lanes(2)
    lanes.run([lambda: None, lambda: None])
    lanes.close()
    assert set(threading.enumerate()) == before


def test_no_tasks_give_no_results(lanes: Lanes) -> None:
    assert lanes.run([]) == []
