"""Into how small parts a step is cut, so that it fits into memory.

Torch-free: the queue and the first stage of a job reckon with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from outcrop.data.pack import MAX_MICRO_BATCH_TOKENS

KEPT_TOKENS = 2048
"""Up to so many tokens of a micro-batch keep their activations: about 3 GB in bfloat16 on 135
million parameters in 30 layers. Micro-batches are smaller unless one record is longer."""
ROW_TOKENS = 512
"""Of a lane's row: longer ones are not computed faster, and take more memory."""
LEAST_TOKENS = 128
"""A smaller micro-batch is not chosen on purpose, only when memory has run out: below it a step
takes twice the time and more."""
RECOMPUTED_SHARE = 0.25
"""What a token costs whose activations are computed again, next to one that keeps them: only to
find out which micro-batch is the most expensive one."""


@dataclass(frozen=True)
class Portions:
    """Into how small parts a step is cut: decides memory and speed, and but for rounding nothing
    else."""

    tokens: int = MAX_MICRO_BATCH_TOKENS
    """Of one micro-batch at most; a longer record is one of its own."""
    kept_tokens: int = KEPT_TOKENS
    """A micro-batch of more tokens computes its activations twice."""

    @classmethod
    def preferred(cls, longest: int, lanes: int) -> Portions:
        """Return the fastest portions: each lane has room for the longest record, up to a bound, so
        that long ones are computed at the same time, too.

        Args:
            longest: tokens of the longest record.
            lanes: rows that are computed at the same time.
        """
        row = min(max(longest, ROW_TOKENS), MAX_MICRO_BATCH_TOKENS)
        tokens = max(MAX_MICRO_BATCH_TOKENS, lanes * row)
        return cls(tokens, max(KEPT_TOKENS, tokens))

    def smaller(self, micro_batches: Sequence[Sequence[int]]) -> Portions | None:
        """Return portions of which the most expensive micro-batch is cut; None: nothing is left to
        be cut.

        Args:
            micro_batches: the lengths of the records in each, as these portions make them.
        """
        costs = []
        for lengths in micro_batches:
            num_tokens = sum(lengths)
            is_kept = num_tokens > 0 and num_tokens <= self.kept_tokens
            if is_kept or len(lengths) > 1:
                costs.append((num_tokens * (1 if is_kept else RECOMPUTED_SHARE), lengths))
        if not costs:
            return None
        lengths = max(costs)[1]
        if len(lengths) > 1:
            # What records have in common may be laid only once: their sum may be above the bound.
            return Portions(max(1, min(sum(lengths), self.tokens) // 2), self.kept_tokens)
        return Portions(self.tokens, lengths[0] - 1)

    def described(self) -> dict[str, int]:
        """Return it as JSON carries it."""
        return asdict(self)


def gibibytes(num_bytes: int) -> str:
    """Return a size for a message, as in "2.8 GiB"."""
    return f"{num_bytes / 2**30:.2f} GiB"
