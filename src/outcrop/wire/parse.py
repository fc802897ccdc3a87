"""An HTTP request to the input of an operation.

Takes each member from where the model says it travels: path, query, header, payload or JSON body,
and converts it to Python's type for its shape. Says what cannot be read at all; whether a value is
allowed is validate.py's to say. Knows no operation by name.
Source: Smithy 2.0, "HTTP binding traits" and "AWS restJson1 protocol"; "AWS query protocol".
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl

from botocore.model import OperationModel, ServiceModel, Shape

from outcrop.errors import ApiError
from outcrop.wire.document import (
    describe,
    read_json,
    read_json_object,
    serialization_error,
    shorten,
)
from outcrop.wire.model import is_document, wire_name
from outcrop.wire.route import Route

MAX_QUERY_FIELDS = 1000
"""The most name=value pairs in a query or a form."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]{0,400})?|\.[0-9]{1,400})([eE][+-]?[0-9]{1,4})?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INTEGER_BITS = {"integer": 32, "long": 64}


def parse_request(
    route: Route, *, query: str, headers: Mapping[str, str], body: bytes
) -> dict[str, Any]:
    """Return the input of a rest-json operation; what was not sent or is null is left out.

    Args:
        query: the raw query, without the question mark.
        headers: names in lower case.
        body: the whole body. A member that is an event stream is left out.
    Returns:
        Members by their name in the model: str, int, float, bool, bytes (blobs), aware UTC datetime
        (timestamps), list, dict. Nulls inside lists and maps stay, for validate() to refuse.
    Raises:
        ApiError: SerializationException 400: the body is not a JSON object, or a value is not of
            its member's type. The message names the member.
    """
    shape = route.operation.input_shape
    payload = shape.serialization.get("payload")
    fields: list[tuple[str, str]] | None = None
    document: dict[str, Any] | None = None
    params: dict[str, Any] = {}
    for name, member in shape.members.items():
        traits = member.serialization
        location = traits.get("location")
        key = traits.get("name", name)
        value: Any
        if location == "uri":
            value = _scalar(member, route.path_params.get(key), name)
        elif location == "querystring":
            if fields is None:
                fields = _fields(query, "query")
            value = _from_query(shape, member, key, fields, name)
        elif location == "header":
            value = _from_header(member, headers.get(key.lower()), name)
        elif location == "headers":
            value = _prefixed(member, key.lower(), headers)
        elif name == payload:
            value = _from_payload(member, body, name)
        else:
            assert payload is None, f"{name} is neither the payload nor anywhere else"
            if document is None:
                document = read_json_object(body)
            value = convert(member, document.get(key), name)
        if value is not None:
            params[name] = value
    return params


def convert(shape: Shape, value: Any, where: str) -> Any:
    """Return a JSON value as Python's type for `shape`; None stays None.

    Args:
        where: the member's path, for the message.
    Raises:
        ApiError: SerializationException 400, if the value is of another type than the shape.
    """
    if value is None:
        return None
    kind = shape.type_name
    if kind == "string":
        return value if isinstance(value, str) else _mismatch(where, "a string", value)
    if kind == "structure":
        return _structure(shape, value, where)
    if kind == "list":
        if not isinstance(value, list):
            return _mismatch(where, "an array", value)
        return [
            convert(shape.member, item, f"{where}.{index}.member")
            for index, item in enumerate(value, 1)
        ]
    if kind == "map":
        if not isinstance(value, dict):
            return _mismatch(where, "an object", value)
        return {key: convert(shape.value, item, f"{where}.{key}") for key, item in value.items()}
    if kind == "boolean":
        return value if isinstance(value, bool) else _mismatch(where, "a boolean", value)
    if kind in _INTEGER_BITS:
        return _integer(value, where, _INTEGER_BITS[kind])
    if kind in ("float", "double"):
        return _float(value, where)
    if kind == "timestamp":
        return _timestamp(value, where)
    assert kind == "blob", f"{shape.name} is of a new type"
    return _blob(value, where)


