"""Wrong requests, made from a service model: one broken constraint each, with what must be said.

Walks an input shape member by member, nested ones too. Around each place everything else is valid
and as small as the model allows, so that only that place can be what is refused.

LIMIT: a path label that is empty or missing is another path, which is no mistake in a member; a
blob that is longer than 100,000 bytes is not made; a shape inside itself is walked once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex  # type: ignore[import-untyped]
from botocore.model import OperationModel, Shape
from tests.protocol.values import Values

MAX_SIZE = 100_000
_FOREIGN = ("!", " ", "\n", "é", "{", "a b", "..", "-", "/", "🙂", "x")
"""Texts of which most patterns allow none, and each pattern that means anything forbids one."""
_WRONG: dict[str, tuple[Any, ...]] = {
    "string": (7, True, [], {}),
    "integer": ("x", True, 1.5, [], 2**31),
    "long": ("x", True, 1.5, [], 2**63),
    "float": ("x", True, []),
    "double": ("x", True, []),
    "boolean": ("true", 1, []),
    "list": ("x", {}, 7),
    "map": ("x", [], 7),
    "structure": ("x", [], 7),
    "blob": (7, [], "no base64!"),
    "timestamp": ("yesterday", True, []),
}
"""By a shape's type: JSON values of another one."""
_WRONG_TEXTS: dict[str, tuple[str, ...]] = {
    "integer": ("x", "1.5", "", "9" * 12),
    "boolean": ("yes", "1", ""),
    "timestamp": ("yesterday", ""),
}
"""The same for members that travel as text, where most text is of the right type."""


@dataclass(frozen=True)
class Variant:
    """One wrong request."""

    what: str
    """The place and how it is broken, for who reads a failure."""
    params: dict[str, Any]
    code: str
    """Of the error that must come: ValidationException or SerializationException."""
    says: str
    """What its message must hold: the place, in quotes, and the constraint."""


@dataclass(frozen=True)
class _Broken:
    """A value of a shape that is wrong in one place."""

    value: Any
    path: str
    """From the shape on, with a leading dot: `.tags.1.member.key`; empty is the shape itself."""
    how: str
    rule: str
    """What the message says of the constraint; empty where the type is wrong."""


@cache
def variants(operation: OperationModel) -> tuple[Variant, ...]:
    """Return every wrong request of an operation that the model lets one think of."""
    shape = operation.input_shape
    if shape is None:
        return ()
    found = []
    for broken in _structure(shape, ()):
        where = broken.path.removeprefix(".")
        code = "ValidationException" if broken.rule else "SerializationException"
        if not broken.rule:
            says = f"'{where[:200]}"
        elif broken.rule.startswith("Exactly one"):
            says = f"Value at '{where}' failed to satisfy constraint: {broken.rule}"
        else:
            says = f" at '{where}' failed to satisfy constraint: {broken.rule}"
        found.append(Variant(f"{where}: {broken.how}", broken.value, code, says))
    return tuple(found)


def valid(operation: OperationModel, seed: int, optional: float) -> dict[str, Any]:
    """Return a request that the model allows; `optional` is the share of what may be absent."""
    shape = operation.input_shape
    if shape is None:
        return {}
    drawn = Values((operation.name, seed, optional), optional).draw(shape)
    assert isinstance(drawn, dict)
    return drawn


def _least(shape: Shape) -> Any:
    """Return a small valid value, the same for a shape every time."""
    return _drawn(_Key(shape, shape.serialization.get("location")))


@dataclass(frozen=True)
class _Key:
    """A shape as a key: botocore makes a new object at every look."""

    shape: Shape
    location: str | None

    def __hash__(self) -> int:
        return hash((self.shape.name, self.location))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (self.shape.name, self.location) == (
            other.shape.name,
            other.location,
        )


@cache
def _drawn(key: _Key) -> Any:
    return Values(("least", key.shape.name), 0.0).draw(key.shape, location=key.location)


def _structure(shape: Shape, above: tuple[str, ...]) -> Iterator[_Broken]:
    members = shape.members
    # A union has one member at a time; elsewhere what is required stays around the broken place.
    base = (
        {}
        if shape.is_tagged_union
        else {name: _least(members[name]) for name in shape.required_members}
    )
    for name, member in members.items():
        location = member.serialization.get("location")
        if member.serialization.get("eventstream") or name == shape.serialization.get("payload"):
            continue
        if name in base and location != "uri":
            without = {key: value for key, value in base.items() if key != name}
            yield _Broken(without, f".{name}", "missing", "Member must not be null")
            if location is None:
                yield _Broken({**base, name: None}, f".{name}", "null", "Member must not be null")
        for broken in _value(member, location, above):
            yield _Broken(
                {**base, name: broken.value}, f".{name}{broken.path}", broken.how, broken.rule
            )
    if shape.is_tagged_union:
        rule = f"Exactly one member must be set out of [{', '.join(members)}], found"
        yield _Broken({}, "", "no member", f"{rule} none")
        for first, second in zip(list(members), list(members)[1:], strict=False):
            both = {name: _least(members[name]) for name in (first, second)}
            yield _Broken(both, "", "two members", f"{rule} {first}, {second}")


