"""What a check keeps of each usable record: a row of numbers, so that millions fit into memory.

About 100 bytes a record, and 4 for each of up to SKETCH_SIZE different runs of words in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other."""

    values: NDArray[np.uint32]
    ends: NDArray[np.int64]
    """Where each row ends."""

    def row(self, index: int) -> NDArray[np.uint32]:
        """Return one row."""
        return self.values[self.ends[index - 1] if index else 0 : self.ends[index]]


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
    """A hash of the answer's words; 0 where there is no answer."""
    bands: NDArray[np.uint64]
    """[record, band]: two records with a hash in common in one place may say nearly the same."""
    prompt_sketch: Ragged
    """Of the words before the answer, or of a document."""
    completion_sketch: Ragged
    """Of an answer's words; empty where it is too short to be nearly another."""
    num_characters: NDArray[np.uint32]
    num_input: NDArray[np.uint32]
    """Tokens before the answer; all of a document. 0 where none were counted."""
    num_output: NDArray[np.uint32]
    """Tokens of the answer and after it."""

    def __len__(self) -> int:
        return len(self.line)


def joined(parts: Sequence[Columns]) -> Columns:
    """Put columns one after the other; at least one."""
    found: dict[str, object] = {}
    for field in fields(Columns):
        arrays = [getattr(part, field.name) for part in parts]
        if isinstance(arrays[0], Ragged):
            sizes = np.cumsum([0, *(len(array.values) for array in arrays[:-1])])
            found[field.name] = Ragged(
                np.concatenate([array.values for array in arrays]),
                np.concatenate(
                    [array.ends + size for array, size in zip(arrays, sizes, strict=True)]
                ),
            )
        else:
            found[field.name] = np.concatenate(arrays)
    return Columns(**found)  # type: ignore[arg-type]
