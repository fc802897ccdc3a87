"""Which records make up which batch. Torch-free."""

from __future__ import annotations

import random
from collections.abc import Sequence

MAX_NAMED_RECORDS = 16
"""So many records of a batch are named in a message."""


def shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    """Return the places of the records in the order in which an epoch takes them."""
    order = list(range(num_examples))
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order


def describe_batch(places: Sequence[int]) -> str:
    """Say which training records a batch held, counted from 1, for a message."""
    numbers = sorted(place + 1 for place in places)
    shown = ", ".join(map(str, numbers[:MAX_NAMED_RECORDS]))
    more = len(numbers) - MAX_NAMED_RECORDS
    return (
        f"The batch held the training records {shown}"
        + (f" and {more} more" if more > 0 else "")
        + ", counted without blank lines and without those drawn off for validation."
    )
