"""Lines of a data file: what is let pass, and what is refused with file, line and code."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.read import MAX_LINE_BYTES, read_lines, scan_lines
from outcrop.errors import DataError

FILE = "s3://bucket/train.jsonl"


def read(content: bytes) -> list[tuple[int, dict[str, Any]]]:
    return list(read_lines(io.BytesIO(content), FILE))


def refusal(content: bytes) -> DataError:
    with pytest.raises(DataError) as raised:
        read(content)
    return raised.value


def test_lines_keep_their_numbers_over_blank_ones() -> None:
    assert read(b'{"a": 1}\n\n \t\n{"b": 2}') == [(1, {"a": 1}), (4, {"b": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_let_pass() -> None:
    assert read(b'\xef\xbb\xbf{"a": "x"}\r\n{"b": "y"}\r\n') == [(1, {"a": "x"}), (2, {"b": "y"})]


def test_search_for_a_key_that_stands_twice_takes_no_longer_than_reading() -> None:
    names = [*(str(number) for number in range(30_000)), "29999"]
    line = ("{" + ", ".join(f'"{name}": 1' for name in names) + "}").encode()
    began = time.process_time()
    (found,) = scan_lines(io.BytesIO(line), FILE)
    assert [finding.code for finding in found.findings] == ["duplicate_key"]
    assert time.process_time() - began < 3


def test_unicode_line_separators_do_not_end_a_line() -> None:
    assert read('{"a": "x\u2028y\u0085z"}\n'.encode()) == [(1, {"a": "x\u2028y\u0085z"})]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"{'a': 1}", "invalid_json", "at character 2"),
        (b'{"a": 1,}', "invalid_json", "It is not JSON"),
        (b'{"a": 1', "invalid_json", "It is not JSON"),
        (b'{"a": 1} {"b": 2}', "invalid_json", "Extra data at character 10"),
        (b'\xef\xbb\xbf{"a": 1}', "invalid_json", "It is not JSON"),
        (b'{"a": "\x07"}', "invalid_json", "Invalid control character"),
        (b"[" * 100_000, "invalid_json", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json", "a number is too long"),
        (b'{"a": "\x00"}', "null_byte", "NUL"),
        (b'{"a": "\x83J"}', "invalid_utf8", "Byte 8 of the line is not UTF-8"),
        (b'{"a": "cut \xe3\x82"}', "invalid_utf8", "not UTF-8"),
        (b"[1]", "not_an_object", "an array"),
        (b'"text"', "not_an_object", "a string"),
        (b"null", "not_an_object", "null"),
        (b"true", "not_an_object", "a boolean"),
        (b"4.5", "not_an_object", "a number"),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_its_place(
    line: bytes, code: str, says: str
) -> None:
    error = refusal(b'{"good": 1}\n' + line + b'\n{"good": 2}\n')
    assert (error.code, error.file, error.line) == (code, FILE, 2)
    assert str(error).startswith(
        f"Unable to parse Amazon S3 file: {FILE}. Data files must conform to JSONL format. Line 2: "
    )
    assert says in str(error)
    assert len(str(error)) < 400
    assert pickle.loads(pickle.dumps(error)).code == code


@pytest.mark.parametrize("line", [b'{"a": 1, "a": 2}', b'{"x": {"a": 1, "a": 2}}'])
def test_a_key_that_stands_twice_is_said_and_the_last_one_counts(line: bytes) -> None:
    (found,) = scan_lines(io.BytesIO(line), FILE)
    assert [(finding.code, finding.value) for finding in found.findings] == [
        ("duplicate_key", "'a'")
    ]
    assert found.value == json.loads(line)
    assert read(line) == [(1, json.loads(line))]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n\t\n"])
def test_a_file_without_records_is_refused(content: bytes) -> None:
    error = refusal(content)
    assert (error.code, error.line) == ("empty_file", None)
    assert "holds no record" in str(error)


def test_a_line_longer_than_the_limit_is_refused_without_being_read() -> None:
    class Endless(io.RawIOBase):
        """Gives the same letter for ever, and counts."""

        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            buffer[:] = b"a" * len(buffer)
            Endless.given += len(buffer)
            return len(buffer)

    with pytest.raises(DataError, match="Input size exceeded in file") as raised:
        list(read_lines(io.BufferedReader(Endless()), FILE))
    assert (raised.value.code, raised.value.line) == ("too_long", 1)
    assert Endless.given < 2 * MAX_LINE_BYTES


# What JSONL files are made of, and what breaks them.
PIECES = st.sampled_from(
    [
        *(
            b"{}",
            b'{"a": 1}',
            b'{"a": "\\u00e9"}',
            b'{"a": 1, "a": 2}',
            b"[1]",
            b"null",
            b"{'a': 1}",
        ),
        *(
            b"\n",
            b"\r\n",
            b"\n\n",
            b" ",
            b"\xef\xbb\xbf",
            b"\xff",
            b"\0",
            b"\xe2\x80\xa8",
            b"9" * 5000,
        ),
        *(b'{"a": 1e999}', b'{"a": NaN}', b'{"a": "\\ud83d"}', b"[" * 3000),
    ]
)


@given(st.lists(PIECES | st.binary(max_size=20), max_size=20).map(b"".join), st.integers(1, 40))
def test_where_a_file_is_cut_into_chunks_makes_no_difference(content: bytes, size: int) -> None:
    whole = list(scan_lines(io.BytesIO(content), FILE))
    cut = list(scan_lines(io.BytesIO(content), FILE, chunk_bytes=size))
    assert repr(cut) == repr(whole)  # NaN is not equal to itself


@given(st.lists(PIECES | st.binary(max_size=20), max_size=20).map(b"".join))
def test_every_line_of_any_bytes_is_yielded_once_with_its_number_and_a_reason(
    content: bytes,
) -> None:
    if content.startswith(b"\x1f\x8b"):
        return
    lines = list(scan_lines(io.BytesIO(content), FILE))
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line.number for line in lines] == list(range(1, len(expected) + 1))
    for line, raw in zip(lines, expected, strict=True):
        bare = raw.removeprefix(b"\xef\xbb\xbf") if line.number == 1 else raw
        assert line.is_blank == (not bare.strip(b" \t\r\n"))
        assert line.value is not None or line.findings
        assert all(finding.message.isprintable() for finding in line.findings)
        assert line.value is None or line.raw.decode() is not None


def test_a_long_line_is_passed_over_and_the_next_one_is_read() -> None:
    long = b'{"a": "' + b"x" * (2 * MAX_LINE_BYTES) + b'"}'
    content = b'{"b": 1}\n' + long + b'\n{"c": 2}\n' + long
    found = list(scan_lines(io.BytesIO(content), FILE))
    assert [(line.number, line.value) for line in found] == [
        (1, {"b": 1}),
        (2, None),
        (3, {"c": 2}),
        (4, None),
    ]
    assert [line.findings[-1].code for line in found if line.value is None] == ["too_long"] * 2
    assert max(len(line.raw) for line in found) < 1000


def test_a_line_of_gigabytes_is_passed_over_in_bounded_memory() -> None:
    class Long(io.RawIOBase):
        """A line of 256 MiB, and one after it; blocks are made as they are asked for."""

        left = 256 * 2**20

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            if self.left <= 0:
                tail = b'\n{"b": 1}\n' if self.left == 0 else b""
                self.left = -1
                buffer[: len(tail)] = tail
                return len(tail)
            size = min(len(buffer), self.left)
            buffer[:size] = b"a" * size
            self.left -= size
            return size

    tracemalloc.start()
    try:
        found = list(scan_lines(io.BufferedReader(Long()), FILE))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(line.number, line.value) for line in found] == [(1, None), (2, {"b": 1})]
    assert peak < 4 * MAX_LINE_BYTES


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_packed_file_is_read_as_if_it_were_not(size: int) -> None:
    content = b"\n".join(b'{"a": %d}' % number for number in range(500))
    packed = gzip.compress(content[:2000]) + gzip.compress(content[2000:])  # two members
    found = scan_lines(io.BytesIO(packed), FILE, chunk_bytes=size)
    assert [(line.number, line.value) for line in found] == [
        (number + 1, {"a": number}) for number in range(500)
    ]


def test_a_packed_file_that_breaks_off_or_is_damaged_is_refused() -> None:
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    for damaged in (packed[:-20], packed[:20] + b"\0" * 20 + packed[40:], b"\x1f\x8b"):
        error = refusal(damaged)
        assert error.code == "invalid_gzip"
        assert "cannot be unpacked" in str(error)


def test_numbers_beyond_a_float_and_nesting_without_end_are_no_json() -> None:
    for line in (b'{"a": 1e999}', b'{"a": -1e999}', b'{"a": ' * 100_000):
        (found,) = scan_lines(io.BytesIO(line), FILE)
        assert [finding.code for finding in found.findings] == ["invalid_json"]


@given(st.binary(max_size=300))
def test_any_bytes_are_either_objects_or_a_refusal(content: bytes) -> None:
    found: list[tuple[int, dict[str, Any]]] = []
    refused: DataError | None = None
    try:
        found = read(content)
    except DataError as error:
        refused = error
    assert all(isinstance(value, dict) for _, value in found)
    assert bool(found) != (refused is not None and bool(refused.code))
    assert str(refused).isprintable()


@given(
    st.lists(
        st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=4), min_size=1
    )
)
def test_whatever_json_writes_is_read_back(values: list[dict[str, Any]]) -> None:
    content = "\n".join(json.dumps(value) for value in values)
    assert [value for _, value in read(content.encode())] == values


def test_every_real_data_set_is_read(shared_data: Path) -> None:
    for file in sorted(shared_data.glob("*-train.jsonl")):
        with file.open("rb") as stream:
            lines = list(read_lines(stream, file.name))
        assert [number for number, _ in lines] == list(range(1, len(lines) + 1))
