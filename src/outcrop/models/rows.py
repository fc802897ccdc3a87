"""A row of tokens as a decoder takes it: records end to end, and what they share only once.

Plain numbers, no tensors. data/pack.py makes rows of records.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """The tokens of a row that belong to one record alone."""

    start: int
    length: int
    prefix: int
    """So many tokens at the start of the row come before them in the record too; 0 for none."""


@dataclass(frozen=True)
class Row:
    """Some records, ready for a forward pass."""

    input_ids: list[int]
    position_ids: list[int]
    """Place of each token in its record, from 0."""
    segments: list[Segment]
    """In order and without gaps; a shared prefix is the first."""
    sources: list[int]
    """Where in the row each token that carries loss is predicted: at the token before it."""
    labels: list[int]
    """The tokens that carry loss, in the order of `sources`."""