def _value(shape: Shape, location: str | None, above: tuple[str, ...]) -> Iterator[_Broken]:
    kind = shape.type_name
    if shape.name in above or (kind == "structure" and shape.is_document_type):
        return
    wrong = _WRONG[kind] if location is None else _WRONG_TEXTS.get(kind, ())
    for value in wrong:
        yield _Broken(value, "", f"{value!r:.20} for {kind}", "")
    yield from _limits(shape, location)
    above = (*above, shape.name)
    if kind == "structure":
        yield from _structure(shape, above)
    elif kind == "list":
        yield from _list(shape, location, above)
    elif kind == "map":
        yield from _map(shape, above)


def _list(shape: Shape, location: str | None, above: tuple[str, ...]) -> Iterator[_Broken]:
    rest = [_least(shape.member)] * (max(1, int(shape.metadata.get("min", 0))) - 1)
    if location is None:
        null = [None, *rest]
        yield _Broken(null, ".1.member", "null in a list", "Member must not be null")
    for broken in _value(shape.member, location, above):
        yield _Broken([broken.value, *rest], f".1.member{broken.path}", broken.how, broken.rule)


def _map(shape: Shape, above: tuple[str, ...]) -> Iterator[_Broken]:
    key = _least(shape.key)
    yield _Broken({key: None}, f".{key}", "null in a map", "Member must not be null")
    for broken in _value(shape.value, None, above):
        yield _Broken({key: broken.value}, f".{key}{broken.path}", broken.how, broken.rule)
    for broken in _limits(shape.key, None):
        yield _Broken({broken.value: _least(shape.value)}, ".key", broken.how, broken.rule)


def _limits(shape: Shape, location: str | None) -> Iterator[_Broken]:
    kind, limits = shape.type_name, shape.metadata
    low, high = limits.get("min"), limits.get("max")
    if limits.get("enum"):
        rule = f"Member must satisfy enum value set: [{', '.join(limits['enum'])}]"
        first = str(limits["enum"][0])
        for value in ("NoSuchValue", first.swapcase(), first + "x"):
            if value not in limits["enum"]:
                yield _Broken(value, "", f"{value} of an enum", rule)
        return
    noun = "value" if kind in ("integer", "long", "float", "double") else "length"
    if low is not None and not (location == "uri" and low <= 1):
        for value in _below(shape, low):
            rule = f"Member must have {noun} greater than or equal to {low}"
            yield _Broken(value, "", f"below {low}", rule)
    if high is not None and (noun == "value" or high < MAX_SIZE):
        rule = f"Member must have {noun} less than or equal to {high}"
        for value in _above(shape, high):
            yield _Broken(value, "", f"above {high}", rule)
    if limits.get("pattern"):
        rule = f"Member must satisfy regular expression pattern: {limits['pattern']}"
        for value in _foreign(shape, location):
            yield _Broken(value, "", f"{value!r:.40} against the pattern", rule)


def _below(shape: Shape, low: Any) -> Iterator[Any]:
    kind = shape.type_name
    if kind in ("integer", "long"):
        yield int(low) - 1
    elif kind in ("float", "double"):
        yield low - 1
    elif low > 0:
        size = int(low) - 1
        if kind == "list":
            yield [_least(shape.member)] * size
        elif kind == "map":
            yield _pairs(shape, size)
        else:
            yield b"x" * size if kind == "blob" else "x" * size


def _above(shape: Shape, high: Any) -> Iterator[Any]:
    kind = shape.type_name
    if kind in ("integer", "long"):
        if int(high) + 1 < 2**31:
            yield int(high) + 1
    elif kind in ("float", "double"):
        yield high + 1
    elif kind == "list":
        yield [_least(shape.member)] * (int(high) + 1)
    elif kind == "map":
        yield _pairs(shape, int(high) + 1)
    else:
        size = int(high) + 1
        yield b"x" * size if kind == "blob" else "x" * size


def _pairs(shape: Shape, size: int) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    seed = 0
    while len(pairs) < size:
        pairs[Values(("key", seed), 0.0).draw(shape.key)] = _least(shape.value)
        seed += 1
    return pairs


def _foreign(shape: Shape, location: str | None) -> list[str]:
    """Return up to three texts of an allowed length that the pattern does not allow."""
    limits = shape.metadata
    low, high = int(limits.get("min", 0)), int(limits.get("max", MAX_SIZE))
    good = _least(shape)
    tried = [good + "\n", " " + good, good + "é", *_FOREIGN]
    tried += [text * max(1, low) for text in _FOREIGN]
    found: list[str] = []
    for text in tried:
        if location == "header" and not (text.isascii() and text.isprintable()):
            continue  # HTTP has no form for it
        if location == "uri" and text in ("", ".", ".."):
            continue
        fits = low <= len(text) <= high and text not in found
        if fits and not regex.fullmatch(limits["pattern"], text, timeout=5):
            found.append(text)
    return found[:3]
