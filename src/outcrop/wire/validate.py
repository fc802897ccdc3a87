"""An operation's input against the constraints of its model, in AWS's own wording.

Checks what botocore's client leaves to the server as well: required members, types, length, range,
pattern, enum, and that a union has exactly one member. All violations go into one message. Knows no
operation by name, and nothing of rules that the model does not state.
Source: Smithy 2.0, "Constraint traits"; the wording is that of AWS's services, for instance
`1 validation error detected: Value '...' at 'jobName' failed to satisfy constraint: Member must
have length less than or equal to 63`.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from botocore.model import Shape

from outcrop.errors import ValidationException
from outcrop.wire.document import shorten
from outcrop.wire.model import is_document
from outcrop.wire.pattern import PatternError, compile_pattern

MAX_SHOWN_VALUE = 200
"""Characters of an offending value that are quoted."""

MAX_SHOWN_VIOLATIONS = 10
"""Violations that are spelled out in one message; the others are counted."""

_TYPES: dict[str, tuple[type, ...]] = {
    "structure": (dict,),
    "map": (dict,),
    "list": (list, tuple),
    "string": (str,),
    "char": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (float, int),
    "double": (float, int),
    "boolean": (bool,),
    "blob": (bytes, bytearray),
    "timestamp": (datetime,),
}
_LENGTH_TYPES = frozenset({"string", "char", "list", "map", "blob"})


def validate(shape: Shape, params: dict[str, Any]) -> None:
    """Refuse `params` unless it satisfies every constraint of `shape`.

    Args:
        shape: the input shape of an operation.
        params: as parse_request() returns it.
    Raises:
        ValidationException: at least one constraint is violated; the message names each with its
            value (unless the model marks it as sensitive), where it stands and what is allowed.
    """
    violations: list[str] = []
    _check(shape, params, "", violations)
    if not violations:
        return
    count = len(violations)
    shown = violations[:MAX_SHOWN_VIOLATIONS]
    if count > len(shown):
        shown.append(f"and {count - len(shown)} more")
    raise ValidationException(
        f"{count} validation error{'s' if count > 1 else ''} detected: {'; '.join(shown)}"
    )


def _check(shape: Shape, value: Any, where: str, violations: list[str]) -> None:
    kind = shape.type_name
    if kind == "structure" and is_document(shape):
        return
    if not _has_type(kind, value):
        _violate(shape, value, where, f"Member must be of type {kind}", violations)
        return
    if kind == "structure":
        _check_structure(shape, value, where, violations)
        return
    _check_limits(shape, value, where, violations)
    if kind == "list":
        for index, item in enumerate(value, 1):
            _check_item(shape.member, item, f"{where}.{index}.member", violations)
    elif kind == "map":
        for key, item in value.items():
            # AWS's form for both is vaguer: it quotes the whole map.
            _check_item(shape.key, key, f"{where}.key", violations)
            _check_item(shape.value, item, f"{where}.{shorten(str(key))}", violations)


def _check_item(shape: Shape, value: Any, where: str, violations: list[str]) -> None:
    if value is None:
        _violate(shape, value, where, "Member must not be null", violations)
    else:
        _check(shape, value, where, violations)


def _check_structure(
    shape: Shape, value: dict[str, Any], where: str, violations: list[str]
) -> None:
    prefix = f"{where}." if where else ""
    for name in shape.required_members:
        if value.get(name) is None:
            _violate(
                shape.members[name], None, prefix + name, "Member must not be null", violations
            )
    for name, member in shape.members.items():
        item = value.get(name)
        if item is not None:
            _check(member, item, prefix + name, violations)
    if shape.is_tagged_union:
        found = [name for name in shape.members if value.get(name) is not None]
        if len(found) != 1:
            what = f"found {', '.join(found)}" if found else "found none"
            violations.append(
                f"Value at '{shorten(where, MAX_SHOWN_VALUE)}' failed to satisfy constraint: "
                f"Exactly one member must be set out of [{', '.join(shape.members)}], {what}"
            )


def _check_limits(shape: Shape, value: Any, where: str, violations: list[str]) -> None:
    limits = shape.metadata
    if not limits:
        return
    allowed = limits.get("enum")
    if allowed and value not in allowed:
        rule = f"Member must satisfy enum value set: [{', '.join(allowed)}]"
        _violate(shape, value, where, rule, violations)
        return
    kind = shape.type_name
    size, noun = (len(value), "length") if kind in _LENGTH_TYPES else (value, "value")
    minimum, maximum = limits.get("min"), limits.get("max")
    pattern = limits.get("pattern")
    too_long = maximum is not None and size > maximum
    # A value that is too long has its reason already, and is not worth matching.
    if pattern is not None and not too_long and not _matches(pattern, value):
        rule = f"Member must satisfy regular expression pattern: {pattern}"
        _violate(shape, value, where, rule, violations)
    if minimum is not None and size < minimum:
        rule = f"Member must have {noun} greater than or equal to {minimum}"
        _violate(shape, value, where, rule, violations)
    if too_long:
        rule = f"Member must have {noun} less than or equal to {maximum}"
        _violate(shape, value, where, rule, violations)


def _matches(pattern: str, value: str) -> bool:
    try:
        return compile_pattern(pattern)(value)
    except PatternError:
        # LIMIT: a future model may use syntax that only a back-tracking matcher knows. Then the
        # value passes here; a test compiles every pattern of the models that are installed.
        return True


def _has_type(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES.get(kind, (object,)))


def _violate(shape: Shape, value: Any, where: str, rule: str, violations: list[str]) -> None:
    if value is None:
        subject = "Value null"
    elif shape.metadata.get("sensitive") or isinstance(value, (bytes, bytearray)):
        subject = "Value"
    else:
        subject = f"Value '{shorten(_show(value), MAX_SHOWN_VALUE)}'"
    violations.append(
        f"{subject} at '{shorten(where, MAX_SHOWN_VALUE)}' failed to satisfy constraint: {rule}"
    )


def _show(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list, tuple)):
        # Only the beginning is shown, so only the beginning is written.
        return "".join(_beginning(json.JSONEncoder(default=str).iterencode(value)))
    return str(value)


def _beginning(parts: Any) -> Any:
    size = 0
    for part in parts:
        yield part
        size += len(part)
        if size > MAX_SHOWN_VALUE:
            return
