"""Who is served next, who takes part in a pass first, and who gives way: policy without an engine.

A machine has slots, requests that are answered at the same time, and a rate, the tokens a second of
a full batch. A provisioned throughput of n of U units has n/U of both. Within them its requests
come before all others, and take slots back at once from whoever borrowed them. What it does not use
is lent. Beyond its rate, and what it saved up of that, new requests are refused.

Requests on demand share what is left: whoever was served least is next, first among accounts, then
among the models of one. Who comes back after a pause counts as served at least as much as the least
served one that is busy: nobody saves up, and nobody pays for having been alone. Who holds more
slots than another that waits gives one up.

Batch jobs have what nobody else wants, shared among their owners in the same way, and give it back
at once. So that they end on a machine that is never idle, a sixteenth of the slots is theirs while
they want it.

Knows numbers of requests, owners, costs and a clock. A cost is in tokens of answers; a token of a
prompt costs less. Used from one thread at a time.

Source: Sheng et al., "Fairness in Serving Large Language Models" (arXiv 2401.00588), for counters
of served tokens that are lifted; McKenney, "Stochastic Fairness Queueing" (INFOCOM 1990), for who
gives way in a full queue.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from outcrop.errors import ThrottlingException
from outcrop.serve.request import Owner

PROVISIONED, ON_DEMAND, BATCH = "provisioned", "on_demand", "batch"
CLASSES = (PROVISIONED, ON_DEMAND, BATCH)
RETRY_SECONDS = 1.0
"""When a client that found a full queue is told to ask again."""
MAX_DEBT_SECONDS = 5.0
"""A reservation whose answers went on beyond its rate pays back so much of it; the rest was lent.
So its next request is never refused for longer. Source: botocore 1.44 waits for no longer hint."""
BATCH_PART = 16
"""One slot of so many is for batch jobs while they want it: none stands still."""


@dataclass(frozen=True)
class Limits:
    """How much there is to share."""

    units: int = 2
    """Model units of the machine."""
    slots: int = 64
    """Requests that are answered at the same time."""
    max_waiting: int = 256
    """Requests on demand that may wait; a reservation has its share of as many of its own, and
    batch jobs have as many together."""
    burst_seconds: int = 30
    """A reservation that was idle for so long has saved up all that it can."""

    @property
    def batch_slots(self) -> int:
        """Slots that batch jobs have, whatever others want; of a single one, none."""
        return max(1, self.slots // BATCH_PART) if self.slots > 1 else 0

    def share(self, units: int) -> float:
        """Return which part of the machine so many units are."""
        return min(1.0, units / self.units)


@dataclass
class _Line:
    """The requests of one model of one account."""

    waiting: deque[int] = field(default_factory=deque)
    active: list[int] = field(default_factory=list)
    """The oldest first."""
    served: float = 0.0

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self.active)


@dataclass
class _Account:
    lines: dict[str, _Line] = field(default_factory=dict)
    served: float = 0.0

    @property
    def is_busy(self) -> bool:
        return any(line.is_busy for line in self.lines.values())

    @property
    def num_active(self) -> int:
        return sum(len(line.active) for line in self.lines.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(line.waiting) for line in self.lines.values())


@dataclass
class _Reservation(_Line):
    units: int = 0
    balance: float = 0.0
    """Tokens that it may still have; below 0 it is beyond its rate."""
    refilled_at: float = 0.0


class FairQueue:
    """All requests of an engine, waiting and active."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        rate: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            rate: tokens a second of answers in a full batch, as far as that is known by now.
        """
        self.limits = limits or Limits()
        self.num_throttled: Counter[str] = Counter()
        self._rate, self._clock = rate, clock
        self._owners: dict[int, Owner] = {}
        self._accounts: dict[str, _Account] = {}
        """Who asks on demand."""
        self._batch: dict[str, _Account] = {}
        """Whose batch jobs ask."""
        self._reservations: dict[str, _Reservation] = {}

    # --- requests come and go --------------------------------------------------------------------

    def check(self, owner: Owner) -> None:
        """Refuse what `enter` would refuse.

        Raises:
            ThrottlingException: `members` has `retryAfterSeconds`.
        """
        try:
            self._may_enter(owner)
        except ThrottlingException:
            self.num_throttled[class_of(owner)] += 1
            raise

    def enter(self, number: int, owner: Owner) -> int | None:
        """Let a request wait.

        Args:
            number: larger than that of every request before it.
        Returns:
            A waiting request that must give its place up for it, or None. It has left.
        Raises:
            ThrottlingException: as `check`.
        """
        self.check(owner)
        displaced = None
        if owner.reservation is None and self._is_full(owner):
            displaced = self._last_of_the_longest(owner)
        if displaced is not None:
            self.num_throttled[class_of(owner)] += 1
            self.leave(displaced)
        self._lift(owner)
        self._owners[number] = owner
        self._line(owner).waiting.append(number)
        return displaced

    def __contains__(self, number: int) -> bool:
        return number in self._owners

    def is_active(self, number: int) -> bool:
        """Return whether a request is here and active."""
        return number in self and number in self._line_of(number).active

    def admit(self, number: int) -> None:
        """Move a waiting request to the active ones."""
        line = self._line_of(number)
        line.waiting.remove(number)
        insort(line.active, number)

    def put_back(self, number: int) -> None:
        """Move an active request back: it waits before those that came after it."""
        line = self._line_of(number)
        line.active.remove(number)
        place = sum(other < number for other in line.waiting)
        line.waiting.insert(place, number)

    def leave(self, number: int) -> None:
        """Forget a request that has ended."""
        line = self._line_of(number)
        (line.active if number in line.active else line.waiting).remove(number)
        del self._owners[number]
        self._tidy()

    def charge(self, number: int, cost: float) -> None:
        """Note what was computed for an active request.

        Args:
            cost: in tokens of answers.
        """
        line = self._line_of(number)
        if isinstance(line, _Reservation):
            self._refill(line)
            debt = self._rate_of(line) * MAX_DEBT_SECONDS
            line.balance = max(line.balance - cost, -debt)
        else:
            line.served += cost
            owner = self._owners[number]
            self._group(owner)[owner.account].served += cost

    # --- who is next, and who gives way ----------------------------------------------------------

    def next(self) -> int | None:
        """Return the waiting request that is to become active before all others."""
        within = [
            line
            for line in self._reservations.values()
            if line.waiting and self._is_within(line) and len(line.active) < self._slots(line)
        ]
        if within:
            return max(within, key=self._saved).waiting[0]
        batch = _next_of(self._batch)
        if batch is not None and self.counts(BATCH)[0] < self.limits.batch_slots:
            return batch
        on_demand = _next_of(self._accounts)
        if on_demand is not None:
            return on_demand
        # Nobody else wants the slot, so a reservation may have more of them than it bought.
        beyond = [line for line in self._reservations.values() if line.waiting]
        return max(beyond, key=self._saved).waiting[0] if beyond else batch

    def within_reservations(self) -> set[int]:
        """Return the active requests that come before all others."""
        return {
            number
            for line in self._reservations.values()
            if self._is_within(line)
            for number in line.active[: self._slots(line)]
        }

    def order(self) -> list[int]:
        """Return the active requests: those within reservations first, those of batch jobs last,
        of each kind the oldest first."""
        first = self.within_reservations()
        return sorted(
            self.active, key=lambda number: (number not in first, self.is_batch(number), number)
        )

    def is_batch(self, number: int) -> bool:
        """Return whether a request is of a batch job."""
        return self._owners[number].batch

    def victim(self, number: int) -> int | None:
        """Return the active request that gives its place up for a waiting one, or None.

        The first to give way are batch jobs that have more slots than are theirs. Beyond them, for
        one within a reservation that is the youngest of whoever holds the most slots on demand,
        or outside of a reservation. For one on demand, that of a reservation with more slots than
        it bought; else only of somebody who then still has as many slots as itself: of another
        account, or of another model of its own. For one of a batch job that has fewer slots than
        are theirs, whoever has most gives way; with all of them, only another batch job.
        """
        line, owner = self._line_of(number), self._owners[number]
        if owner.batch:
            return self._victim_of_batch(number)
        is_reserved = isinstance(line, _Reservation)
        if isinstance(line, _Reservation) and (
            not self._is_within(line) or len(line.active) >= self._slots(line)
        ):
            return None
        lent = [account for account in self._batch.values() if account.num_active]
        if sum(account.num_active for account in lent) > self.limits.batch_slots:
            return _most(map(_holder, lent)).youngest
        if is_reserved:
            first = self.within_reservations()
            return _most([*self._borrowed(first), *self._by_account().values()]).youngest
        borrowed = _most(
            _Holder([line.active[self._slots(line) :]]) for line in self._reservations.values()
        )
        if borrowed.youngest is not None:
            return borrowed.youngest
        return self._uneven(self._accounts, number)

    def _victim_of_batch(self, number: int) -> int | None:
        if self.counts(BATCH)[0] >= self.limits.batch_slots:
            return self._uneven(self._batch, number)
        first = self.within_reservations()
        return _most([*self._borrowed(first), *self._by_account().values()]).youngest

    def _uneven(self, accounts: Mapping[str, _Account], number: int) -> int | None:
        """Return the youngest of who still has as many slots without it as the owner of a waiting
        request has with it: of another account, or of another model of its own."""
        line = self._line_of(number)
        holders = {name: _holder(account) for name, account in accounts.items()}
        mine = holders.pop(self._owners[number].account, _NOBODY)
        most = _most(holders.values())
        if most.num >= mine.num + 2:
            return most.youngest
        most_of_mine = max(mine.lines, key=len, default=[])
        return most_of_mine[-1] if len(most_of_mine) >= len(line.active) + 2 else None

    # --- figures ---------------------------------------------------------------------------------

    @property
    def active(self) -> list[int]:
        """All active requests."""
        return [number for line in self._lines() for number in line.active]

    @property
    def num_active(self) -> int:
        """How many are active."""
        return sum(len(line.active) for line in self._lines())

    @property
    def num_waiting(self) -> int:
        """How many wait."""
        return sum(len(line.waiting) for line in self._lines())

    def counts(self, name: str) -> tuple[int, int]:
        """Return how many requests of a class are active, and how many wait."""
        if name == PROVISIONED:
            lines: list[_Line] = list(self._reservations.values())
        else:
            accounts = self._batch if name == BATCH else self._accounts
            lines = [line for account in accounts.values() for line in account.lines.values()]
        return sum(len(line.active) for line in lines), sum(len(line.waiting) for line in lines)

    def used(self) -> dict[str, float]:
        """Return by reservation which part of what it can save up is used: 1 is all of it."""
        for line in self._reservations.values():
            self._refill(line)
        return {
            name: min(1.0, 1.0 - line.balance / self._burst(line))
            for name, line in self._reservations.items()
        }

    # --- inside ----------------------------------------------------------------------------------

    def _lines(self) -> Iterator[_Line]:
        yield from self._reservations.values()
        for accounts in (self._accounts, self._batch):
            for account in accounts.values():
                yield from account.lines.values()

    def _group(self, owner: Owner) -> dict[str, _Account]:
        return self._batch if owner.batch else self._accounts

    def _line_of(self, number: int) -> _Line:
        return self._line(self._owners[number])

    def _line(self, owner: Owner) -> _Line:
        if owner.reservation is not None:
            line = self._reservations.get(owner.reservation)
            if line is None:
                line = _Reservation(units=owner.units, refilled_at=self._clock())
                line.balance = self._burst(line)
                self._reservations[owner.reservation] = line
            line.units = owner.units
            return line
        account = self._group(owner).setdefault(owner.account, _Account())
        return account.lines.setdefault(owner.model, _Line())

    def _may_enter(self, owner: Owner) -> None:
        if owner.reservation is None:
            if self._is_full(owner) and self._last_of_the_longest(owner) is None:
                waiting = self.counts(class_of(owner))[1]
                raise _throttled(
                    f"Too many requests: {waiting} are waiting for this model. Please wait before "
                    "trying again.",
                    RETRY_SECONDS,
                )
            return
        line = self._line(owner)
        assert isinstance(line, _Reservation)
        self._refill(line)
        if line.balance <= 0:
            raise _throttled(
                f"Too many tokens: the {_units(line.units)} of the provisioned throughput give "
                f"{self._rate_of(line):.0f} tokens a second, and more than that was asked. Please "
                "wait before trying again, or buy more model units.",
                (1.0 - line.balance) / self._rate_of(line),
            )
        most = max(1, int(self.limits.max_waiting * self.limits.share(line.units)))
        if len(line.waiting) >= most:
            raise _throttled(
                f"Too many requests: {len(line.waiting)} are waiting for the {_units(line.units)} "
                "of the provisioned throughput. Please wait before trying again, or buy more model "
                "units.",
                RETRY_SECONDS,
            )

    def _is_full(self, owner: Owner) -> bool:
        return self.counts(class_of(owner))[1] >= self.limits.max_waiting

    def _last_of_the_longest(self, owner: Owner) -> int | None:
        """Return the youngest waiting request of the account that has most, if it has more."""
        accounts = self._group(owner)
        mine = accounts.get(owner.account)
        longest = max(accounts.values(), key=lambda other: other.num_waiting, default=None)
        if longest is None or longest.num_waiting < (mine.num_waiting if mine else 0) + 2:
            return None
        return max(line.waiting[-1] for line in longest.lines.values() if line.waiting)

    def _lift(self, owner: Owner) -> None:
        """Have who comes back count as served as little as the least served one that is busy."""
        if owner.reservation is not None:
            return
        accounts = self._group(owner)
        account = accounts.setdefault(owner.account, _Account())
        if not account.is_busy:
            busy = [other.served for other in accounts.values() if other.is_busy]
            account.served = max(account.served, min(busy, default=0.0))
        line = account.lines.setdefault(owner.model, _Line())
        if not line.is_busy:
            busy = [other.served for other in account.lines.values() if other.is_busy]
            line.served = max(line.served, min(busy, default=0.0))

    def _tidy(self) -> None:
        """Forget who has nothing here, where that changes nothing for him."""
        for accounts in (self._accounts, self._batch):
            for account in accounts.values():
                if not account.is_busy:
                    account.lines.clear()
            if not any(account.is_busy for account in accounts.values()):
                accounts.clear()
        for name, line in list(self._reservations.items()):
            if not line.is_busy:
                self._refill(line)
                if line.balance >= self._burst(line):
                    del self._reservations[name]

    def _by_account(self) -> dict[str, _Holder]:
        """Return the slots that are held on demand."""
        return {name: _holder(account) for name, account in self._accounts.items()}

    def _borrowed(self, first: set[int]) -> Iterator[_Holder]:
        """Yield the slots that reservations hold beyond what they bought, or beyond their rate."""
        for line in self._reservations.values():
            yield _Holder([[number for number in line.active if number not in first]])

    def _is_within(self, line: _Reservation) -> bool:
        self._refill(line)
        return line.balance > 0

    def _saved(self, line: _Reservation) -> float:
        self._refill(line)
        return line.balance / self._burst(line)

    def _slots(self, line: _Reservation) -> int:
        return max(1, int(self.limits.slots * self.limits.share(line.units)))

    def _rate_of(self, line: _Reservation) -> float:
        """Return how many tokens a second it has bought: one at least, which can be waited for."""
        return max(1.0, self._rate() * self.limits.share(line.units))

    def _burst(self, line: _Reservation) -> float:
        return self._rate_of(line) * self.limits.burst_seconds

    def _refill(self, line: _Reservation) -> None:
        now = self._clock()
        more = (now - line.refilled_at) * self._rate_of(line)
        line.balance, line.refilled_at = min(line.balance + more, self._burst(line)), now


class _Holder(NamedTuple):
    """Slots of somebody, by model."""

    lines: list[list[int]]

    @property
    def num(self) -> int:
        return sum(map(len, self.lines))

    @property
    def youngest(self) -> int | None:
        """Of the model that has most."""
        most = max(self.lines, key=len, default=[])
        return most[-1] if most else None


_NOBODY = _Holder([])


def _holder(account: _Account) -> _Holder:
    return _Holder([line.active for line in account.lines.values()])


def _next_of(accounts: Mapping[str, _Account]) -> int | None:
    """Return the waiting request of whoever was served least."""
    waiting = [account for account in accounts.values() if account.num_waiting]
    if not waiting:
        return None
    account = min(waiting, key=lambda account: (account.served, account.num_active))
    lines = [line for line in account.lines.values() if line.waiting]
    return min(lines, key=lambda line: (line.served, len(line.active))).waiting[0]


def _most(holders: Iterable[_Holder]) -> _Holder:
    return max(holders, key=lambda holder: holder.num, default=_NOBODY)


def class_of(owner: Owner) -> str:
    """Return the class of requests that an owner's belong to."""
    if owner.batch:
        return BATCH
    return ON_DEMAND if owner.reservation is None else PROVISIONED


def _units(count: int) -> str:
    return "1 model unit" if count == 1 else f"{count} model units"


def _throttled(message: str, seconds: float) -> ThrottlingException:
    return ThrottlingException(message, members={"retryAfterSeconds": round(seconds, 3)})
