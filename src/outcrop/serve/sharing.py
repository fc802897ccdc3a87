"""How the rows of a pass are shared among prompts. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LEAST_ROWS = 16
"""Tokens of prompts that a pass takes at least, whoever comes before them: none stands still."""
BESIDE_PART = 4
"""Beside others, a pass takes batch requests for one of so many slots."""


def share_prompts(prompts: Sequence[tuple[str, int]], room: int) -> list[int]:
    """Share a pass's rows among prompts: alike among accounts, then as `share_room`.

    Args:
        prompts: whose each is and how many tokens are left of it, the oldest first.
        room: rows for all of them.
    """
    left: dict[str, int] = {}
    for account, length in prompts:
        left[account] = left.get(account, 0) + length
    shares = [0] * len(prompts)
    for account, rows in max_min(left, room).items():
        places = [place for place, (owner, _) in enumerate(prompts) if owner == account]
        for place, share in zip(
            places, share_room([prompts[place][1] for place in places], rows), strict=True
        ):
            shares[place] = share
    return shares


def share_room(lengths: Sequence[int], room: int) -> list[int]:
    """Share a pass's rows among prompts: the shortest are done first, the oldest never waits.

    Args:
        lengths: tokens that are left of each prompt, the oldest first.
        room: rows for all of them.
    """
    shares = [0] * len(lengths)
    if lengths:
        shares[0] = min(lengths[0], -(-room // 4))
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        shares[place] += min(lengths[place] - shares[place], room - sum(shares))
    return shares


def max_min(wanted: Mapping[str, int], room: int) -> dict[str, int]:
    """Give each as much as all others that want more, and nobody more than he wants."""
    given = dict.fromkeys(wanted, 0)
    names = sorted(wanted, key=wanted.__getitem__)
    for place, name in enumerate(names):
        given[name] = min(wanted[name], -(-room // (len(names) - place)))
        room -= given[name]
    return given


def batch_beside(numbers: Sequence[int], slots: int, turn: int) -> set[int]:
    """Return which requests of batch jobs take part in a pass that has others too.

    The more a pass computes the longer it takes, and somebody waits for the others. So only some
    do, each in its turn.

    Args:
        turn: grows by one from pass to pass.
    """
    most = max(1, slots // BESIDE_PART)
    if len(numbers) <= most:
        return set(numbers)
    first = turn * most % len(numbers)
    return {numbers[(first + place) % len(numbers)] for place in range(most)}


def rows_beside(slots: int, cost: float, prompt_cost: float) -> int:
    """Return how many tokens of prompts a pass takes beside those that come before them: on demand
    beside reservations, batch jobs beside both.

    So many that it costs no more than an answer's token for each slot: then a slot of a reservation
    has at least its part of the rate, whatever others ask.

    Args:
        cost: of all else in the pass, in tokens of answers.
        prompt_cost: of a token of a prompt.
    """
    return max(LEAST_ROWS, int((slots - cost) / prompt_cost))
