"""Several rows of tokens at the same time: one thread for each, which computes alone.

Threads that share out every single operation meet after each of them. Where other processes want
the cores too, the early ones wait for the late ones hundreds of times a second, and two threads can
be slower than one (docs/training-speed.md has the measurement). Lanes meet once a step instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from outcrop.models.workspace import Workspace

T = TypeVar("T")

LARGEST_SHARE = 0.62
"""Of the tokens of a step that go through several lanes. Where one lane would get more, for
instance because a batch is a single record, all threads compute one row together: two threads are
then about 1.6 times as fast as one on a quiet machine. train/tuning.py measures it."""


class Lanes:
    """Threads that live as long as a run does."""

    def __init__(self, count: int, largest_share: float = LARGEST_SHARE) -> None:
        """
        Args:
            count: at least 1. With one lane, tasks run in the caller's thread.
            largest_share: of the work that one lane may get; see `LARGEST_SHARE`.
        """
        self.count, self.largest_share = count, largest_share
        self.workspaces = tuple(Workspace() for _ in range(count))
        """For the row of each lane; the first also for a row that all threads compute together."""
        self._together = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "lane") if count > 1 else None

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        """Run at most as many tasks as there are lanes; return what they return, in their order.

        A single task runs in the caller's thread, with as many threads as that had when the lanes
        were made. Where a task fails, the lanes' workspaces keep no memory.

        Raises:
            whatever the first of the tasks that failed raised, when all have ended.
        """
        # Said each time: part of torch's libraries keeps one number for the process.
        try:
            if self._pool is None or len(tasks) == 1:
                torch.set_num_threads(self._together)
                return [task() for task in tasks]
            futures = [self._pool.submit(_alone, task) for task in tasks]
            wait(futures)
            return [future.result() for future in futures]
        except BaseException:
            for workspace in self.workspaces:
                workspace.forget()
            raise

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _alone(task: Callable[[], T]) -> T:
    torch.set_num_threads(1)
    return task()
