"""How many threads a computing process uses, and how they wait for each other.

torch's OpenMP threads wait at the end of each small operation by spinning. Where another process
takes one of the cores, the others spin until the late one is scheduled again.
"""

from __future__ import annotations

import os

import torch


def use_threads(threads: int) -> int:
    """Make torch compute with so many threads, 0 for all cores of this process; return how many."""
    count = threads or available_cores()
    torch.set_num_threads(count)
    return count


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
