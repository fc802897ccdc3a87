"""Calls of tools in an answer that comes in pieces."""

from __future__ import annotations

import json
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.records import ToolCall
from outcrop.models.templates import HERMES, LLAMA, MISTRAL, ToolFormat
from outcrop.serve.tool_calls import CallScanner, Found, joined, new_call_id, scan

FORMS = (HERMES, LLAMA, MISTRAL)
PARIS = {"city": "Paris"}
CALL = {"name": "look", "arguments": PARIS}


def scanner(form: ToolFormat) -> CallScanner:
    numbers = count(1)
    return CallScanner(form, ["look", "find"], lambda: f"id{next(numbers)}")


def found(form: ToolFormat, text: str) -> list[Found]:
    return list(scan(scanner(form), text))


def call(number: int = 1, name: str = "look", arguments: Any = None) -> ToolCall:
    return ToolCall(f"id{number}", name, PARIS if arguments is None else arguments)


@pytest.mark.parametrize(
    ("form", "text", "wanted"),
    [
        (HERMES, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", [call()]),
        (HERMES, f"I look.\n<tool_call>{json.dumps(CALL)}</tool_call>\n", ["I look.", call()]),
        (
            HERMES,
            f"<tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>"
            '{"name": "find", "arguments": {}}</tool_call> Wait.',
            [call(), call(2, "find", {}), "Wait."],
        ),
        (HERMES, f"<tool_call>{json.dumps(CALL)}", [call()]),
        (
            HERMES,
            '<tool_call>{"name": "look", "arguments": {"a": "</tool_call>"}}</tool_call>',
            [call(arguments={"a": "</tool_call>"})],
        ),
        (LLAMA, '{"name": "look", "parameters": {"city": "Paris"}}', [call()]),
        (LLAMA, f"<|python_tag|>{json.dumps(CALL)}", [call()]),
        (LLAMA, f" {json.dumps(CALL)}; {json.dumps(CALL)}", [call(), call(2)]),
        (LLAMA, "It is warm.", ["It is warm."]),
        (MISTRAL, f"[TOOL_CALLS] [{json.dumps(CALL)}, {json.dumps(CALL)}]", [call(), call(2)]),
        (MISTRAL, f"[TOOL_CALLS]{json.dumps(CALL)}", [call()]),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "look", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]',
            [call()],
        ),
    ],
)
def test_calls_are_taken_out_of_the_text(form: ToolFormat, text: str, wanted: list[Found]) -> None:
    assert found(form, text) == wanted


MALFORMED = [
    '{"name": "look", "arguments": {"city": ',
    '{"name": "look", "arguments": {"city": "Paris"}',
    '{"name": "unknown", "arguments": {}}',
    '{"name": "look", "arguments": "Paris"}',
    '{"name": "look"}',
    '{"name": ["look"], "arguments": {}}',
    '{"name": "look", "arguments": {"a": NaN}}',
    '{"name": "look", "arguments": {"a": 1e999}}',
    '{"name": "look", "arguments": {"a": 1, "a": 2}}',
    '{"name": "look", "arguments": {"a": "\\ud800"}}',
    '{"name": "look", "arguments": {"a": ' + "[" * 200 + "]" * 200 + "}}",
    "[]",
    "[1, 2]",
    '"look"',
    "look(city='Paris')",
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("text", MALFORMED)
def test_what_only_looks_like_a_call_stays_text_to_the_last_character(
    form: ToolFormat, text: str
) -> None:
    answer = f"{form.marker}{text}{form.end}"
    assert found(form, answer) == [answer]


def test_a_malformed_call_does_not_hide_a_good_one_after_it() -> None:
    bad = '<tool_call>{"name": "none", "arguments": {}}</tool_call>'
    good = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    assert found(HERMES, bad + good) == [bad, call()]


def test_an_answer_of_json_that_is_no_call_stays_text() -> None:
    assert found(LLAMA, ' {"a": 1} ') == [' {"a": 1} ']


def test_text_is_released_at_once_and_a_call_only_whole() -> None:
    one = scanner(HERMES)
    assert one.add("Let me ") == ["Let me"]
    assert one.add("see <to") == [" see"]
    assert one.add("ol_call>{") == []
    assert one.add('"name": "look", "arguments": {"city": "Paris"}') == []
    assert one.add("}") == [call()]
    assert one.add("</tool_call>") == []
    assert one.finish() == []


def test_text_that_only_began_like_a_mark_is_released() -> None:
    one = scanner(HERMES)
    assert one.add("a <tool") == ["a"]
    assert one.add("box>") == [" <toolbox>"]
    assert one.add(" <tool_ca") == []
    assert one.finish() == [" <tool_ca"]


def test_what_the_answer_was_made_to_begin_with_counts() -> None:
    one = scanner(MISTRAL)
    before, after = MISTRAL.starts
    assert one.add(before + "look" + after) == []
    assert one.add(' {"city": "Paris"}}]') == [call()]


def test_every_call_has_an_id_of_its_own() -> None:
    assert len({new_call_id() for _ in range(100)}) == 100
    assert new_call_id().startswith("tooluse_")


SNIPPETS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<tool", "[TOO", "<|"),
        *(json.dumps(CALL), json.dumps([CALL]), '{"name": "find", "parameters": {"é": "}"}}'),
        *('{"name": "look", "arguments": {}', '{"name": "none", "arguments": {}}', "{", "}", "]"),
        *(" ", "\n", ";", ",", "Text.", "é", "\\", '"'),
    ]
)


@given(
    st.sampled_from(FORMS),
    st.lists(SNIPPETS, max_size=8).map("".join),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_where_the_text_was_cut_into_pieces_makes_no_difference(
    form: ToolFormat, text: str, cuts: list[int]
) -> None:
    one = scanner(form)
    pieces: list[Found] = []
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    for first, last in pairwise(places):
        pieces += one.add(text[first:last])
    pieces += one.finish()
    whole = found(form, text)
    assert joined(pieces) == whole
    # A token at a time is the finest cut.
    single = scanner(form)
    letters = [item for letter in text for item in single.add(letter)]
    assert joined([*letters, *single.finish()]) == whole


@given(st.sampled_from(FORMS), st.text(max_size=60))
def test_text_without_calls_comes_out_as_it_went_in(form: ToolFormat, text: str) -> None:
    assert "".join(str(item) for item in found(form, text)) == text
