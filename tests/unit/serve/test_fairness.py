"""Whose turn it is: reservations have what they bought, and all others share the rest evenly.

A small machine is simulated: its clock goes on by one second a pass, and each active request then
gets one token. Nothing here has an engine, weights or threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outcrop.errors import ThrottlingException
from outcrop.serve.fairness import (
    BATCH,
    MAX_DEBT_SECONDS,
    ON_DEMAND,
    PROVISIONED,
    FairQueue,
    Limits,
)
from outcrop.serve.request import Owner
from outcrop.serve.sharing import max_min

ANNA, BERT, CARL = (Owner(name, "model") for name in ("anna", "bert", "carl"))


class Machine:
    """A queue, a clock, and answers of known lengths."""

    def __init__(self, **limits: int) -> None:
        self.limits = Limits(**limits)
        self.now = 0.0
        # A token a second in each slot.
        self.queue = FairQueue(
            self.limits, rate=lambda: float(self.limits.slots), clock=lambda: self.now
        )
        self.left: dict[int, int] = {}
        self.owners: dict[int, Owner] = {}
        self.served: Counter[Owner] = Counter()
        self.ended: list[int] = []
        self.num_preempted = 0
        self._numbers = iter(range(1, 1_000_000))

    def ask(self, owner: Owner, length: int) -> int:
        number = next(self._numbers)
        displaced = self.queue.enter(number, owner)
        if displaced is not None:
            del self.left[displaced]
        self.left[number], self.owners[number] = length, owner
        return number

    def admit(self) -> None:
        while (number := self.queue.next()) is not None:
            if self.queue.num_active == self.limits.slots:
                victim = self.queue.victim(number)
                if victim is None:
                    return
                self.queue.put_back(victim)
                self.num_preempted += 1
            self.queue.admit(number)

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.admit()
            self.now += 1.0
            for number in self.queue.order():
                self.queue.charge(number, 1.0)
                self.served[self.owners[number]] += 1
                self.left[number] -= 1
                if not self.left[number]:
                    self.queue.leave(number)
                    del self.left[number]
                    self.ended.append(number)

    def active(self, owner: Owner) -> int:
        return sum(self.owners[number] == owner for number in self.queue.active)


def reserved(units: int = 1, name: str = "throughput") -> Owner:
    return Owner("owner", "custom", name, units)


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=60)
LONGEST = 12


@settings(max_examples=60, deadline=None)
@given(
    st.lists(LENGTHS, min_size=2, max_size=5),
    st.integers(1, 8),
    st.integers(1, 100),
    st.booleans(),
)
def test_whoever_wants_more_gets_as_much_as_all_others_that_do(
    wanted: Sequence[list[int]], slots: int, seconds: int, among_models: bool
) -> None:
    machine = Machine(slots=slots, max_waiting=10_000)
    owners = [
        Owner("anna", f"model {place}") if among_models else Owner(f"account {place}", "model")
        for place in range(len(wanted))
    ]
    for owner, lengths in zip(owners, wanted, strict=True):
        for length in lengths:
            machine.ask(owner, length)
    machine.run(seconds)
    total = sum(machine.served.values())
    fair = max_min(
        {str(owner): sum(each) for owner, each in zip(owners, wanted, strict=True)}, total
    )
    for owner in owners:
        # What is in the slots at one time is not fluid: an answer for each of them, at most.
        assert abs(machine.served[owner] - fair[str(owner)]) <= LONGEST * slots
    if not machine.left:
        assert total == sum(sum(lengths) for lengths in wanted)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(2, 8), st.integers(0, 30))
def test_a_flood_of_one_account_does_not_hold_up_another(
    lengths: list[int], slots: int, later: int
) -> None:
    machine = Machine(slots=slots)
    for _ in range(200):
        machine.ask(ANNA, 1000)
    machine.run(later)
    lengths = lengths[:20]
    for length in lengths:
        machine.ask(BERT, length)
    machine.admit()
    assert machine.active(BERT) == min(len(lengths), slots // 2)
    machine.run(sum(lengths))
    assert not [number for number in machine.left if machine.owners[number] == BERT]


def test_without_others_an_account_has_every_slot_and_every_request_ends_in_its_turn() -> None:
    machine = Machine(slots=4)
    numbers = [machine.ask(ANNA, 3) for _ in range(20)]
    machine.run(1)
    assert machine.active(ANNA) == 4
    machine.run(14)
    assert machine.ended == numbers
    assert machine.num_preempted == 0


def test_who_gives_a_slot_up_goes_on_before_those_that_came_after_it() -> None:
    machine = Machine(slots=2)
    first, second, third = (machine.ask(ANNA, 4) for _ in range(3))
    machine.run(1)
    other = machine.ask(BERT, 1)
    machine.run(1)
    assert machine.ended == [other]
    machine.run(20)
    assert machine.num_preempted == 1, "the youngest gave its slot up, and nobody else did"
    assert machine.ended == [other, first, second, third]


def test_nobody_saves_turns_up_and_nobody_pays_for_having_been_alone() -> None:
    machine = Machine(slots=2, max_waiting=1000)
    for _ in range(300):
        machine.ask(ANNA, 10)
    machine.run(500)
    for _ in range(300):
        machine.ask(BERT, 10)
    before = machine.served.copy()
    machine.run(500)
    assert abs((machine.served[ANNA] - before[ANNA]) - machine.served[BERT]) <= 20

    machine = Machine(slots=2)
    machine.ask(ANNA, 500)
    machine.run(500)
    assert not machine.left
    for owner in (BERT, ANNA) * 50:
        machine.ask(owner, 10)
    before = machine.served.copy()
    machine.run(100)
    assert abs((machine.served[ANNA] - before[ANNA]) - machine.served[BERT]) <= 20


def test_a_reservation_has_its_slots_at_once_whoever_borrowed_them() -> None:
    machine = Machine(slots=8)
    for owner in (ANNA, ANNA, ANNA, BERT) * 10:
        machine.ask(owner, 1000)
    machine.run(3)
    assert machine.queue.num_active == 8, "what a reservation does not use is lent"
    for _ in range(10):
        machine.ask(reserved(), 1000)
    machine.admit()
    assert machine.active(reserved()) == 4
    assert (machine.active(ANNA), machine.active(BERT)) == (2, 2)
    assert machine.queue.order()[:4] == sorted(machine.queue.within_reservations())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(20, 200), st.integers(1, 40))
def test_a_reservation_gets_its_part_of_the_rate_and_others_the_rest(
    units: int, seconds: int, length: int
) -> None:
    machine = Machine(slots=8, units=4, burst_seconds=30)
    share = units / 4
    for _ in range(256):
        machine.ask(ANNA, 1000)
    for _ in range(seconds):
        try:
            while machine.queue.counts(PROVISIONED)[1] < 8:
                machine.ask(reserved(units), length)
        except ThrottlingException:
            pass
        machine.run(1)
    own, rate = machine.served[reserved(units)], 8 * share
    slack = rate * MAX_DEBT_SECONDS + length * 8
    assert own >= rate * seconds - slack
    if units < 4:
        assert machine.served[ANNA] >= (8 - rate) * seconds - slack
    assert own + machine.served[ANNA] == 8 * seconds, "no slot is empty while somebody waits"


def test_beyond_its_rate_a_reservation_is_refused_and_told_when_to_ask_again() -> None:
    machine = Machine(slots=8, burst_seconds=10)
    rate = 4
    for _ in range(rate):
        machine.ask(reserved(), 10 * rate)
    machine.run(40)  # more at a time than it bought, for nobody else wants it
    while not machine.left:
        for _ in range(16):
            try:
                machine.ask(reserved(), 100)
            except ThrottlingException:
                break
        machine.run(1)
    machine.run(60)
    with pytest.raises(ThrottlingException, match=r"1 model unit .* 4 tokens a second") as caught:
        machine.ask(reserved(), 1)
    seconds = caught.value.members["retryAfterSeconds"]
    assert isinstance(seconds, float)
    assert 0 < seconds <= MAX_DEBT_SECONDS + 1 / rate
    assert machine.queue.used() == {"throughput": 1.0}
    assert machine.queue.num_throttled[PROVISIONED] > 0
    for number in list(machine.left):
        machine.queue.leave(number)
        del machine.left[number]
    machine.now += seconds
    machine.ask(reserved(), 1)
    machine.ask(ANNA, 1)


def test_more_model_units_are_more_tokens() -> None:
    served = []
    for units in (1, 2, 4):
        machine = Machine(slots=8, units=4, burst_seconds=1)
        for _ in range(200):
            machine.ask(ANNA, 1000)
        for _ in range(100):
            try:
                while machine.queue.counts(PROVISIONED)[1] < 8:
                    machine.ask(reserved(units), 2)
            except ThrottlingException:
                pass
            machine.run(1)
        served.append(machine.served[reserved(units)])
    one, two, four = served
    assert two == pytest.approx(2 * one, rel=0.15)
    assert four == pytest.approx(4 * one, rel=0.15)


def test_a_reservation_may_have_more_than_it_bought_while_nobody_else_wants_it() -> None:
    machine = Machine(slots=8)
    for _ in range(8):
        machine.ask(reserved(), 1000)
    machine.run(1)
    assert machine.active(reserved()) == 8
    for _ in range(8):
        machine.ask(ANNA, 1000)
    machine.admit()
    assert (machine.active(reserved()), machine.active(ANNA)) == (4, 4)
    machine.run(60)  # its rate is used up meanwhile: it counts as one among those that share
    assert (machine.active(reserved()), machine.active(ANNA)) == (4, 4)


def test_requests_of_a_reservation_wait_up_to_its_part_of_the_queue() -> None:
    machine = Machine(slots=2, max_waiting=4)
    for _ in range(2):
        machine.ask(reserved(), 10)
    with pytest.raises(ThrottlingException, match="2 are waiting for the 1 model unit") as caught:
        machine.ask(reserved(), 10)
    assert caught.value.members["retryAfterSeconds"] == 1.0
    machine.ask(reserved(2, "other"), 10)
    machine.ask(ANNA, 10)


def test_in_a_full_queue_whoever_has_most_in_it_gives_way() -> None:
    machine = Machine(slots=1, max_waiting=4)
    numbers = [machine.ask(ANNA, 10) for _ in range(4)]
    with pytest.raises(ThrottlingException, match="4 are waiting"):
        machine.ask(ANNA, 10)
    machine.ask(BERT, 10)
    assert numbers[3] not in machine.queue
    machine.ask(CARL, 10)
    assert numbers[2] not in machine.queue
    with pytest.raises(ThrottlingException):
        machine.ask(BERT, 10)
    assert machine.queue.counts(ON_DEMAND) == (0, 4)
    assert machine.queue.num_throttled[ON_DEMAND] == 4


def test_where_more_was_sold_than_there_is_reservations_share_it() -> None:
    machine = Machine(slots=4, units=1, burst_seconds=1)
    names = [reserved(1, "a"), reserved(1, "b")]
    for _ in range(200):
        for owner in names:
            try:
                machine.ask(owner, 2)
            except ThrottlingException:
                continue
        machine.run(1)
    a, b = (machine.served[owner] for owner in names)
    assert a + b >= 4 * 180
    assert a == pytest.approx(b, rel=0.15)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([ANNA, BERT, reserved()]), st.integers(1, 9)), max_size=80)
)
def test_the_same_requests_are_served_in_the_same_order_each_time(
    asked: list[tuple[Owner, int]],
) -> None:
    def run() -> list[int]:
        machine = Machine(slots=3)
        for owner, length in asked:
            machine.ask(owner, length)
            machine.run(1)
        machine.run(1000)
        return machine.ended

    assert run() == run()
    assert len(run()) == len(asked)


def _owners() -> Iterator[Owner]:
    for account in ("anna", "bert"):
        for model in ("x", "y"):
            yield Owner(account, model)
    yield reserved(1, "one")
    yield reserved(2, "two")


class Turns(RuleBasedStateMachine):
    """Requests come, go, are cancelled and put back in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(slots=3, max_waiting=6, units=3)
        self.refused = 0

    @rule(owner=st.sampled_from(list(_owners())), length=st.integers(1, 20))
    def ask(self, owner: Owner, length: int) -> None:
        try:
            self.machine.ask(owner, length)
        except ThrottlingException as error:
            self.refused += 1
            seconds = error.members["retryAfterSeconds"]
            assert isinstance(seconds, float)
            assert 0 < seconds <= MAX_DEBT_SECONDS + 1

    @rule(seconds=st.integers(1, 5))
    def run(self, seconds: int) -> None:
        self.machine.run(seconds)

    @precondition(lambda self: self.machine.left)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.machine.left)))
        self.machine.queue.leave(number)
        del self.machine.left[number]

    @precondition(lambda self: self.machine.queue.active)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.machine.queue.put_back(data.draw(st.sampled_from(self.machine.queue.active)))

    @invariant()
    def nobody_is_lost_and_no_slot_is_used_twice(self) -> None:
        queue = self.machine.queue
        counts = [queue.counts(name) for name in (PROVISIONED, ON_DEMAND)]
        assert sum(active for active, _ in counts) == queue.num_active <= 3
        assert queue.num_active + queue.num_waiting == len(self.machine.left)
        assert len(set(queue.active)) == queue.num_active
        assert sorted(queue.order()) == sorted(queue.active)
        assert counts[1][1] <= 6 + 3, "what was put back may be beyond the queue's end"

    @invariant()
    def somebody_is_next_while_somebody_waits(self) -> None:
        assert (self.machine.queue.next() is None) == (self.machine.queue.num_waiting == 0)

    @invariant()
    def refusals_are_counted(self) -> None:
        assert sum(self.machine.queue.num_throttled.values()) >= self.refused


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


