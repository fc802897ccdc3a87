"""Values for shapes of a service model: drawn at random, and valid.

Strings are made from their pattern by walking Python's own parse of it, and are checked with the
`regex` package; so nothing here leans on the code under test.
"""

from __future__ import annotations

import importlib
import random
import string
from datetime import UTC, datetime, timedelta
from typing import Any

import regex  # type: ignore[import-untyped]
from botocore.model import Shape

_PARSER: Any = importlib.import_module("re._parser")
_TEXT = string.ascii_letters + string.digits + " /:+%&=?#'\"<>\\~,;éßЖ中😀\t"
_MAX_DEPTH = 9


class Values:
    """Draws values; `optional` is the share of optional members that are present."""

    def __init__(self, seed: object, optional: float) -> None:
        self.random = random.Random(repr(seed))
        self.optional = optional

    def draw(self, shape: Shape, depth: int = 0, *, location: str | None = None) -> Any:
        """Return a value that satisfies every constraint of `shape`."""
        kind = shape.type_name
        if kind == "structure":
            return self._structure(shape, depth)
        if kind == "list":
            size = self._size(shape, 2 if depth < _MAX_DEPTH else 0)
            return [self.draw(shape.member, depth + 1, location=location) for _ in range(size)]
        if kind == "map":
            size = self._size(shape, 2)
            result: dict[str, Any] = {}
            while len(result) < size:
                result[self.draw(shape.key, depth + 1)] = self.draw(shape.value, depth + 1)
            return result
        if kind == "string":
            return self._string(shape, location)
        if kind == "blob":
            return self.random.randbytes(self._size(shape, 40))
        if kind == "boolean":
            return self.random.random() < 0.5
        if kind == "timestamp":
            moment = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(
                milliseconds=self.random.randrange(10**12)
            )
            return (
                moment.replace(microsecond=0) if location in ("header", "querystring") else moment
            )
        low, high = shape.metadata.get("min", -1000), shape.metadata.get("max", 100_000)
        if kind in ("integer", "long"):
            return self.random.randint(int(low), max(int(low), int(high)))
        assert kind in ("float", "double"), kind
        return self.random.uniform(float(low), float(high))

    def document(self, depth: int = 0) -> Any:
        """Return free JSON."""
        choice = self.random.randrange(7 if depth < 3 else 5)
        if choice == 5:
            return [self.document(depth + 1) for _ in range(self.random.randrange(3))]
        if choice == 6:
            return {self._text(1, 5): self.document(depth + 1) for _ in range(2)}
        return (None, True, self.random.randint(-(10**15), 10**15), 0.25, self._text(0, 9))[choice]

    def _structure(self, shape: Shape, depth: int) -> Any:
        if shape.is_document_type:
            return {self._text(1, 5): self.document()}
        if shape.is_tagged_union:
            # The deeper, the rather a member that does not go deeper.
            names = list(shape.members)
            if depth >= _MAX_DEPTH:
                names.sort(key=lambda name: shape.members[name].type_name in ("structure", "list"))
                names = names[:1]
            name = self.random.choice(names)
            return {name: self.draw(shape.members[name], depth + 1)}
        result: dict[str, Any] = {}
        for name, member in shape.members.items():
            location = member.serialization.get("location")
            if member.serialization.get("eventstream") or member.serialization.get("eventpayload"):
                continue
            wanted = depth < _MAX_DEPTH and self.random.random() < self.optional
            if name in shape.required_members or wanted:
                result[name] = self.draw(member, depth + 1, location=location)
        return result

    def _size(self, shape: Shape, extra: int) -> int:
        low = int(shape.metadata.get("min", 0))
        high = int(shape.metadata.get("max", low + extra))
        return self.random.randint(low, max(low, min(high, low + extra)))

    def _string(self, shape: Shape, location: str | None) -> str:
        limits = shape.metadata
        if limits.get("enum"):
            return str(self.random.choice(limits["enum"]))
        low, high = int(limits.get("min", 0)), int(limits.get("max", 10**6))
        if location == "uri":
            low = max(low, 1)
        pattern = limits.get("pattern")
        if pattern is None:
            size = low + self.random.randrange(max(1, min(30, high - low + 1)))
            return self._header(size) if location == "header" else self._text(low, size)
        # Longer ones are made by stretching repeats, where the pattern alone gives short ones.
        for attempt in range(2000):
            text = sample(pattern, self.random, 2 + attempt % 60)
            if location == "uri" and text in (".", ".."):
                continue  # no HTTP client sends a dot segment
            if low <= len(text) <= high and regex.fullmatch(pattern, text, timeout=5):
                return text
        raise AssertionError(f"no value found for {shape.name}: {pattern}")

    def _text(self, low: int, high: int) -> str:
        return "".join(self.random.choice(_TEXT) for _ in range(self.random.randint(low, high)))

    def _header(self, size: int) -> str:
        # A value without text at its ends: HTTP strips white space there.
        inner = "".join(self.random.choice(string.ascii_letters + " /;=") for _ in range(size))
        return f"x{inner.strip()}y"[: max(size, 1)].strip()


def sample(pattern: str, rng: random.Random, stretch: int = 3) -> str:
    """Return a string that probably matches `pattern`; anchors are taken as empty."""
    plain = pattern.replace("\\p{L}[", "[A-Za-zé][")
    for name, letters in (("L", "A-Za-zé"), ("M", "\u0301"), ("N", "0-9"), ("Z", " ")):
        plain = plain.replace(f"\\p{{{name}}}", letters)
    return "".join(_sample(token, rng, stretch) for token in _PARSER.parse(plain))


def _sample(token: Any, rng: random.Random, stretch: int) -> str:
    name, value = str(token[0]), token[1]
    if name == "LITERAL":
        return chr(value)
    if name == "NOT_LITERAL":
        return "x"
    if name == "ANY":
        return rng.choice("aZ0-/.")
    if name == "AT":
        return ""
    if name == "SUBPATTERN":
        return "".join(_sample(inner, rng, stretch) for inner in value[3])
    if name == "BRANCH":
        return "".join(_sample(inner, rng, stretch) for inner in rng.choice(value[1]))
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, inner = value
        count = rng.randint(low, min(int(high), low + stretch))
        return "".join(_sample(item, rng, stretch) for _ in range(count) for item in inner)
    assert name == "IN", name
    if str(value[0][0]) == "NEGATE":
        return "x"
    choice, detail = rng.choice(value)
    if str(choice) == "LITERAL":
        return chr(detail)
    if str(choice) == "RANGE":
        return chr(rng.randint(detail[0], min(detail[1], detail[0] + 90)))
    return {"CATEGORY_DIGIT": "7", "CATEGORY_WORD": "w", "CATEGORY_SPACE": " "}.get(
        str(detail), "S"
    )
