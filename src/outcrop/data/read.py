"""Turn the bytes of a JSONL file into JSON objects with their line numbers.

Reads piece by piece, so a file may be larger than memory, and packed with gzip. A line may have
MAX_LINE_BYTES; of a longer one only the beginning is kept, and the rest is passed over. It knows
JSON and UTF-8, not what a record must look like: `formats.py` does.

There are two ways in. `read_lines` stops at the first line that cannot be used. `scan_lines` goes
on, and says of each line what is wrong with it. Both rest on `split_chunks`, which hands out whole
lines in pieces that another process can parse, and on `LineParser`.

Source of the messages' first sentences: Bedrock user guide, "Troubleshoot model customization".
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from outcrop.data.defects import Finding, Severity, Unusable
from outcrop.errors import DataError

MAX_LINE_BYTES = 8 * 2**20
"""LIMIT: the longest line, 8 MiB: 32,000 tokens of 6 characters, each written as an escape of 12
bytes, and as much again."""
CHUNK_BYTES = 1 << 20
"""What is read at once."""

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_KEPT_BYTES = 200
_SHOWN_CHARACTERS = 40
_BLANK = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some whole lines, one after the other."""

    first_line: int
    """The number of the first one, from 1."""
    data: bytes
    """With line ends; the file's last line may have none."""
    is_cut: bool = False
    """Whether this is the beginning of one line that is longer than MAX_LINE_BYTES."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file."""

    number: int
    """From 1."""
    raw: bytes
    """Its bytes without the line end; of a line that is too long, the beginning."""
    value: dict[str, Any] | None
    """The object that it holds; None where it is blank or cannot be used."""
    findings: tuple[Finding, ...] = ()
    """What is wrong with it. Without a value, the last one says why there is none."""

    @property
    def is_blank(self) -> bool:
        """Whether nothing stands there."""
        return self.value is None and self.findings[-1].code == "blank_line"


