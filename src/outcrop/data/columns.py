"""What a check keeps of each usable record: a row of numbers, so that millions fit into memory.

56 bytes a record; what near duplicates are found by is kept in a `NearIndex`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Columns:
    """Usable records of some lines, in their order; all arrays are of the same length."""

    file: NDArray[np.int32]
    """Which file, from 0."""
    line: NDArray[np.int64]
    content: NDArray[np.uint64]
    """[record, 2]: a digest of all that it says, the same whatever the order of its keys."""
    prompt: NDArray[np.uint64]
    """A hash of the words before the answer, or of a document; 0 where there are none."""
    completion: NDArray[np.uint64]
    """A hash of the answer's words, as `near.label_hashes` makes it; of "" where there is none."""
    num_characters: NDArray[np.uint32]
    num_input: NDArray[np.uint32]
    """Tokens before the answer; all of a document. 0 where none were counted."""
    num_output: NDArray[np.uint32]
    """Tokens of the answer and after it."""

    def __len__(self) -> int:
        return len(self.line)


def joined(parts: Sequence[Columns]) -> Columns:
    """Put columns one after the other; at least one."""
    return Columns(
        **{
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Columns)
        }
    )