def parse_query_request(
    service: ServiceModel, body: bytes, *, query: str = ""
) -> tuple[OperationModel, dict[str, Any]]:
    """Return the operation and the input that a request in the query protocol holds.

    Args:
        service: the model of the service that was called, such as `sts`.
        body: the form, `Action=GetCallerIdentity&Version=2011-06-15`.
        query: the raw query, read where the body is empty (a GET).
    Raises:
        ApiError: MissingAction or InvalidAction 400, if there is no such operation;
            SerializationException 400, if the form or a value cannot be read.
    """
    try:
        text = body.decode("ascii") or query
    except UnicodeDecodeError:
        raise serialization_error("The form is not ASCII; percent-encode its values.") from None
    form = dict(_fields(text, "form"))
    action = form.get("Action", "")
    if not action:
        raise ApiError(
            "The request must contain the parameter Action.", code="MissingAction", http_status=400
        )
    version = form.get("Version", service.api_version)
    if action not in service.operation_names or version != service.api_version:
        raise ApiError(
            f"Could not find operation {shorten(action)} for version {shorten(version)}.",
            code="InvalidAction",
            http_status=400,
        )
    operation = service.operation_model(action)
    return operation, _form_structure(operation.input_shape, form, "", 0) or {}


def _structure(shape: Shape, value: Any, where: str) -> Any:
    if is_document(shape):
        return value
    if not isinstance(value, dict):
        return _mismatch(where, "an object", value)
    result: dict[str, Any] = {}
    for name, member in shape.members.items():
        item = value.get(wire_name(member, name))
        if item is not None:
            result[name] = convert(member, item, f"{where}.{name}" if where else name)
    return result


def _mismatch(where: str, wanted: str, value: Any) -> Any:
    raise serialization_error(
        f"The member '{shorten(where, 200)}' must be {wanted}, but it is {describe(value)}."
    )


