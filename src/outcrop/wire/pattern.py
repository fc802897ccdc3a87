"""Regular expressions of service models, matched in linear time.

Turns a pattern into a position automaton (Glushkov) whose set of states is one integer, and steps
it once a character: no input makes it back-track. Python's `re` takes exponential time on several
of Bedrock's patterns, such as `[a-zA-Z0-9](-*[a-zA-Z0-9\\+\\-\\.])*`, and a request must not stop
the gateway. AWS matches the whole value, so a pattern is always anchored at both ends.
Source: V. M. Glushkov, The abstract theory of automata (1961); G. Navarro, M. Raffinot, Flexible
Pattern Matching in Strings (2002), section 5.2; syntax and classes as in java.util.regex.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

MAX_POSITIONS = 20_000
"""The largest automaton that is built; Bedrock's largest pattern takes about 2,100."""


class PatternError(ValueError):
    """The pattern uses syntax that is not understood here."""


@lru_cache(maxsize=1024)
def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a function that says whether a whole string matches `pattern`.

    It takes time in proportion to the string's length. Understood are literals, escapes, classes,
    `.`, groups, alternatives, `* + ? {m,n}`, `^ $`, `\\d \\w \\s` (ASCII), `\\p{...}` categories.

    Raises:
        PatternError: the pattern uses anything else, or would need too large an automaton.
    """
    node = _Parser(pattern).parse()
    node = _resolve(_resolve(node, "^"), "$")
    if isinstance(node, _Repeat) and isinstance(node.item, _Class):
        return _RepeatedClass(node.item, node.minimum, node.maximum).matches
    return _Automaton(node).matches


# --- the pattern as a tree -------------------------------------------------------------------


@dataclass(frozen=True)
class _Class:
    """A set of characters: code point ranges and Unicode categories, perhaps turned around."""

    ranges: tuple[tuple[int, int], ...] = ()
    categories: tuple[str, ...] = ()
    excluded: tuple[_Class, ...] = ()
    negated: bool = False

    def holds(self, character: str) -> bool:
        code = ord(character)
        found = (
            any(low <= code <= high for low, high in self.ranges)
            or (
                bool(self.categories)
                and unicodedata.category(character).startswith(self.categories)
            )
            or any(not inner.holds(character) for inner in self.excluded)
        )
        return found is not self.negated


@dataclass(frozen=True)
class _Anchor:
    kind: str
    """`^` or `$`."""


@dataclass(frozen=True)
class _Sequence:
    items: tuple[_Node, ...]


@dataclass(frozen=True)
class _Choice:
    items: tuple[_Node, ...]
    """No items at all: nothing matches."""


@dataclass(frozen=True)
class _Repeat:
    item: _Node
    minimum: int
    maximum: int | None
    """None: without end."""


_Node = _Class | _Anchor | _Sequence | _Choice | _Repeat
_EMPTY = _Sequence(())
_NOTHING = _Choice(())

_DIGIT = ((48, 57),)
_WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE = ((9, 13), (32, 32))
_SHORTHANDS = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "a": "\a", "e": "\x1b", "0": "\0"}
_LINE_ENDS = ((10, 10), (13, 13), (0x85, 0x85), (0x2028, 0x2029))


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def parse(self) -> _Node:
        node = self.choice()
        if self.at < len(self.text):
            raise self.error("an unmatched )")
        return node

    def error(self, what: str) -> PatternError:
        return PatternError(f"{what} at character {self.at} of the pattern {self.text!r}")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self) -> str:
        if self.at >= len(self.text):
            raise self.error("an early end")
        self.at += 1
        return self.text[self.at - 1]

    def accept(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def choice(self) -> _Node:
        items = [self.sequence()]
        while self.accept("|"):
            items.append(self.sequence())
        return items[0] if len(items) == 1 else _Choice(tuple(items))

    def sequence(self) -> _Node:
        items: list[_Node] = []
        while self.peek() not in ("", "|", ")"):
            items.append(self.repeat(self.atom()))
        return items[0] if len(items) == 1 else _Sequence(tuple(items))

    def repeat(self, item: _Node) -> _Node:
        while (token := self.peek()) and token in "*+?{":
            self.at += 1
            if token == "{":
                minimum, maximum = self.bounds()
            else:
                minimum = 1 if token == "+" else 0
                maximum = 1 if token == "?" else None
            # Lazy or not, the same strings match. A possessive repeat matches fewer.
            self.accept("?")
            if self.peek() == "+":
                raise self.error("a possessive repeat")
            item = _Repeat(item, minimum, maximum)
        return item

    def bounds(self) -> tuple[int, int | None]:
        inside, found, _ = self.text[self.at :].partition("}")
        low, comma, high = inside.partition(",")
        if not found or not low.isdecimal() or (high and not high.isdecimal()):
            raise self.error("a malformed repeat")
        self.at += len(inside) + 1
        maximum = (int(high) if high else None) if comma else int(low)
        if maximum is not None and maximum < int(low):
            raise self.error("a malformed repeat")
        return int(low), maximum

    def atom(self) -> _Node:
        token = self.take()
        if token == "(":
            if self.accept("?") and not self.accept(":"):
                raise self.error("a special group")
            node = self.choice()
            if not self.accept(")"):
                raise self.error("an unmatched (")
            return node
        if token == "[":
            return self.char_class()
        if token == ".":
            return _Class(_LINE_ENDS, negated=True)
        if token in "^$":
            return _Anchor(token)
        if token == "\\":
            return self.escape()
        if token in "*+?{":
            raise self.error("a repeat of nothing")
        return _literal(token)

    def escape(self) -> _Class:
        """Read what follows a backslash."""
        token = self.take()
        if token in _SHORTHANDS:
            return _Class(_SHORTHANDS[token])
        if token.lower() in _SHORTHANDS:
            return _Class(_SHORTHANDS[token.lower()], negated=True)
        if token in "pP":
            if not self.accept("{"):
                return _Class(categories=(self.take(),), negated=token == "P")
            name, found, _ = self.text[self.at :].partition("}")
            if not found or not 1 <= len(name) <= 2 or not name[0].isupper():
                raise self.error("an unknown \\p class")
            self.at += len(name) + 1
            return _Class(categories=(name,), negated=token == "P")
        if token in "ux":
            length = 4 if token == "u" else 2
            digits = self.text[self.at : self.at + length]
            try:
                code = int(digits, 16)
            except ValueError:
                raise self.error("a malformed escape") from None
            self.at += length
            return _Class(((code, code),))
        if token in _CONTROLS:
            return _literal(_CONTROLS[token])
        if token.isalnum():
            raise self.error("an unknown escape")
        return _literal(token)

    def char_class(self) -> _Class:
        negated = self.accept("^")
        ranges: list[tuple[int, int]] = []
        categories: list[str] = []
        excluded: list[_Class] = []
        first = True
        while first or self.peek() != "]":
            if self.peek() == "[" or self.text.startswith("&&", self.at):
                raise self.error("a class within a class")
            token = self.take()
            first = False
            low = self.escape() if token == "\\" else _literal(token)
            if low.negated:
                excluded.append(_Class(low.ranges, low.categories))
                continue
            categories.extend(low.categories)
            single = len(low.ranges) == 1 and low.ranges[0][0] == low.ranges[0][1]
            after = self.text[self.at + 1 : self.at + 2]
            if single and self.peek() == "-" and after not in ("]", ""):
                self.at += 1
                token = self.take()
                high = self.escape() if token == "\\" else _literal(token)
                if len(high.ranges) == 1 and high.ranges[0][0] == high.ranges[0][1]:
                    if high.ranges[0][0] < low.ranges[0][0]:
                        raise self.error("a range that runs backwards")
                    ranges.append((low.ranges[0][0], high.ranges[0][0]))
                    continue
                raise self.error("a range that ends in a class")
            ranges.extend(low.ranges)
        self.at += 1
        return _Class(tuple(ranges), tuple(categories), tuple(excluded), negated)


def _literal(character: str) -> _Class:
    return _Class(((ord(character), ord(character)),))


# --- anchors, resolved before the automaton ----------------------------------------------------


def _nullable(node: _Node) -> bool:
    """Say whether the empty string matches; an anchor counts as empty."""
    if isinstance(node, _Class):
        return False
    if isinstance(node, _Anchor):
        return True
    if isinstance(node, _Sequence):
        return all(_nullable(item) for item in node.items)
    if isinstance(node, _Choice):
        return any(_nullable(item) for item in node.items)
    return node.minimum == 0 or _nullable(node.item)


def _has(node: _Node, kind: str) -> bool:
    if isinstance(node, _Anchor):
        return node.kind == kind
    if isinstance(node, _Repeat):
        return _has(node.item, kind)
    if isinstance(node, _Class):
        return False
    return any(_has(item, kind) for item in node.items)


def _resolve(node: _Node, kind: str, at_edge: bool = True) -> _Node:
    """Return `node` without anchors of `kind`, as it matches at the value's edge, or away from it.

    The edge is the start for `^` and the end for `$`. What stands between an anchor and the edge
    must match the empty string; elsewhere an anchor matches nothing.
    """
    if not _has(node, kind):
        return node
    if isinstance(node, _Anchor):
        return _EMPTY if at_edge else _NOTHING
    if isinstance(node, _Choice):
        return _Choice(tuple(_resolve(item, kind, at_edge) for item in node.items))
    if isinstance(node, _Repeat):
        if node.maximum == 1 or not at_edge:
            inner = _resolve(node.item, kind, at_edge)
            return _Repeat(inner, node.minimum, node.maximum)
        raise PatternError(f"an anchor {kind} inside a repeat")
    assert isinstance(node, _Sequence)
    away = [_resolve(item, kind, False) for item in node.items]
    if not at_edge:
        return _Sequence(tuple(away))
    # Walk from the edge inwards: item i is at the edge where everything outside it is empty.
    indices = range(len(away)) if kind == "^" else range(len(away) - 1, -1, -1)
    choices: list[_Node] = []
    for index in indices:
        outward = node.items[index:] if kind == "^" else node.items[: index + 1]
        if choices and not any(_has(item, kind) for item in outward):
            break  # the choice before covers it
        near = _resolve(node.items[index], kind, True)
        if kind == "^":
            choices.append(_Sequence((near, *away[index + 1 :])))
        else:
            choices.append(_Sequence((*away[:index], near)))
        if not _nullable(node.items[index]):
            break
    return _Choice(tuple(choices))


# --- the automaton -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _RepeatedClass:
    """`[...]*` and its like, which long texts have: a look at each different character."""

    char_class: _Class
    minimum: int
    maximum: int | None

    def matches(self, text: str) -> bool:
        if len(text) < self.minimum or (self.maximum is not None and len(text) > self.maximum):
            return False
        return all(map(self.char_class.holds, set(text)))


@dataclass(frozen=True)
class _Part:
    """What Glushkov's construction needs to know of a part of the pattern, as bit sets."""

    first: int
    last: int
    nullable: bool


