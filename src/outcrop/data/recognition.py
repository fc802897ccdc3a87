"""Find out which format a file is in, where nobody said for which model it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from outcrop.data.facts import DataFile
from outcrop.data.formats import recognize
from outcrop.data.read import LineParser, split_chunks

_LOOKED_AT = 1000
"""Records at the beginning of a file."""


def main_format(data: DataFile, formats: Sequence[str]) -> tuple[str, ...]:
    """Return the one of some formats that most records at the beginning of a file have.

    Args:
        formats: those that come into question; all of them are returned where no record has any.
    Raises:
        DataError: the file cannot be read.
    """
    if len(formats) < 2:
        return tuple(formats)
    parser = LineParser()
    counts: Counter[str] = Counter()
    with data.open() as stream:
        for chunk in split_chunks(stream, data.name):
            for line in parser.chunk(chunk):
                found = None if line.value is None else recognize(line.value)
                if found is not None:
                    counts[found] += 1
            if counts.total() >= _LOOKED_AT:
                break
    return next(((name,) for name, _ in counts.most_common() if name in formats), tuple(formats))
