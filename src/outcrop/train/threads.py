"""How many threads a training process computes with, and how they wait for each other.

torch's OpenMP threads meet after every small operation, and by default whoever is early spins.
Where other processes want the cores, spinning keeps the late thread from being scheduled: two
threads then do a tenth of the work of one. So they must sleep instead. OpenMP reads that from the
environment when torch is imported: whoever starts a training process passes it on. Torch-free.

oneDNN prepares a product for each shape of matrices and keeps it, up to two megabytes each, 1,024
of them by its own bound: with rows of ever other lengths that is soon reached. ideep, through which
torch calls it, keeps the last 1,024 of each thread once more, whatever oneDNN has let go. Both read
at their first product how many they may keep.

Source: GNU libgomp manual, OMP_WAIT_POLICY and GOMP_SPINCOUNT; measured in docs/learning-rate.md.
oneDNN's guide, "Primitive Cache"; ideep's lru_cache.hpp; measured in docs/memory.md.
"""

from __future__ import annotations

import os

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Of each process that computes beside others; an operator's own values come before these."""
PRIMITIVES_A_THREAD, MOST_PRIMITIVES = 256, 1024
"""Shapes that oneDNN keeps what it has prepared for. A row computes matrices of some twenty shapes,
and of six for each length of its records: the rows of all threads must fit, else everything is
prepared again in every layer."""


def training_environment(threads: int) -> dict[str, str]:
    """Return the variables of a process that trains with so many threads."""
    total = num_primitives(threads)
    return {
        **ENVIRONMENT,
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(total),
        "LRU_CACHE_CAPACITY": str(total // threads),
    }


def num_primitives(threads: int) -> int:
    """Return for how many shapes a process of so many threads keeps prepared products."""
    return min(MOST_PRIMITIVES, PRIMITIVES_A_THREAD * threads)


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
