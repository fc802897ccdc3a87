"""The change log of a cleaning, and the way back.

A JSONL file. The first line says what was cleaned and how; then comes one line for each line of
the original that is not in the cleaned file as it stood, in their order; the last line has the
digests and the counts. A log without its last line is unfinished.

Each entry holds the original line whole, as text, or in base64 where it is not UTF-8. So the log
and the cleaned file together give the original back, byte for byte.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from outcrop.data.defects import shown
from outcrop.data.output import Output, write_whole
from outcrop.data.read import split_chunks
from outcrop.errors import DataError

FORMAT = "outcrop-cleaning-log-1"

REPAIR, DROP, REJECT, SKIP, SPLIT = "repair", "drop", "reject", "skip", "split"
ACTIONS = (REPAIR, DROP, REJECT, SKIP, SPLIT)


@dataclass(frozen=True)
class Change:
    """One thing that was done to a record, or the reason why it was left out."""

    code: str
    where: str = ""
    """The value in the record, such as `messages[0].content`; "" for the record as a whole."""
    before: str = ""
    """What stood there, where the two differ first; at most defects.MAX_SHOWN_CHARACTERS."""
    after: str = ""
    message: str = ""
    """Why, for a person; "" where the code says it."""


@dataclass(frozen=True)
class Entry:
    """What became of one line of the original."""

    line: int
    """From 1."""
    action: str
    """One of ACTIONS."""
    original: bytes
    """The line without its LF."""
    changes: tuple[Change, ...] = ()
    num_output: int = 0
    """Lines of the cleaned file that it became."""
    twin: tuple[str, int] | None = None
    """(file, line) of the record that it repeats."""

    def write(self) -> bytes:
        """Return its line of the log."""
        value: dict[str, Any] = {"line": self.line, "action": self.action}
        if self.num_output:
            value["numOutputLines"] = self.num_output
        if self.twin is not None:
            value["twin"] = {"file": self.twin[0], "line": self.twin[1]}
        if self.changes:
            value["changes"] = [
                {name: said for name, said in vars(change).items() if said}
                for change in self.changes
            ]
        try:
            value["original"] = self.original.decode("utf-8")
        except UnicodeDecodeError:
            value["originalBase64"] = base64.b64encode(self.original).decode()
        return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8")


def difference(before: str, after: str) -> tuple[str, str]:
    """Return both texts from shortly before where they first differ, fit to be shown."""
    place = 0
    for one, other in zip(before, after, strict=False):
        if one != other:
            break
        place += 1
    start = max(place - 10, 0)
    return shown(before[start:]), shown(after[start:])


def write_head(file: str, settings: dict[str, Any]) -> bytes:
    """Return the first line of a log."""
    head = {"format": FORMAT, "file": file, "settings": settings}
    return (json.dumps(head, ensure_ascii=False) + "\n").encode("utf-8")


def write_end(values: dict[str, Any]) -> bytes:
    """Return the last line of a log."""
    return (json.dumps({"end": True, **values}, ensure_ascii=False) + "\n").encode("utf-8")


def read_log(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Return (first line, entries, last line).

    Raises:
        DataError: it is no change log, or an unfinished one.
    """
    with path.open("rb") as stream:
        values = [json.loads(line) for line in stream]
    if len(values) < 2 or values[0].get("format") != FORMAT or not values[-1].get("end"):
        raise _unusable(path, "it is no finished change log of `outcrop data clean`")
    return values[0], values[1:-1], values[-1]


def undo(cleaned: BinaryIO, log: Path, target: Path) -> str:
    """Write the original of a cleaning again, byte for byte, and return its SHA-256 in hex.

    Args:
        cleaned: the cleaned file, packed or not; what was packed comes back unpacked.
        log: its change log.
        target: where the original is written; appears only if it is the original indeed.
    Raises:
        DataError: the log is none, or belongs to another file.
    """
    with log.open("rb") as stream:
        entries = _entries(stream, log)
        head = next(entries)
        if head.get("format") != FORMAT:
            raise _unusable(log, "it is no change log of `outcrop data clean`")
        lines = _lines(cleaned, str(target))
        with write_whole(target) as out:
            end = _restore(entries, lines, out, log)
            if out.digest.hexdigest() != end["originalSha256"]:
                raise _unusable(log, "the file given was not made with it, or was changed since")
    return str(end["originalSha256"])


def _restore(
    entries: Iterator[dict[str, Any]], lines: Iterator[bytes], out: Output, log: Path
) -> dict[str, Any]:
    """Write every line of the original; returns the log's last line."""
    number = 0
    held: list[bytes] = []  # the newest line: whether a line end follows it is known at the end

    def put(line: bytes) -> None:
        nonlocal number
        if held:
            out.write(held.pop() + b"\n")
        held.append(line)
        number += 1

    for entry in entries:
        if entry.get("end"):
            for line in lines:
                put(line)
            if held:
                out.write(held.pop() + (b"\n" if entry["endsWithLineEnd"] else b""))
            return entry
        while number < entry["line"] - 1:
            kept = next(lines, None)
            if kept is None:
                raise _unusable(log, "the file given has fewer lines than it was made with")
            put(kept)
        put(_original(entry))
        for _ in range(entry.get("numOutputLines", 0)):
            next(lines, None)
    raise _unusable(log, "its end is missing: the cleaning was broken off")


def _original(entry: dict[str, Any]) -> bytes:
    if "originalBase64" in entry:
        return base64.b64decode(entry["originalBase64"])
    return str(entry["original"]).encode("utf-8")


def _entries(stream: BinaryIO, log: Path) -> Iterator[dict[str, Any]]:
    for line in stream:
        try:
            value = json.loads(line)
        except ValueError:
            raise _unusable(log, "a line of it is not JSON") from None
        yield value


def _lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    for chunk in split_chunks(stream, name):
        lines = chunk.data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        yield from lines


def _unusable(log: Path, reason: str) -> DataError:
    return DataError(f"{log} cannot be used: {reason}.", code="bad_log", file=str(log))
