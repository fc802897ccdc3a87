"""Pages: nobody's is another's, what begins alike is shared, and none is ever lost."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outcrop.serve.pages import PagePool, PageTable

PAGE = 4


def computed(pool: PagePool, ids: list[int], scope: bytes = b"") -> PageTable:
    table = pool.open(scope, ids)
    assert pool.extend(table, len(ids))
    pool.record(table, ids)
    return table


def test_a_prompt_that_begins_alike_takes_full_pages_over() -> None:
    pool = PagePool(16, PAGE)
    first = computed(pool, list(range(14)))
    second = pool.open(b"", [*range(9), 99, 98, 97, 96])
    assert second.numbers == first.numbers[:2]
    assert pool.tokens_taken_over == 8
    assert pool.extend(second, 13)
    assert not set(second.numbers[2:]) & set(first.numbers)


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = PagePool(16, PAGE)
    whole = computed(pool, list(range(8)))
    assert pool.open(b"", list(range(8))).numbers == whole.numbers[:1]
    assert pool.open(b"", list(range(9))).numbers == whole.numbers[:2]


def test_pages_of_one_model_are_never_taken_over_by_another() -> None:
    pool = PagePool(16, PAGE)
    computed(pool, list(range(8)), b"one")
    assert pool.open(b"other", list(range(9))).numbers == []


def test_pages_are_taken_over_after_their_sequence_has_ended() -> None:
    pool = PagePool(4, PAGE)
    table = computed(pool, list(range(9)))
    kept = table.numbers[:2]
    pool.close(table)
    assert (pool.num_available, pool.num_kept) == (4, 2)
    assert pool.open(b"", list(range(9))).numbers == kept


def test_what_was_not_used_for_longest_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4, PAGE)
    pool.close(computed(pool, [1] * 8))
    pool.close(computed(pool, [2] * 8))
    assert pool.extend(PageTable(), 3 * PAGE)
    assert pool.open(b"", [1] * 9).numbers == []
    assert len(pool.open(b"", [2] * 9).numbers) == 1


def test_two_that_compute_the_same_at_once_keep_their_own_pages() -> None:
    pool = PagePool(8, PAGE)
    tables = [pool.open(b"", [1] * 9) for _ in range(2)]
    for table in tables:
        assert pool.extend(table, 9)
        pool.record(table, [1] * 9)
    assert not set(tables[0].numbers) & set(tables[1].numbers)
    for table in tables:
        pool.close(table)
    assert pool.num_available == 8


def test_a_pool_that_does_not_share_takes_nothing_over() -> None:
    pool = PagePool(8, PAGE, shares=False)
    computed(pool, [1] * 8)
    assert pool.open(b"", [1] * 9).numbers == []


def test_too_few_pages_give_none_and_leave_those_that_are_left() -> None:
    pool = PagePool(3, PAGE)
    table = PageTable()
    assert not pool.extend(table, 13)
    assert table.numbers == []
    assert pool.extend(table, 12)


class Pages(RuleBasedStateMachine):
    """Sequences of three tokens of vocabulary, so that many begin alike."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(10, PAGE)
        self.open: list[tuple[PageTable, list[int]]] = []
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    @rule(
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=20), scope=st.sampled_from([b"", b"x"])
    )
    def begin(self, ids: list[int], scope: bytes) -> None:
        table = self.pool.open(scope, ids)
        for place, page in enumerate(table.numbers):
            # What is taken over holds exactly what would be computed.
            assert self.content[page] == (scope, tuple(ids[: (place + 1) * PAGE]))
        assert len(table.numbers) * PAGE < len(ids)
        self.open.append((table, ids))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=9))
    def compute(self, data: st.DataObject, more: list[int]) -> None:
        place = data.draw(st.integers(0, len(self.open) - 1))
        table, ids = self.open[place]
        ids = ids + more
        before = list(table.numbers)
        if not self.pool.extend(table, len(ids)):
            assert table.numbers == before
            return
        self.open[place] = (table, ids)
        for number, page in enumerate(table.numbers):
            if (number + 1) * PAGE <= len(ids):
                self.content[page] = (table.scope, tuple(ids[: (number + 1) * PAGE]))
        self.pool.record(table, ids)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.pool.close(table)
        self.pool.close(table)

    @invariant()
    def no_page_is_lost_or_used_twice(self) -> None:
        used = {page for table, _ in self.open for page in table.numbers}
        assert len(used) + self.pool.num_available == 10

    @invariant()
    def shared_pages_are_full_and_begin_alike(self) -> None:
        owners: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        for table, ids in self.open:
            for place, page in enumerate(table.numbers):
                known = (table.scope, tuple(ids[: (place + 1) * PAGE]))
                if page in owners:
                    assert owners[page] == known
                    assert len(known[1]) == (place + 1) * PAGE
                owners[page] = known


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
