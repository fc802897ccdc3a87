"""Turn the bytes of a JSONL file into JSON objects with their line numbers.

Reads line by line, so a file may be larger than memory; one line may not. It knows JSON and
UTF-8, not what a record must look like: `formats.py` does. A defect raises at once.

A defect's code is one stable word, the same in every check of data here.

Source of the messages' first sentences: Bedrock user guide, "Troubleshoot model customization".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from outcrop.errors import DataError

MAX_LINE_BYTES = 8 * 2**20
"""LIMIT: the longest line, 8 MiB: 32,000 tokens of 6 characters, each written as an escape of 12
bytes, and as much again."""

_BOM = b"\xef\xbb\xbf"
_SHOWN_CHARACTERS = 40


def read_lines(stream: BinaryIO, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, JSON object) for each line that is not blank.

    A byte-order mark at the start, CR LF line ends and blank lines are let pass.

    Args:
        file: the file's name for messages.
    Raises:
        DataError: a line is too long, not UTF-8, not JSON, holds a NUL, names a key twice or is no
            object; or the file has no record at all.
    """
    number = 0
    empty = True
    while True:
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            break
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise DataError(
                f"Input size exceeded in file {file} for record starting with "
                f"{_shown(line[:200].decode(errors='replace'))}. Line {number} is longer than "
                f"{MAX_LINE_BYTES:,} bytes.",
                code="too_long",
                file=file,
                line=number,
            )
        if line.strip(b" \t\r\n"):
            empty = False
            yield number, parse_line(line, file, number)
    if empty:
        raise DataError(
            f"{_cannot_parse(file)} The file holds no record.", code="empty_file", file=file
        )


def parse_line(line: bytes, file: str, number: int) -> dict[str, Any]:
    """Return the object that a line holds.

    Raises:
        DataError: it holds none that can be used.
    """
    if b"\0" in line:
        raise _unusable(file, number, "null_byte", "It holds a NUL byte.")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unusable(
            file, number, "invalid_utf8", f"Byte {error.start + 1} of the line is not UTF-8."
        ) from None
    try:
        value = json.loads(text.strip(" \t\r\n"), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise _unusable(
            file,
            number,
            "invalid_json",
            f"It is not JSON: {error.msg} at character {error.pos + 1}. "
            f"The line begins with {_shown(text)}.",
        ) from None
    except _DuplicateKey as error:
        raise _unusable(
            file, number, "duplicate_key", f"The key {_shown(error.args[0])} stands there twice."
        ) from None
    except (RecursionError, ValueError):
        # Python refuses integers of thousands of digits with a bare ValueError.
        raise _unusable(
            file, number, "invalid_json", "It is nested too deeply, or a number is too long."
        ) from None
    if not isinstance(value, dict):
        raise _unusable(
            file, number, "not_an_object", f"It is not a JSON object but {kind_of(value)}."
        )
    return value


def kind_of(value: object) -> str:
    """Return the name of a JSON value's kind, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a string", int: "a number", float: "a number", list: "an array"}
    return kinds.get(type(value), "an object")


class _DuplicateKey(ValueError):
    """A key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        count = Counter(name for name, _ in pairs)
        raise _DuplicateKey(next(name for name in count if count[name] > 1))
    return value


def _unusable(file: str, number: int, code: str, reason: str) -> DataError:
    return DataError(
        f"{_cannot_parse(file)} Line {number}: {reason}", code=code, file=file, line=number
    )


def _cannot_parse(file: str) -> str:
    """Return AWS's sentence."""
    return f"Unable to parse Amazon S3 file: {file}. Data files must conform to JSONL format."


def _shown(text: str) -> str:
    """Return the start of a text of somebody else's, fit for one line of a message."""
    return (
        ascii(text) if len(text) <= _SHOWN_CHARACTERS else ascii(text[:_SHOWN_CHARACTERS]) + "..."
    )
