"""How many threads a training process computes with, and how they wait for each other.

torch's OpenMP threads meet after every small operation, and by default whoever is early spins.
Where other processes want the cores, spinning keeps the late thread from being scheduled: two
threads then do a tenth of the work of one. So they must sleep instead. OpenMP reads that from the
environment when torch is imported: whoever starts a training process passes it on. Torch-free.

Source: GNU libgomp manual, OMP_WAIT_POLICY and GOMP_SPINCOUNT; measured in docs/learning-rate.md.
"""

from __future__ import annotations

import os

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Variables of a process that trains; an operator's own values come before these."""


def available_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
