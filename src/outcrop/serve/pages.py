"""Which pages of keys and values belong to which sequence, and which can be shared.

A page holds a fixed number of tokens. A full page is known by everything that led to it: the model
with its adapter, and all tokens from the first on. A sequence that begins alike takes such pages
over instead of computing them; nobody writes to a full page. Pages that no sequence uses any more
are kept as long as there is room, the one that was not used for longest goes first.

Knows numbers only, no memory; imports no torch. Used from one thread.

Source: Kwon et al., PagedAttention (arXiv 2309.06180), for pages and their sharing.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b


@dataclass
class PageTable:
    """The pages of one sequence, from its first token on."""

    numbers: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """Of its full pages, as far as they were recorded or taken over."""
    scope: bytes = b""


class PagePool:
    """All pages of a model server."""

    def __init__(self, num_pages: int, page_tokens: int, *, shares: bool = True) -> None:
        """
        Args:
            shares: whether pages are taken over and kept.
        """
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._shares = shares
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.tokens_taken_over = 0

    @property
    def num_available(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Pages that no sequence uses and that can be taken over."""
        return len(self._idle)

    def open(self, scope: bytes, token_ids: Sequence[int]) -> PageTable:
        """Return a sequence's table, with the pages that it can take over.

        Of the tokens at least one is left to compute: its scores are what the sequence is for.

        Args:
            scope: what else keys and values depend on.
        """
        table = PageTable(scope=scope)
        if not self._shares:
            return table
        for first in range(0, len(token_ids) - self.page_tokens, self.page_tokens):
            key = self._key(table, token_ids[first : first + self.page_tokens])
            page = self._by_key.get(key)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            table.numbers.append(page)
            table.keys.append(key)
        self.tokens_taken_over += len(table.numbers) * self.page_tokens
        return table

    def next_key(self, table: PageTable, token_ids: Sequence[int]) -> bytes | None:
        """Return what the first page would be known by that is not there yet; None if not full."""
        first = len(table.keys) * self.page_tokens
        part = token_ids[first : first + self.page_tokens]
        return self._key(table, part) if len(part) == self.page_tokens else None

    def extend(self, table: PageTable, num_tokens: int) -> bool:
        """Give a sequence pages for so many tokens in all; False and none if there are too few."""
        more = -(-num_tokens // self.page_tokens) - len(table.numbers)
        if more > self.num_available:
            return False
        for _ in range(more):
            page = self._free.pop() if self._free else self._forget()
            self._users[page] = 1
            table.numbers.append(page)
        return True

    def record(self, table: PageTable, token_ids: Sequence[int]) -> None:
        """Note the tokens whose keys and values are computed: full pages can be taken over."""
        if not self._shares:
            return
        for place in range(len(table.keys), len(token_ids) // self.page_tokens):
            first = place * self.page_tokens
            key = self._key(table, token_ids[first : first + self.page_tokens])
            table.keys.append(key)
            if key not in self._by_key:
                self._by_key[key] = table.numbers[place]
                self._key_of[table.numbers[place]] = key

    def close(self, table: PageTable) -> None:
        """Give a sequence's pages back; twice does nothing more."""
        # The last pages first, because a page without those before it is of no use.
        for page in reversed(table.numbers):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)
        table.numbers, table.keys = [], []

    def _forget(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_key[self._key_of.pop(page)]
        return page

    def _key(self, table: PageTable, token_ids: Sequence[int]) -> bytes:
        before = table.keys[-1] if table.keys else table.scope
        return blake2b(before + array("I", token_ids).tobytes(), digest_size=16).digest()