def split_chunks(stream: BinaryIO, file: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a stream into chunks of whole lines, unpacked where it begins as gzip.

    A chunk has about `chunk_bytes`, and at most MAX_LINE_BYTES more.

    Args:
        file: the file's name for messages.
    Raises:
        DataError: it is packed and cannot be unpacked.
    """
    number = 1
    kept: list[bytes] = []
    num_kept = 0
    skipping = False
    for block in _blocks(stream, file, chunk_bytes):
        if skipping:
            end = block.find(b"\n")
            if end < 0:
                continue
            block = block[end + 1 :]
            skipping = False
            number += 1
        end = block.rfind(b"\n") + 1
        if end:
            data = b"".join((*kept, block[:end]))
            yield Chunk(number, data)
            number += data.count(b"\n")
            kept, num_kept = [], 0
        if end < len(block):
            kept.append(block[end:])
            num_kept += len(block) - end
        if num_kept > MAX_LINE_BYTES:
            head = b"".join(kept)[:_KEPT_BYTES]
            kept, num_kept = [], 0
            skipping = True
            yield Chunk(number, head, is_cut=True)
    if kept:
        yield Chunk(number, b"".join(kept))


def _blocks(stream: BinaryIO, file: str, num_bytes: int) -> Iterator[bytes]:
    """Yield the content in blocks, none of them empty."""
    first = stream.read(max(num_bytes, len(_GZIP)))
    if 0 < len(first) < len(_GZIP):
        first += stream.read(len(_GZIP) - len(first))
    if not first.startswith(_GZIP):
        block = first
        while block:
            yield block
            block = stream.read(num_bytes)
        return
    packed = io.BufferedReader(_Rejoined(first, stream), CHUNK_BYTES)
    with gzip.GzipFile(fileobj=packed, mode="rb") as unpacked:
        while True:
            try:
                block = unpacked.read(num_bytes)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(
                    f"{_cannot_parse(file)} It begins as gzip, but cannot be unpacked: {error}.",
                    code="invalid_gzip",
                    file=file,
                ) from None
            if not block:
                return
            yield block


class _Rejoined(io.RawIOBase):
    """A stream with what was read of it put back."""

    def __init__(self, first: bytes, stream: BinaryIO) -> None:
        self._first, self._stream = first, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = len(buffer)
        if self._first:
            block, self._first = self._first[:size], self._first[size:]
        else:
            block = self._stream.read(size)
        buffer[: len(block)] = block
        return len(block)


class LineParser:
    """Parses lines one at a time; not to be shared between threads."""

    def __init__(self) -> None:
        self._doubles: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_float=_finite)

    def chunk(self, chunk: Chunk) -> Iterator[Line]:
        """Yield the lines of a chunk."""
        if chunk.is_cut:
            raw = chunk.data.removeprefix(_BOM) if chunk.first_line == 1 else chunk.data
            yield Line(chunk.first_line, raw, None, (_too_long(raw),))
            return
        lines = chunk.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for number, raw in enumerate(lines, chunk.first_line):
            yield self.line(raw, number)

    def line(self, raw: bytes, number: int) -> Line:
        """Return one line, given without its LF."""
        findings: list[Finding] = []
        if number == 1 and raw.startswith(_BOM):
            raw = raw.removeprefix(_BOM)
            findings.append(_BOM_FOUND)
        if len(raw) > MAX_LINE_BYTES:
            raw = raw[:_KEPT_BYTES]
            return Line(number, raw, None, (*findings, _too_long(raw)))
        if not raw.strip(_BLANK):
            return Line(number, raw, None, (*findings, _BLANK_FOUND))
        if raw.endswith(b"\r"):
            raw = raw[:-1]
            findings.append(_CRLF_FOUND)
        try:
            value = self.object(raw, findings)
        except Unusable as error:
            return Line(number, raw, None, (*findings, error.finding))
        return Line(number, raw, value, tuple(findings))

    def object(self, raw: bytes, findings: list[Finding]) -> dict[str, Any]:
        """Return the object that a line holds.

        Args:
            findings: what is wrong and can be lived with is added here.
        Raises:
            Unusable: it holds none that can be used.
        """
        if b"\0" in raw:
            raise Unusable("null_byte", f"Byte {raw.index(0) + 1} of the line is NUL.")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            place = error.start
            raise Unusable(
                "invalid_utf8",
                f"Byte {place + 1} of the line is not UTF-8.",
                raw[place : place + 4].hex(" "),
            ) from None
        self._doubles.clear()
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise Unusable(
                "invalid_json",
                f"It is not JSON: {error.msg} at character {error.pos + 1}. "
                f"The line begins with {quoted(text)}.",
                quoted(text),
            ) from None
        except (RecursionError, ValueError):
            # Python refuses integers of thousands of digits with a bare ValueError.
            raise Unusable(
                "invalid_json",
                "It is nested too deeply, or a number is too long or too large.",
                quoted(text),
            ) from None
        if self._doubles:
            name = quoted(self._doubles[0])
            findings.append(
                Finding(
                    "duplicate_key",
                    Severity.REVIEW,
                    f"The key {name} stands there twice. The last one counts.",
                    name,
                )
            )
        if not isinstance(value, dict):
            raise Unusable("not_an_object", f"It is not a JSON object but {kind_of(value)}.")
        return value

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs) and not self._doubles:
            count = Counter(name for name, _ in pairs)
            self._doubles.append(next(name for name in count if count[name] > 1))
        return value


def scan_lines(stream: BinaryIO, file: str, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Line]:
    """Yield every line of a file, whatever is wrong with it.

    Args:
        file: the file's name for messages.
    Raises:
        DataError: it is packed and cannot be unpacked to its end.
    """
    parser = LineParser()
    for chunk in split_chunks(stream, file, chunk_bytes=chunk_bytes):
        yield from parser.chunk(chunk)


def read_lines(stream: BinaryIO, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) for each line that is not blank.

    What can be lived with is let pass: a byte-order mark at the start, CR LF line ends, blank
    lines, and a key that stands twice, of which the last one counts.

    Args:
        file: the file's name for messages.
    Raises:
        DataError: a line is too long, not UTF-8, not JSON, holds a NUL or is no object; or the file
            has no record at all, or cannot be unpacked.
    """
    empty = True
    for line in scan_lines(stream, file):
        if line.value is not None:
            empty = False
            yield line.number, line.value
        elif not line.is_blank:
            raise line_error(line.findings[-1], file, line.number)
    if empty:
        raise empty_file(file)


def parse_line(line: bytes, file: str, number: int) -> dict[str, Any]:
    """Return the object that a line holds.

    Raises:
        DataError: it holds none that can be used.
    """
    try:
        return LineParser().object(line, [])
    except Unusable as error:
        raise line_error(error.finding, file, number) from None


def line_error(finding: Finding, file: str, number: int) -> DataError:
    """Return what a job fails with because of a line that holds no object."""
    start = _cannot_parse(file)
    if finding.code == "too_long":
        start = f"Input size exceeded in file {file} for record starting with {finding.value}."
    return DataError(
        f"{start} Line {number}: {finding.message}", code=finding.code, file=file, line=number
    )


def empty_file(file: str) -> DataError:
    """Return what a job fails with because of a file without a record."""
    return DataError(
        f"{_cannot_parse(file)} The file holds no record.", code="empty_file", file=file
    )


def kind_of(value: object) -> str:
    """Return the name of a JSON value's kind, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array"}
    return kinds.get(type(value), "an object")


def quoted(text: str) -> str:
    """Return the start of a text of somebody else's, fit for one line of a message."""
    return (
        ascii(text) if len(text) <= _SHOWN_CHARACTERS else ascii(text[:_SHOWN_CHARACTERS]) + "..."
    )


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError("beyond what a float holds")
    return value


def _cannot_parse(file: str) -> str:
    """Return AWS's sentence."""
    return f"Unable to parse Amazon S3 file: {file}. Data files must conform to JSONL format."


def _too_long(raw: bytes) -> Finding:
    return Finding(
        "too_long",
        Severity.REJECT,
        f"It is longer than {MAX_LINE_BYTES:,} bytes.",
        quoted(raw[:_KEPT_BYTES].decode(errors="replace")),
    )


_BOM_FOUND = Finding("bom", Severity.REPAIR, "The file begins with a byte-order mark.")
_CRLF_FOUND = Finding("crlf", Severity.REPAIR, "The line ends with CR LF, not LF.")
_BLANK_FOUND = Finding("blank_line", Severity.SKIP, "The line is blank.")
