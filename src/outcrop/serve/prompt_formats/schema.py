"""Check a body of JSON against the fields a model family knows, in Bedrock's words.

Turns bytes into a dict of which every value has its type and lies in its range, with defaults
filled in, or raises ValidationException. Bedrock checks bodies with a JSON schema library whose
messages show in its errors (`#/temperature: 2 is not less or equal to 1`); the same words are used
here. Knows no family and no model.

Source: the texts are those of org.everit.json.schema, as seen in answers of the live service.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from outcrop.errors import ApiError, ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.wire.document import read_json

Kind = Literal["string", "number", "integer", "boolean", "strings", "object", "objects", "any"]

TRY_AGAIN = "please reformat your input and try again."
MAX_SHOWN = 80
"""Characters of a client's own text that an error repeats."""
MAX_VIOLATIONS = 10
"""Violations an error spells out; their number is always told."""
MAX_STOP_SEQUENCE = 1000
"""Characters of one stop sequence. LIMIT: ours; Bedrock publishes none for text models."""
MAX_STOP_SEQUENCES = 2500
"""Source: Converse's inferenceConfig.stopSequences; families with a limit of their own have it."""


@dataclass(frozen=True)
class Field:
    """One key of a body."""

    kind: Kind
    default: Any = None
    minimum: float | None = None
    """Of a number; the least length of a string or list."""
    maximum: float | None = None
    """Of a number; the greatest length of a list."""
    above: float | None = None
    """A number must be greater than this."""
    required: bool = False
    enum: tuple[str, ...] = ()
    fields: Mapping[str, Field] | None = None
    """Keys of an object, or of every object of a list."""


Fields: TypeAlias = Mapping[str, Field]


def parse_object(body: bytes) -> dict[str, Any]:
    """Read a body as a JSON object.

    Raises:
        ValidationException: the body is not an object in strict JSON, as `wire.document` reads it.
    """
    if not body.strip():
        refuse_json("The body is empty.")
    try:
        value = read_json(body.removeprefix(codecs.BOM_UTF8))
    except ApiError as error:
        refuse_json(error.message)
    if not isinstance(value, dict):
        refuse(f"#: expected type: JSONObject, found: {_type_name(value)}")
    return value


def check(value: Mapping[str, Any], fields: Fields, path: str = "#") -> dict[str, Any]:
    """Return the value with defaults for what is absent.

    Args:
        path: where the value is, for the error.
    Raises:
        ValidationException: one or more keys are missing, unknown, of a wrong type or out of range.
    """
    violations: list[str] = []
    checked = _object(value, fields, path, violations)
    if len(violations) == 1:
        refuse(violations[0])
    if violations:
        shown = "; ".join(violations[:MAX_VIOLATIONS])
        raise ValidationException(
            f"Malformed input request: {len(violations)} schema violations found, {TRY_AGAIN} "
            f"{shown}"
        )
    return checked


def refuse(violation: str) -> NoReturn:
    """Raise Bedrock's error for one violation, such as `#/prompt: ...`."""
    raise ValidationException(f"Malformed input request: {violation}, {TRY_AGAIN}")


def refuse_json(reason: str) -> NoReturn:
    """Raise Bedrock's error for a body that cannot be read, with the reason after it."""
    raise ValidationException(f"Malformed input request, {TRY_AGAIN} {reason}")


def check_takes_messages(base: BaseModel) -> None:
    """Refuse a conversation with a model that has no form for one.

    Raises:
        ValidationException: so it is.
    """
    if not base.takes_messages:
        raise ValidationException(
            f"The model {base.full_name} doesn't support conversations: it was imported without a "
            "chat template. Use InvokeModel with a prompt, or import it with a chat_template in "
            "tokenizer_config.json."
        )


def check_max_tokens(requested: int | None, limit: int) -> int | None:
    """Return `requested`, unless the model's limit is lower; None asks for what there is room for.

    Raises:
        ValidationException: the limit is lower.
    """
    if requested is not None and requested > limit:
        raise ValidationException(
            f"The maximum tokens you requested exceeds the model limit of {limit}. Try again with "
            f"a maximum tokens value that is lower than {limit}."
        )
    return requested