def _integer(value: Any, where: str, bits: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _mismatch(where, "an integer", value)
    if isinstance(value, float) and not value.is_integer():
        raise serialization_error(
            f"The member '{shorten(where, 200)}' must be an integer, but it is {value}."
        )
    number = int(value)
    if not -(1 << (bits - 1)) <= number < 1 << (bits - 1):
        raise serialization_error(
            f"The member '{shorten(where, 200)}' must be an integer of {bits} bits, "
            f"but it is {shorten(str(number))}."
        )
    return number


def _float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _mismatch(where, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise serialization_error(
            f"The member '{shorten(where, 200)}' is a number too large for a double."
        ) from None


def _blob(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        _mismatch(where, "a string of base64", value)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise serialization_error(
            f"The member '{shorten(where, 200)}' must be base64, with its padding."
        ) from None


def _timestamp(value: Any, where: str) -> datetime:
    """Read a time in any of the three forms of AWS; a time without an offset is UTC."""
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _EPOCH + timedelta(seconds=value)
        if isinstance(value, str):
            if _NUMBER.fullmatch(value):
                return _EPOCH + timedelta(seconds=float(value))
            if value[:1].isdigit():
                found = datetime.fromisoformat(value)
            else:
                found = parsedate_to_datetime(value)
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError, TypeError, IndexError):
        pass
    shown = shorten(value) if isinstance(value, str) else describe(value)
    raise serialization_error(
        f"The member '{shorten(where, 200)}' must be a time such as 2026-01-02T03:04:05Z, "
        f"but it is {shown!a}."
    )


def _scalar(shape: Shape, text: str | None, where: str) -> Any:
    """Convert the text of a path label, a query value or a header."""
    if text is None:
        return None
    kind = shape.type_name
    if kind == "string":
        return text
    if kind in _INTEGER_BITS:
        if not _INTEGER.fullmatch(text):
            raise serialization_error(
                f"The member '{where}' must be an integer, but it is {shorten(text)!a}."
            )
        return _integer(int(text), where, _INTEGER_BITS[kind])
    if kind in ("float", "double"):
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not math.isfinite(number):
            raise serialization_error(
                f"The member '{where}' must be a number, but it is {shorten(text)!a}."
            )
        return number
    if kind == "boolean":
        if text not in ("true", "false"):
            raise serialization_error(
                f"The member '{where}' must be true or false, but it is {shorten(text)!a}."
            )
        return text == "true"
    return convert(shape, text, where)


def _fields(text: str, what: str) -> list[tuple[str, str]]:
    if not text:
        return []
    try:
        fields = parse_qsl(
            text, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except UnicodeDecodeError:
        raise serialization_error(f"The {what} is not UTF-8 once it is decoded.") from None
    except ValueError:
        raise serialization_error(
            f"The {what} has more than {MAX_QUERY_FIELDS} fields, the most allowed."
        ) from None
    if not text.isascii() or any("\0" in name or "\0" in value for name, value in fields):
        raise serialization_error(
            f"The {what} holds U+0000, or characters that must be percent-encoded."
        )
    return fields


def _from_query(
    parent: Shape, shape: Shape, key: str, fields: list[tuple[str, str]], where: str
) -> Any:
    if shape.type_name == "map":
        return _query_map(parent, shape, fields, where) or None
    values = [value for name, value in fields if name == key]
    if not values:
        return None
    if shape.type_name == "list":
        return [
            _scalar(shape.member, value, f"{where}.{index}.member")
            for index, value in enumerate(values, 1)
        ]
    return _scalar(shape, values[0], where)


def _query_map(
    parent: Shape, shape: Shape, fields: list[tuple[str, str]], where: str
) -> dict[str, Any]:
    """Collect the fields that no other member claims."""
    claimed = {
        wire_name(member, name)
        for name, member in parent.members.items()
        if member.serialization.get("location") == "querystring" and member.type_name != "map"
    }
    result: dict[str, Any] = {}
    for name, value in fields:
        if name in claimed:
            continue
        if shape.value.type_name == "list":
            items = result.setdefault(name, [])
            items.append(_scalar(shape.value.member, value, f"{where}.{name}"))
        else:
            result.setdefault(name, _scalar(shape.value, value, f"{where}.{name}"))
    return result


def _from_header(shape: Shape, text: str | None, where: str) -> Any:
    if text is None:
        return None
    if shape.serialization.get("jsonvalue"):
        return read_json(_blob(text, where))
    if shape.type_name == "list":
        # An HTTP date has a comma of its own, before the day of the month.
        is_time = shape.member.type_name == "timestamp"
        items = re.split(r",(?!\s*[0-9]{2} )", text) if is_time else text.split(",")
        return [_scalar(shape.member, item.strip(), where) for item in items]
    return _scalar(shape, text, where)


def _prefixed(shape: Shape, prefix: str, headers: Mapping[str, str]) -> dict[str, Any] | None:
    found = {
        name[len(prefix) :]: value for name, value in headers.items() if name.startswith(prefix)
    }
    return found or None


def _from_payload(shape: Shape, body: bytes, where: str) -> Any:
    if shape.serialization.get("eventstream"):
        return None
    if shape.type_name == "blob":
        return body or None
    if shape.type_name == "string":
        try:
            return body.decode("utf-8") or None
        except UnicodeDecodeError:
            raise serialization_error(f"The body, which is '{where}', is not UTF-8.") from None
    if not body.strip():
        return None
    return convert(shape, read_json(body), where)


_MAX_FORM_DEPTH = 16


def _form_value(shape: Shape, form: Mapping[str, str], prefix: str, depth: int) -> Any:
    if shape.type_name == "structure":
        return _form_structure(shape, form, prefix, depth)
    if shape.type_name == "list":
        flat = shape.serialization.get("flattened")
        base = prefix if flat else f"{prefix}.{shape.member.serialization.get('name', 'member')}"
        items: list[Any] = []
        while (
            item := _form_value(shape.member, form, f"{base}.{len(items) + 1}", depth)
        ) is not None:
            items.append(item)
        return items if items or form.get(prefix) == "" else None
    if shape.type_name == "map":
        base = prefix if shape.serialization.get("flattened") else f"{prefix}.entry"
        key_name = shape.key.serialization.get("name", "key")
        value_name = shape.value.serialization.get("name", "value")
        result: dict[str, Any] = {}
        index = 1
        while (key := form.get(f"{base}.{index}.{key_name}")) is not None:
            result[key] = _form_value(shape.value, form, f"{base}.{index}.{value_name}", depth)
            index += 1
        return result or None
    return _scalar(shape, form.get(prefix), prefix)


def _form_structure(
    shape: Shape, form: Mapping[str, str], prefix: str, depth: int
) -> dict[str, Any] | None:
    if depth > _MAX_FORM_DEPTH:
        return None
    start = f"{prefix}." if prefix else ""
    result: dict[str, Any] = {}
    for name, member in shape.members.items():
        value = _form_value(member, form, start + wire_name(member, name), depth + 1)
        if value is not None:
            result[name] = value
    return result or None
