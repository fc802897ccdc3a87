"""CSV and Parquet as people write them."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data.facts import DataFile
from outcrop.data.sources import local_file
from outcrop.data.tables import Columns, csv_rows, parquet_rows
from outcrop.errors import DataError

COLUMNS = Columns(prompt="question", completion="answer")


def data(content: bytes) -> DataFile:
    return DataFile("a.csv", "training", lambda: io.BytesIO(content))


def rows(content: bytes, columns: Columns = COLUMNS, **options: str) -> list[Any]:
    found = list(csv_rows(data(content), columns, **options))
    return [row.value if row.value is not None else (row.line, row.finding) for row in found]


TABLE = 'id,question,answer\n1,"Is it, ""really"",\nopen?",Yes\n2,When?,"At 9\r\no\'clock"\n\n'
EXPECTED = [
    {"prompt": 'Is it, "really",\nopen?', "completion": "Yes"},
    {"prompt": "When?", "completion": "At 9\r\no'clock"},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_is_read_whatever_its_mark_and_line_ends(encoding: str) -> None:
    assert rows(TABLE.encode(encoding)) == EXPECTED
    assert rows(gzip.compress(TABLE.encode(encoding))) == EXPECTED
    crlf = 'question,answer\r\n"a\nb",c\r\n'
    assert rows(crlf.encode(encoding)) == [{"prompt": "a\nb", "completion": "c"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_out(delimiter: str) -> None:
    content = f'"question",answer\n"a{delimiter}b",c\n'.replace(",", delimiter)
    assert rows(content.encode()) == [{"prompt": f"a{delimiter}b", "completion": "c"}]


def test_delimiter_and_encoding_can_be_named() -> None:
    content = "question:answer\ncafé:à\n".encode("cp1252")
    found = rows(content, delimiter=":", encoding="cp1252")
    assert found == [{"prompt": "café", "completion": "à"}]
    with pytest.raises(DataError, match="not UTF-8"):
        rows("question,answer\ncafé,a\n".encode("cp1252"))
    with pytest.raises(DataError, match="no encoding klingon"):
        rows(content, encoding="klingon")


def test_one_column_becomes_documents() -> None:
    assert rows(b"text\n a\n", Columns(input="text")) == [{"input": " a"}]


def test_a_column_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(DataError, match=r"column question is not there.*names query, answer"):
        rows(b"query,answer\na,b\n")
    with pytest.raises(DataError, match="there twice"):
        rows(b"question,answer,answer\na,b,c\n")
    for content in (b"", b"\n"):
        with pytest.raises(DataError, match="no first row"):
            rows(content)


def test_a_row_of_another_width_is_refused_with_its_line() -> None:
    found = rows(b'question,answer\n"a\nb",c\nd\ne,f\n')
    assert found[0] == {"prompt": "a\nb", "completion": "c"}
    line, finding = found[1]
    assert (line, finding.code) == (4, "wrong_columns")
    assert found[2] == {"prompt": "e", "completion": "f"}


def test_a_quote_that_does_not_end_is_refused() -> None:
    with pytest.raises(DataError, match="line 2"):
        rows(b'question,answer\n"a,b\n')


@pytest.mark.parametrize(
    "names", [{}, {"prompt": "a"}, {"prompt": "a", "completion": "b", "input": "c"}]
)
def test_columns_for_neither_or_both_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(DataError, match="Name the columns"):
        Columns(**names)


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@settings(deadline=None)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5), st.sampled_from(",;\t|"))
def test_what_a_csv_writer_wrote_is_read(cells: list[tuple[str, str]], delimiter: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("question", "answer"), *cells])
    found = rows(out.getvalue().encode())
    assert found == [{"prompt": one, "completion": other} for one, other in cells]


def test_parquet_rows_become_pairs_and_nulls_are_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {"question": ["a", "b", None], "answer": ["c", "d\ne", "f"], "number": [1, 2, 3]}
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    found = list(parquet_rows(path, "a.parquet", COLUMNS))
    assert [row.value for row in found[:2]] == [
        {"prompt": "a", "completion": "c"},
        {"prompt": "b", "completion": "d\ne"},
    ]
    assert found[2].finding is not None
    assert found[2].finding.message == "prompt is null."
    with pytest.raises(DataError, match=r"column text is not there.*question, answer, number"):
        list(parquet_rows(path, "a.parquet", Columns(input="text")))
    with pytest.raises(DataError, match="holds int64"):
        list(parquet_rows(path, "a.parquet", Columns(input="number")))
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="no Parquet file"):
        list(parquet_rows(path, "a.parquet", COLUMNS))


def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'outcrop\[parquet\]'"):
        list(parquet_rows(tmp_path / "a.parquet", "a.parquet", COLUMNS))


def test_a_table_on_disk_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(TABLE.encode())
    assert [row.value for row in csv_rows(local_file(path), COLUMNS)] == EXPECTED
