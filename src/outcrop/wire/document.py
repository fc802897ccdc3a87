"""A request's body as JSON, read strictly.

Turns bytes into the JSON object they hold and refuses what a lenient reader lets through: text that
is not UTF-8, NaN and infinities, keys that occur twice, nesting without end, U+0000 and halves of
surrogate pairs (no database and no UTF-8 answer takes those two). Knows no shape and no operation.
Source: RFC 8259; SerializationException is what AWS answers to a body it cannot read.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from outcrop.errors import ApiError

MAX_DEPTH = 100
"""How deep arrays and objects may nest."""

_MAX_INTEGER_DIGITS = 400  # more than any double has; beyond it, converting is itself slow
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)


def serialization_error(message: str) -> ApiError:
    """Return the error for a request whose form cannot be read at all."""
    return ApiError(message, code="SerializationException", http_status=400)


def read_json_object(body: bytes) -> dict[str, Any]:
    """Return the object that `body` holds; an empty body is an empty object.

    Raises:
        ApiError: SerializationException 400, which says where the body stops being JSON.
    """
    value = read_json(body)
    if not isinstance(value, dict):
        raise serialization_error(
            f"The body must be a JSON object, but it is {describe(value)}. Send {{...}}."
        )
    return value


def read_json(body: bytes) -> Any:
    """Return the JSON value that `body` holds; an empty body is an empty object.

    Raises:
        ApiError: SerializationException 400, which says where the body stops being JSON.
    """
    if not body.strip():
        return {}
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise serialization_error(
            f"The body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}."
        ) from None
    _check_depth(body)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except json.JSONDecodeError as error:
        raise serialization_error(
            f"The body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    if "\\u" in text:
        _check_characters(value)
    return value


def describe(value: Any) -> str:
    """Return what kind of JSON value this is, for a message: `a number`, `null`, ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an array" if isinstance(value, list) else "an object"


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKENS.finditer(body):
        first = token.group()[:1]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise serialization_error(
                    f"The body nests deeper than {MAX_DEPTH} levels, the most allowed."
                )
        elif first in b"]}":
            depth -= 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        count = Counter(key for key, _ in pairs)
        twice = next(key for key in count if count[key] > 1)
        raise serialization_error(f"The body has the key {shorten(twice)!a} twice in one object.")
    return result


def _refuse_constant(name: str) -> Any:
    raise serialization_error(f"The body holds {name}, which is not JSON.")


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise serialization_error(f"The body holds the number {shorten(text)}, which is too large.")
    return value


def _bounded_int(text: str) -> int:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise serialization_error(f"The body holds the number {shorten(text)}, which is too large.")
    return int(text)


def _check_characters(value: Any) -> None:
    """Refuse escapes that UTF-8 or a database cannot hold; looks at every string in `value`."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise serialization_error(
            f"The body holds half a surrogate pair, \\u{ord(text[error.start]):04x}, in a string."
        ) from None
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise serialization_error("The body holds the character U+0000 in a string.")


def shorten(text: str, limit: int = 100) -> str:
    """Return `text`, cut to `limit` characters and marked where something was left out."""
    return text if len(text) <= limit else text[:limit] + "..."