class _Automaton:
    """State p is bit p: "the character just read was matched by position p". Bit 0 is the start."""

    def __init__(self, node: _Node) -> None:
        self._follow: list[int] = [0]
        self._masks: dict[_Class, int] = {}
        whole = self._add(node)
        self._follow[0] = whole.first
        self._accepting = whole.last | (1 if whole.nullable else 0)
        self._shifts, self._jumps = self._compress()
        self._of_character: dict[str, int] = {}

    def matches(self, text: str) -> bool:
        states = 1
        for character in text:
            mask = self._of_character.get(character)
            if mask is None:
                mask = self._mask(character)
            reached = 0
            for sources, distance in self._shifts:
                reached |= (states & sources) << distance
            for sources, targets in self._jumps:
                if states & sources:
                    reached |= targets
            states = reached & mask
            if not states:
                return False
        return bool(states & self._accepting)

    def _mask(self, character: str) -> int:
        """Return the positions that take `character`."""
        mask = 0
        for char_class, positions in self._masks.items():
            if char_class.holds(character):
                mask |= positions
        if len(self._of_character) < 1024:  # more would let clients fill the memory
            self._of_character[character] = mask
        return mask

    def _add(self, node: _Node) -> _Part:
        if isinstance(node, _Class):
            position = len(self._follow)
            if position > MAX_POSITIONS:
                raise PatternError(f"the pattern needs more than {MAX_POSITIONS} states")
            self._follow.append(0)
            self._masks[node] = self._masks.get(node, 0) | 1 << position
            return _Part(1 << position, 1 << position, False)
        if isinstance(node, _Choice):
            parts = [self._add(item) for item in node.items]
            first = last = 0
            for part in parts:
                first |= part.first
                last |= part.last
            return _Part(first, last, any(part.nullable for part in parts))
        if isinstance(node, _Sequence):
            return self._chain(node.items)
        assert isinstance(node, _Repeat), "anchors are resolved before"
        return self._add_repeat(node)

    def _chain(self, items: tuple[_Node, ...]) -> _Part:
        whole = _Part(0, 0, True)
        for item in items:
            whole = self._join(whole, self._add(item))
        return whole

    def _join(self, left: _Part, right: _Part) -> _Part:
        self._link(left.last, right.first)
        return _Part(
            left.first | (right.first if left.nullable else 0),
            right.last | (left.last if right.nullable else 0),
            left.nullable and right.nullable,
        )

    def _add_repeat(self, node: _Repeat) -> _Part:
        whole = _Part(0, 0, True)
        for _ in range(node.minimum):
            whole = self._join(whole, self._add(node.item))
        if node.maximum is None:
            if node.minimum == 0:
                item = self._add(node.item)
                self._link(item.last, item.first)
                return _Part(item.first, item.last, True)
            # x{m,}: the last copy may be taken again.
            again = self._add(node.item)
            self._link(again.last, again.first)
            return self._join(whole, _Part(again.first, again.last, True))
        # Optional copies nest, x(x(x)?)?: copy k is reached from copy k - 1 alone, which keeps the
        # transitions few. An empty x is no loss: fewer copies match the same strings.
        copies = [self._add(node.item) for _ in range(node.maximum - node.minimum)]
        last = 0
        for left, right in pairwise(copies):
            self._link(left.last, right.first)
        for part in copies:
            last |= part.last
        return self._join(whole, _Part(copies[0].first if copies else 0, last, True))

    def _link(self, sources: int, targets: int) -> None:
        for position in _bits(sources):
            self._follow[position] |= targets

    def _compress(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Write the transitions as few shifts (p to p + d) and jumps (any of P to all of Q)."""
        shifts: dict[int, int] = {}
        jumps: dict[int, int] = {}
        for position, targets in enumerate(self._follow):
            for distance in (0, 1, 2):
                if targets >> (position + distance) & 1:
                    shifts[distance] = shifts.get(distance, 0) | 1 << position
                    targets &= ~(1 << (position + distance))
            if targets:
                jumps[targets] = jumps.get(targets, 0) | 1 << position
        return (
            [(sources, distance) for distance, sources in shifts.items()],
            [(sources, targets) for targets, sources in jumps.items()],
        )


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
