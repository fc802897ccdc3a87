"""Answers of a batch job as they come: a line each, in any order, on the disk before they count.

A line has a checksum, so one that was cut off or damaged is as if it had not been written; its
record is asked again. Each attempt writes a journal of its own, which begins with what the attempts
before it had: one that has lost its lease can neither add to it nor take it away.
"""

from __future__ import annotations

import os
import threading
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from outcrop.store.rows import TokenUsage

FILE = "answers.journal"
_NONE = -1


@dataclass(frozen=True)
class Answer:
    """What became of one record."""

    number: int
    """Of the record among those of the job, from 0."""
    content: bytes
    """JSON: what the output line has as `modelOutput`, or as `error`."""
    is_error: bool
    input_tokens: int = 0
    output_tokens: int = 0


class Journal:
    """The answers of a job that are on the disk. One thread may add while another reads."""

    def __init__(self, folder: Path, num_records: int, earlier: Iterable[Path]) -> None:
        """Begin the journal of an attempt.

        Args:
            folder: of the attempt; is made.
            num_records: that the job has.
            earlier: folders of the attempts before it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._starts = array("q", [_NONE]) * num_records
        self.num_errors = 0
        self.num_answers = 0
        self.input_tokens = self.output_tokens = 0
        self._file = (folder / FILE).open("w+b")
        self._end = 0
        self._lock = threading.Lock()
        for other in earlier:
            self._add(read_answers(other / FILE))

    @property
    def usage(self) -> TokenUsage:
        """What the answers took."""
        return TokenUsage(self.num_answers - self.num_errors, self.input_tokens, self.output_tokens)

    def __contains__(self, number: int) -> bool:
        return self._starts[number] != _NONE

    def add(self, answers: Iterable[Answer]) -> None:
        """Write answers; they are on the disk when this returns. One that is there stays."""
        self._add(answers)

    def get(self, number: int) -> Answer | None:
        """Return a record's answer; None where there is none yet."""
        start = self._starts[number]
        if start == _NONE:
            return None
        with self._lock:
            self._file.seek(start)
            answer = _parse(self._file.readline())
        assert answer is not None
        assert answer.number == number
        return answer

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, answers: Iterable[Answer]) -> None:
        added: list[tuple[Answer, int]] = []
        new: set[int] = set()
        with self._lock:
            end = self._file.seek(self._end)
            for answer in answers:
                if (
                    answer.number >= len(self._starts)
                    or answer.number in self
                    or answer.number in new
                ):
                    continue
                new.add(answer.number)
                line = to_line(answer)
                self._file.write(line)
                added.append((replace(answer, content=b""), end))
                end += len(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            # Only now does an answer count.
            self._end = end
            for answer, start in added:
                self._starts[answer.number] = start
                self.num_answers += 1
                self.num_errors += answer.is_error
                self.input_tokens += answer.input_tokens
                self.output_tokens += answer.output_tokens


def read_answers(path: Path) -> Iterator[Answer]:
    """Yield the whole answers of a journal; none where there is no such file."""
    try:
        file: BinaryIO = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            answer = _parse(line)
            if answer is not None:
                yield answer


def to_line(answer: Answer) -> bytes:
    """Return the line of an answer; its content must have no line end."""
    kind = b"e" if answer.is_error else b"a"
    numbers = (answer.number, answer.input_tokens, answer.output_tokens)
    rest = kind + b" %d %d %d " % numbers + answer.content
    return b"%08x " % zlib.crc32(rest) + rest + b"\n"


def _parse(line: bytes) -> Answer | None:
    """Return the answer of a line, or None where it is cut off or damaged."""
    head, _, rest = line.partition(b" ")
    if not rest.endswith(b"\n") or head != b"%08x" % zlib.crc32(rest[:-1]):
        return None
    kind, number, inputs, outputs, content = rest[:-1].split(b" ", 4)
    return Answer(int(number), content, kind == b"e", int(inputs), int(outputs))
