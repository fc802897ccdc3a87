"""Rows of a CSV or a Parquet file, as pairs or documents: the caller names the columns.

CSV is read as people write it: with or without a byte-order mark, in UTF-8 or UTF-16, with commas,
semicolons, tabs or bars, with line ends and quotes inside quoted fields, packed with gzip or not.
The first row names the columns. Parquet needs the package pyarrow.

Source: RFC 4180 for CSV.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from outcrop.data.convert import Row, refuse
from outcrop.data.defects import shown
from outcrop.data.facts import DataFile
from outcrop.data.read import MAX_LINE_BYTES
from outcrop.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Columns:
    """Which columns become what."""

    prompt: str = ""
    """With `completion`: a pair. Both, or `input` alone."""
    completion: str = ""
    input: str = ""
    """A document."""

    def __post_init__(self) -> None:
        if bool(self.prompt) != bool(self.completion) or bool(self.input) == bool(self.prompt):
            raise DataError(
                "Name the columns of prompt and completion, or the one of input.",
                code="missing_columns",
                file="",
            )

    @property
    def keys(self) -> dict[str, str]:
        """Key of the record -> column."""
        if self.input:
            return {"input": self.input}
        return {"prompt": self.prompt, "completion": self.completion}


def csv_rows(
    data: DataFile, columns: Columns, *, delimiter: str = "", encoding: str = ""
) -> Iterator[Row]:
    """Yield the rows of a CSV file.

    Args:
        delimiter: one character; "" finds out, from the first row.
        encoding: as Python names it; "" takes what a byte-order mark says, or UTF-8.
    Raises:
        DataError: a column is not there, the file is not in the encoding, or it is no CSV.
    """
    # The module's own limit of 128 KiB is too low for documents; it is one number for the process.
    csv.field_size_limit(MAX_LINE_BYTES)
    with data.open() as stream:
        reader = None
        try:
            with _decoded(stream, encoding) as text:
                head = text.readline()
                if not head.strip():
                    raise _unusable(data.name, 1, "it has no first row that names the columns")
                separator = delimiter or _delimiter(head)
                reader = csv.reader(_from(head, text), delimiter=separator, strict=True)
                names = next(reader)
                places = _places(names, columns, data.name, separator)
                line = reader.line_num + 1
                for cells in reader:
                    if cells:
                        yield _row(cells, names, places, data.name, line)
                    line = reader.line_num + 1
        except csv.Error as error:
            raise _unusable(data.name, reader.line_num if reader else 1, f"{error}") from None
        except UnicodeError as error:
            raise _unusable(
                data.name, None, f"it is not {encoding or 'UTF-8'}: {error}. Name its --encoding"
            ) from None
        except LookupError:
            raise _unusable(data.name, None, f"there is no encoding {encoding}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _unusable(data.name, None, f"it cannot be unpacked: {error}") from None


def _decoded(stream: BinaryIO, encoding: str) -> io.TextIOWrapper:
    """Return a stream's text, unpacked; closing it leaves the stream open."""
    buffered = io.BufferedReader(cast(io.RawIOBase, _LeftOpen(stream)))
    if buffered.peek(2).startswith(b"\x1f\x8b"):
        buffered = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=buffered)))
    start = buffered.peek(4)
    found = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
    return io.TextIOWrapper(buffered, encoding or found, newline="")


class _LeftOpen(io.RawIOBase):
    """A stream that somebody else closes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _from(head: str, rest: io.TextIOWrapper) -> Iterator[str]:
    yield head
    yield from rest


def _delimiter(head: str) -> str:
    """Return the sign that separates the names of the first row; names hold it least in quotes."""
    bare = "".join(part for place, part in enumerate(head.split('"')) if not place % 2)
    return max(DELIMITERS, key=bare.count)


def _places(names: Sequence[str], columns: Columns, file: str, separator: str) -> dict[str, int]:
    places = {}
    bare = [name.strip() for name in names]
    for key, name in columns.keys.items():
        if bare.count(name) != 1:
            found = ", ".join(shown(each) for each in bare[:20])
            many = "is there twice" if name in bare else "is not there"
            raise DataError(
                f"{file}: the column {name} {many}. The first row names {found} (separated by "
                f"{separator!r}).",
                code="missing_columns",
                file=file,
                line=1,
            )
        places[key] = bare.index(name)
    return places


def _row(
    cells: Sequence[str], names: Sequence[str], places: dict[str, int], file: str, line: int
) -> Row:
    if len(cells) != len(names):
        message = f"The row has {len(cells)} cells, and {len(names)} columns are named."
        return Row(file, line, None, refuse("wrong_columns", message))
    return Row(file, line, {key: cells[place] for key, place in places.items()})


def parquet_rows(path: Path, name: str, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a Parquet file, in batches.

    Args:
        path: a file of this machine.
        name: what messages call it.
    Raises:
        DataError: pyarrow is not installed, the file is no Parquet, or a column is not there or
            holds no text.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{name}: Parquet files are read with pyarrow, which is not installed. Install it with "
            "pip install 'outcrop[parquet]', or convert the file to CSV.",
            code="missing_package",
            file=name,
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, columns, name)
            wanted = list(columns.keys.values())
            line = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
                held: dict[str, list[Any]] = batch.to_pydict()
                for cells in zip(*(held[column] for column in wanted), strict=True):
                    line += 1
                    yield _parquet_row(dict(zip(columns.keys, cells, strict=True)), name, line)
    except pyarrow.ArrowException as error:
        raise _unusable(name, None, f"it is no Parquet file that can be read: {error}") from None


def _check_columns(schema: Any, columns: Columns, name: str) -> None:
    import pyarrow

    for column in columns.keys.values():
        if column not in schema.names:
            found = ", ".join(shown(each) for each in schema.names[:20])
            raise DataError(
                f"{name}: the column {column} is not there. The file has {found}.",
                code="missing_columns",
                file=name,
            )
        kind = schema.field(column).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(
                f"{name}: the column {column} holds {kind}, not strings.",
                code="wrong_type",
                file=name,
            )


def _parquet_row(value: dict[str, Any], name: str, line: int) -> Row:
    empty = [key for key, cell in value.items() if cell is None]
    if empty:
        return Row(name, line, None, refuse("wrong_type", f"{empty[0]} is null."))
    return Row(name, line, value)


def _unusable(file: str, line: int | None, reason: str) -> DataError:
    where = f"{file}, line {line}" if line else file
    return DataError(f"{where}: {reason}.", code="invalid_table", file=file, line=line)
