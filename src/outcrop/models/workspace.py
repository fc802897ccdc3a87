"""Memory that the passes over a row work in, kept from row to row.

Rows of ever other lengths, asked of the C library tensor by tensor, scatter over its heap: what is
kept between them (moments, machine code that was written for one shape) comes to lie among them,
and the process grows for hundreds of steps to about twice of what it uses. Taken from a few large
pieces, one after the other, rows need what the largest of them needs, and that can be foretold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

ROW_CHUNK_BYTES, LAYER_CHUNK_BYTES, PASSED_CHUNK_BYTES = 32 << 20, 32 << 20, 8 << 20
"""Of a piece, at least. glibc maps those of the first size by themselves, and gives them back when
they are freed. Source: mallopt(3), M_MMAP_THRESHOLD."""
ALIGNED_BYTES = 64
"""A tensor begins at a multiple of it: a line of the cache, as torch's own do."""

Take = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Returns room for a tensor of a shape; what it holds is not defined."""


class Stack:
    """Gives room after room, and takes back the latest first."""

    def __init__(self, chunk_bytes: int) -> None:
        """
        Args:
            chunk_bytes: that are asked of the system at a time, at least.
        """
        self.device = torch.device("cpu")
        """Elsewhere, torch's own allocator does the same, and is asked."""
        self._chunk_bytes = chunk_bytes
        self._chunks: list[Tensor] = []
        self._place = self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return room for a tensor, until a part that it was taken in ends or all is taken back."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        size = prod(shape) * dtype.itemsize
        while self._place < len(self._chunks):
            if self._used + size <= len(self._chunks[self._place]):
                break
            if self._used == 0:  # nothing lies in it: a larger one takes its place
                del self._chunks[self._place]
                self._chunks.insert(self._place, self._chunk(size))
                break
            self._place, self._used = self._place + 1, 0
        else:
            self._chunks.append(self._chunk(size))
        room = self._chunks[self._place][self._used : self._used + size]
        self._used += -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
        return room.view(dtype).view(shape)

    @contextmanager
    def part(self) -> Iterator[None]:
        """Take back at the end of a `with` what was taken inside it."""
        before = self._place, self._used
        yield
        self._place, self._used = before

    def take_back(self) -> None:
        """Take back everything; the memory is kept for what comes next."""
        self._place = self._used = 0

    def forget(self) -> None:
        """Take back everything and keep no memory."""
        self.take_back()
        self._chunks.clear()

    def _chunk(self, size: int) -> Tensor:
        return torch.empty(max(size, self._chunk_bytes), dtype=torch.uint8)


class Workspace:
    """The stacks of one row at a time."""

    def __init__(self) -> None:
        self.row = Stack(ROW_CHUNK_BYTES)
        """For what lives as long as the passes over the row."""
        self.layer = Stack(LAYER_CHUNK_BYTES)
        """For what lives as long as one layer's forward or backward pass."""
        self._passed = Stack(PASSED_CHUNK_BYTES), Stack(PASSED_CHUNK_BYTES)

    def begin_row(self, device: torch.device) -> None:
        """Take back what the row before had; tensors are now made on that device."""
        for stack in self._stacks():
            stack.take_back()
            stack.device = device

    def begin_layer(self, number: int) -> Take:
        """Take back what the layer before had for itself, and what the one before it passed on.

        Args:
            number: of the layer; neighbours must have an even and an odd one.
        Returns:
            what gives room for that which this layer passes on to the next.
        """
        self.layer.take_back()
        passed = self._passed[number % 2]
        passed.take_back()
        return passed.take

    def forget(self) -> None:
        """Keep no memory."""
        for stack in self._stacks():
            stack.forget()

    def _stacks(self) -> tuple[Stack, ...]:
        return self.row, self.layer, *self._passed
