"""The linear matcher against a back-tracking one, and against hostile values."""

from __future__ import annotations

import random
import time

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.protocol.values import sample

from outcrop.wire.model import SERVICES, service_model
from outcrop.wire.pattern import PatternError, compile_pattern

SHAPES = [
    (f"{service}.{name}", shape)
    for service in SERVICES
    for name in service_model(service).shape_names
    for shape in [service_model(service).shape_for(name)]
    if "pattern" in shape.metadata
]
# STS writes \u10000 for a character beyond 16 bits, which every reader takes apart differently.
PATTERNS = sorted({shape.metadata["pattern"] for _, shape in SHAPES})
COMPARED = [pattern for pattern in PATTERNS if "u10000" not in pattern]


_OUTSIDE = {
    "\\d": "[0-9]",
    "\\w": "[0-9A-Za-z_]",
    "\\s": "[\\t-\\r ]",
    "\\D": "[^0-9]",
    "\\W": "[^0-9A-Za-z_]",
    "\\S": "[^\\t-\\r ]",
    ".": "[^\n\r\x85\u2028\u2029]",
}
_INSIDE = {
    "\\d": "0-9",
    "\\w": "0-9A-Za-z_",
    "\\s": "\\t-\\r ",
    "\\S": "\\x00-\\x08\\x0e-\\x1f!-\U0010ffff",
}


def _oracle(pattern: str, text: str) -> bool:
    """Match as the back-tracking `regex` package does, with Java's `.` and ASCII classes."""
    parts: list[str] = []
    in_class = False
    for token in regex.findall(r"\\p\{\w+\}|\\.|.", pattern, flags=regex.DOTALL):
        parts.append((_INSIDE if in_class else _OUTSIDE).get(token, token))
        in_class = token == "[" or (in_class and token != "]")
    return regex.fullmatch("".join(parts), text, timeout=20) is not None


def test_every_pattern_of_every_model_compiles() -> None:
    assert len(PATTERNS) > 110
    for pattern in PATTERNS:
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", COMPARED, ids=lambda pattern: pattern[:40])
def test_it_agrees_with_a_back_tracking_matcher(pattern: str) -> None:
    rng = random.Random(pattern)
    matches = compile_pattern(pattern)
    agreed = {True: 0, False: 0}
    for number in range(60):
        text = sample(pattern, rng, 1 + number % 5)
        if number % 3:
            text = _damage(text, rng)
        expected = _oracle(pattern, text)
        assert matches(text) is expected, text
        agreed[expected] += 1
    assert agreed[True]


def _damage(text: str, rng: random.Random) -> str:
    letters = "aZ0-_./: +$@^~é\u0301\n\r\t\x85\u2028"
    at = rng.randrange(len(text) + 1)
    return rng.choice(
        [
            text[:at] + rng.choice(letters) + text[at:],
            text[:at] + text[at + 1 :],
            text[:at] + rng.choice(letters) + text[at + 1 :],
            text[at:] + text[:at],
            text + text,
        ]
    )


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        "[ab]",
        "[^a]",
        ".",
        "\\w",
        "[a-c-]",
        "\\.",
        "[\\d_]",
        "\\S",
        "\\p{L}",
        "(?:ab|b)",
        "",
    ]
)
REPEATS = st.sampled_from(["", "*", "+", "?", "{2}", "{0,3}", "{1,}", "{2,4}", "*?"])
MADE = st.recursive(
    st.builds(lambda atom, repeat: f"{atom}{repeat}" if atom else "", ATOMS, REPEATS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.builds(lambda part, repeat: f"({part}){repeat}", inner, REPEATS),
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(pattern=MADE, text=st.text(alphabet="ab0._-é\n", max_size=10))
def test_made_up_patterns_agree_too(pattern: str, text: str) -> None:
    assert compile_pattern(pattern)(text) is _oracle(pattern, text)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (".*(^abc$)|(^x)", ["abc", "x"], ["zabc", "abcx", "", "xx"]),
        ("(a|^)b", ["ab", "b"], ["aab", "a"]),
        ("a$|b(c|$)d?", ["a", "b", "bc", "bcd"], ["bd", "ad"]),
        ("(^a?)(^b)", ["b"], ["ab", "a"]),
        ("(^a)?b", ["ab", "b"], ["a"]),
        ("", [""], ["a"]),
        ("[]a]+", ["]a"], ["b"]),
        ("[^\\S\\n]+", [" \t"], ["\n", "a"]),
        ("\\u0041\\x42\\t", ["AB\t"], ["AB"]),
        ("\\P{L}\\pL\\p{Lu}", ["1aA"], ["aaA", "1aa"]),
        ("\\D\\W\\S", ["a-b"], ["1-b", "aab", "a- "]),
        ("a.c", ["abc", "a\U0001f600c"], ["a\nc", "a\u2028c", "ac"]),
    ],
)
def test_corners_of_the_syntax(pattern: str, yes: list[str], no: list[str]) -> None:
    matches = compile_pattern(pattern)
    assert [text for text in yes if not matches(text)] == []
    assert [text for text in no if matches(text)] == []


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a{2", "a{x}", "a{3,2}", "*a", "[a", "[a&&b]", "[[a]]", "(?=a)", "(?<n>a)", "a++",
     "\\1", "\\bx", "\\p{Greek}", "\\p{", "\\uZZZZ", "[b-a]", "[a-\\d]", "\\", "(^a){2}",
     "(a{1,1000}){1,1000}"],
)  # fmt: skip
def test_syntax_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        compile_pattern(pattern)


HOSTILE = ["-", "a", "a-", "a.", "a:", "a_", "a/", ".", "1", "arn:aws:bedrock:a:", " ", "é", "A9-"]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=lambda value: str(value)[:60])
def test_no_value_takes_long(name: str, shape: object) -> None:
    limits = shape.metadata  # type: ignore[attr-defined]
    matches = compile_pattern(limits["pattern"])
    size = min(int(limits.get("max", 25_000)), 25_000)
    budget = 0.08 if size <= 2048 else 0.8
    prefixes = ["", "a", sample(limits["pattern"], random.Random(name), 2)]
    for unit in HOSTILE:
        for prefix in prefixes:
            text = (prefix + unit * size)[: size - 1] + "\x00"
            seconds = min(_seconds(matches, text) for _ in range(3))
            assert seconds < budget, (name, unit, seconds)


def _seconds(matches: object, text: str) -> float:
    started = time.perf_counter()
    assert callable(matches)
    matches(text)
    return time.perf_counter() - started


def test_the_worst_patterns_refuse_the_worst_values_in_milliseconds() -> None:
    model = service_model("bedrock")
    for name, text in (
        ("JobName", "a" + "-" * 2046 + "!"),
        ("ModelInvocationJobName", "a" + "-" * 61 + "!"),
        ("CustomModelName", "a-" * 1023 + "a!"),
        ("BaseModelIdentifier", "a." + "a-" * 1022 + "!"),
        ("ProvisionedModelId", "a_" * 12_500 + "!"),
    ):
        matches = compile_pattern(model.shape_for(name).metadata["pattern"])
        assert not matches(text)
        seconds = min(_seconds(matches, text) for _ in range(3))
        assert seconds < (0.02 if len(text) < 3000 else 0.1), (name, seconds)