def _object(
    value: Mapping[str, Any], fields: Fields, path: str, violations: list[str]
) -> dict[str, Any]:
    violations += [
        f"{path}: required key [{name}] not found"
        for name, field in fields.items()
        if field.required and name not in value
    ]
    violations += [
        f"{path}: extraneous key [{_shown(name)}] is not permitted"
        for name in value
        if name not in fields
    ]
    checked = {}
    for name, field in fields.items():
        if name in value:
            checked[name] = _value(value[name], field, f"{path}/{name}", violations)
        elif field.kind == "object" and field.fields is not None and not field.required:
            checked[name] = _object({}, field.fields, f"{path}/{name}", violations)
        else:
            checked[name] = field.default
    return checked


def _value(value: Any, field: Field, path: str, violations: list[str]) -> Any:
    wanted = _TYPES[field.kind]
    if wanted and not _is(value, wanted):
        violations.append(f"{path}: expected type: {wanted}, found: {_type_name(value)}")
        return value
    if field.kind in ("number", "integer"):
        violations += _range(value, field, path)
    elif field.kind == "string":
        violations += _string(value, field, path)
    elif field.kind == "object" and field.fields is not None:
        return _object(value, field.fields, path, violations)
    elif field.kind in ("strings", "objects"):
        return _list(value, field, path, violations)
    return value


def _range(value: float, field: Field, path: str) -> Iterable[str]:
    if field.minimum is not None and value < field.minimum:
        yield f"{path}: {value} is not greater or equal to {field.minimum:g}"
    if field.above is not None and value <= field.above:
        yield f"{path}: {value} is not greater than {field.above:g}"
    if field.maximum is not None and value > field.maximum:
        yield f"{path}: {value} is not less or equal to {field.maximum:g}"


def _string(value: str, field: Field, path: str) -> Iterable[str]:
    if field.minimum is not None and len(value) < field.minimum:
        yield f"{path}: expected minLength: {field.minimum:g}, actual: {len(value)}"
    if field.maximum is not None and len(value) > field.maximum:
        yield f"{path}: expected maxLength: {field.maximum:g}, actual: {len(value)}"
    if field.enum and value not in field.enum:
        yield (
            f"{path}: {_shown(value)} is not a valid enum value "
            f"(it must be one of {', '.join(field.enum)})"
        )


def _list(value: list[Any], field: Field, path: str, violations: list[str]) -> list[Any]:
    if field.minimum is not None and len(value) < field.minimum:
        violations.append(
            f"{path}: expected minimum item count: {field.minimum:g}, found: {len(value)}"
        )
    if field.maximum is not None and len(value) > field.maximum:
        violations.append(
            f"{path}: expected maximum item count: {field.maximum:g}, found: {len(value)}"
        )
        return value
    item = _STRING_ITEM if field.kind == "strings" else Field("object", fields=field.fields)
    return [_value(each, item, f"{path}/{place}", violations) for place, each in enumerate(value)]


def _is(value: Any, type_name: str) -> bool:
    found = _type_name(value)
    return found == type_name or (type_name == "Number" and found == "Integer")


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "Boolean"
    for kind, name in _TYPE_NAMES.items():
        if isinstance(value, kind):
            return name
    return "Null"


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


_TYPE_NAMES: dict[type, str] = {
    str: "String",
    int: "Integer",
    float: "Number",
    dict: "JSONObject",
    list: "JSONArray",
}
_TYPES: dict[Kind, str] = {
    "string": "String",
    "number": "Number",
    "integer": "Integer",
    "boolean": "Boolean",
    "strings": "JSONArray",
    "objects": "JSONArray",
    "object": "JSONObject",
    "any": "",
}
_STRING_ITEM = Field("string", minimum=1, maximum=MAX_STOP_SEQUENCE)
