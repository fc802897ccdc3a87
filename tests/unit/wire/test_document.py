"""JSON bodies, read strictly."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError
from outcrop.wire.document import MAX_DEPTH, read_json, read_json_object

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), inner
        )
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(JSON, st.booleans())
def test_all_json_is_read_as_it_was_meant(value: object, ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert read_json(body) == value


@pytest.mark.parametrize("body", [b"", b"  \r\n"])
def test_no_body_is_an_empty_object(body: bytes) -> None:
    assert read_json_object(body) == {}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": }', "line 1, column 7"),
        (b'{"a": 1}\n,', "line 2, column 1"),
        (b"\xff\xfe", "byte 0 is 0xff"),
        (b'{"a": "\xc3("}', "not UTF-8: byte 7"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b'{"a": {"\xc3\xa9": 1, "\xc3\xa9": 3}}', r"'\xe9' twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": "\\u0000"}', "U+0000"),
        (b'{"a": "\x00"}', "not JSON"),
        (b'{"a": 1', "line 1, column 8"),
        (b"[]", "an array"),
        (b"null", "null"),
        (b'"x"', "a string"),
        (b"true", "a boolean"),
        (b"3", "a number"),
    ],
)
def test_what_is_not_a_json_object_is_refused_with_its_reason(body: bytes, said: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_json_object(body)
    assert (caught.value.code, caught.value.http_status) == ("SerializationException", 400)
    assert said in caught.value.message
    assert len(caught.value.message) < 300


def test_escapes_that_only_look_like_nul_pass() -> None:
    assert read_json(b'{"a": "\\\\u0000", "b": "\\ud83d\\ude00"}') == {
        "a": "\\u0000",
        "b": "\U0001f600",
    }


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":['])
def test_endless_nesting_is_refused_without_recursion(opening: bytes) -> None:
    body = opening * 300_000
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        read_json(body)
    assert "deeper" in caught.value.message
    assert time.perf_counter() - started < 2


def test_brackets_in_strings_do_not_count_as_nesting() -> None:
    text = "[{" * 1000 + '\\"[['
    assert read_json(json.dumps({"a": text}).encode()) == {"a": text}
    allowed = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert read_json(allowed)
    assert len(read_json(b"[" + b"[]," * 5000 + b"[]]")) == 5001


def test_broken_quoting_takes_no_more_than_linear_time() -> None:
    body = b"[" * 101 + b'"' + b'\\"' * 500_000
    started = time.perf_counter()
    with pytest.raises(ApiError):
        read_json(body)
    assert time.perf_counter() - started < 2


@settings(deadline=None)
@given(st.one_of(st.binary(), st.text(alphabet='{}[]",:\\u0019eE.-ntf').map(str.encode)))
def test_no_bytes_raise_anything_but_an_api_error(body: bytes) -> None:
    refused: ApiError | None = None
    try:
        read_json_object(body)
    except ApiError as error:
        refused = error
    assert refused is None or refused.code == "SerializationException"