ANNAS_JOB, BERTS_JOB = (Owner(name, "model", batch=True) for name in ("anna", "bert"))


def test_batch_jobs_fill_an_idle_machine_and_give_slots_back_at_once() -> None:
    machine = Machine(slots=64)
    for _ in range(80):
        machine.ask(ANNAS_JOB, 1000)
    machine.run(3)
    assert machine.active(ANNAS_JOB) == 64
    for _ in range(70):
        machine.ask(BERT, 1000)
    machine.admit()
    assert (machine.active(BERT), machine.active(ANNAS_JOB)) == (60, 4)
    assert machine.queue.order()[-4:] == [1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 64), st.integers(1, 90), st.integers(1, 6))
def test_a_batch_job_ends_on_a_machine_that_is_never_idle(
    slots: int, num_people: int, num_jobs: int
) -> None:
    machine = Machine(slots=slots, max_waiting=10_000)
    for _ in range(num_people):
        machine.ask(ANNA, 100_000)
    machine.run(2)
    for _ in range(num_jobs):
        machine.ask(BERTS_JOB, 3)
    machine.run(3 * num_jobs + 1)
    assert not [number for number in machine.left if machine.owners[number] == BERTS_JOB]
    assert machine.active(ANNA) == min(num_people, slots)


def test_a_reservation_has_its_slots_whatever_batch_jobs_want() -> None:
    machine = Machine(slots=8)
    for _ in range(20):
        machine.ask(ANNAS_JOB, 1000)
    machine.run(1)
    for _ in range(4):
        machine.ask(reserved(), 10)
    machine.admit()
    assert machine.active(reserved()) == 4
    assert machine.queue.counts(BATCH) == (4, 16)


def test_batch_jobs_of_two_accounts_share_what_is_left() -> None:
    machine = Machine(slots=8)
    for owner in (ANNAS_JOB, BERTS_JOB):
        for _ in range(20):
            machine.ask(owner, 6)
    machine.run(12)
    assert machine.served[ANNAS_JOB] == machine.served[BERTS_JOB]


def test_batch_requests_that_wait_take_no_place_of_others() -> None:
    machine = Machine(slots=1, max_waiting=2)
    for _ in range(2):
        machine.ask(ANNAS_JOB, 1000)
    with pytest.raises(ThrottlingException):
        machine.ask(ANNAS_JOB, 1)
    machine.ask(BERT, 1)
    machine.ask(BERT, 1)
    assert machine.queue.counts(ON_DEMAND) == (0, 2)
    assert machine.queue.num_throttled == {BATCH: 1}
