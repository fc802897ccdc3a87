"""Records in each format, and every rule that refuses one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outcrop.data.defects import KINDS, Finding, Severity
from outcrop.data.formats import (
    CLAUDE_MESSAGES,
    CONVERSATION,
    PROMPT_COMPLETION,
    parse_document,
    parse_record,
    read_content,
)
from outcrop.data.read import parse_line
from outcrop.data.records import Document, Message
from outcrop.errors import DataError
from outcrop.models.catalog import DOCUMENTS

FILE = "s3://bucket/train.jsonl"
PAIR_FORM = '{"prompt": "<input text>", "completion": "<output text>"}'

NOT_IN_THIS_SLICE = {
    None,
    *("low_information", "html", "crlf", "too_long", "exact_duplicate", "near_duplicate"),
    *("test_leak", "mojibake", "control_characters", "conflicting_label"),
    *("completion_repeats_prompt", "stray_whitespace", "pii"),
    *("extra_keys", "null_byte", "lone_surrogate", "duplicate_key", "empty_system"),
}
"""Defects of the dirty sets that a job can live with, or that show only beside other records."""


def converse(*turns: tuple[str, str], **changes: Any) -> dict[str, Any]:
    messages = [{"role": role, "content": [{"text": text}]} for role, text in turns]
    return {"schemaVersion": "bedrock-conversation-2024", "messages": messages, **changes}


def claude(*turns: tuple[str, str], **changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **changes}


TURNS = (("user", "q"), ("assistant", "a"))


def parse(value: dict[str, Any], *formats: str, family: str = "") -> tuple[Message, ...]:
    record = parse_record(value, formats or (PROMPT_COMPLETION,), FILE, 7, body_family=family)
    assert (record.file, record.line) == (FILE, 7)
    return record.messages


def refusal(value: dict[str, Any], *formats: str, family: str = "") -> DataError:
    with pytest.raises(DataError) as raised:
        parse(value, *formats, family=family)
    error = raised.value
    assert (error.file, error.line) == (FILE, 7)
    assert str(error).startswith(f"Input data at {FILE} must follow '")
    assert " format. Line 7: " in str(error)
    return error


def test_a_pair_is_a_user_turn_and_an_answer_with_its_white_space() -> None:
    assert parse({"prompt": " q\n", "completion": " a \n"}) == (
        Message("user", " q\n"),
        Message("assistant", " a \n"),
    )


def test_mark_up_in_a_prompt_becomes_turns() -> None:
    assert parse({"prompt": "User: q\nBot:", "completion": " a"}, family="titan") == (
        Message("user", "q"),
        Message("assistant", " a"),
    )


def test_a_prompt_whose_mark_up_begins_the_answer_is_refused() -> None:
    prompt = "[INST] q [/INST] Sure"
    error = refusal({"prompt": prompt, "completion": "a"}, family="llama")
    assert error.code == "role_order"


def test_a_converse_record_may_have_a_system_text_and_many_turns() -> None:
    value = converse(*TURNS, *TURNS, system=[{"text": "s"}, {"text": "t"}])
    assert parse(value, CONVERSATION) == (
        Message("system", "s\n\nt"),
        *[Message(role, text) for role, text in (*TURNS, *TURNS)],
    )


def test_a_claude_record_may_have_a_system_text() -> None:
    assert parse(claude(*TURNS, system="s"), CLAUDE_MESSAGES) == (
        Message("system", "s"),
        *[Message(role, text) for role, text in TURNS],
    )


def test_a_model_that_takes_several_formats_takes_each() -> None:
    formats = (PROMPT_COMPLETION, CONVERSATION, CLAUDE_MESSAGES)
    for value in ({"prompt": "q", "completion": "a"}, converse(*TURNS), claude(*TURNS)):
        assert parse(value, *formats)[-1] == Message("assistant", "a")


def test_the_message_begins_with_bedrocks_own() -> None:
    error = refusal({"prompt": "q"})
    assert str(error) == f"Input data at {FILE} must follow '{PAIR_FORM}' format. " + (
        "Line 7: It has no completion."
    )


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ({}, "wrong_keys", "Its keys are none"),
        ({"question": "q", "answer": "a"}, "wrong_keys", "Its keys are 'question', 'answer'"),
        ({"prompt ": "q", "completion": "a"}, "wrong_keys", "'prompt '"),
        ({"completion": "a"}, "missing_prompt", "no prompt"),
        ({"prompt": "q"}, "missing_completion", "no completion"),
        ({"prompt": "q", "completion": "a", "input": "x"}, "mixed_schema", "mixes"),
        ({"prompt": ["q"], "completion": "a"}, "wrong_type", "a string, not an array"),
        ({"prompt": None, "completion": "a"}, "wrong_type", "not null"),
        ({"prompt": "q", "completion": float("nan")}, "wrong_type", "not a number"),
        ({"prompt": "q", "completion": {}}, "wrong_type", "not an object"),
        ({"prompt": "", "completion": "a"}, "empty_prompt", "prompt is empty"),
        ({"prompt": "q", "completion": "\u3000"}, "empty_completion", "completion is empty"),
        ({"prompt": "q", "completion": "\u200b \n"}, "empty_completion", "completion is empty"),
        ({"input": "x"}, "mixed_schema", "This looks like continued pre-training data"),
        (converse(*TURNS), "mixed_schema", "This looks like a Converse conversation"),
        (claude(*TURNS), "mixed_schema", "This looks like a Claude conversation"),
        ({"image-ref": "s3://x", "caption": "y"}, "mixed_schema", "image-caption data"),
        (
            {"messages": [{"role": "user", "content": "x"}], "reference_answer": 1},
            "mixed_schema",
            "reinforcement fine-tuning",
        ),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused(value: dict[str, Any], code: str, says: str) -> None:
    error = refusal(value)
    assert error.code == code
    assert says in str(error)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({"schemaVersion": "bedrock-conversation-2024"}, "missing_messages"),
        (converse(*TURNS, schemaVersion="bedrock-conversion-2024"), "bad_schema_version"),
        (converse(*TURNS, schemaVersion=2024), "bad_schema_version"),
        ({"messages": converse(*TURNS)["messages"]}, "missing_schema_version"),
        (converse(), "empty_messages"),
        (converse(messages={}), "wrong_type"),
        (converse(messages=["x"]), "wrong_type"),
        (converse(messages=[{"content": []}]), "missing_role"),
        (converse(messages=[{"role": "user"}]), "missing_content"),
        (converse(messages=[{"role": ["user"], "content": []}]), "bad_role"),
        (converse(("human", "q"), ("assistant", "a")), "bad_role"),
        (converse(("assistant", "a")), "role_order"),
        (converse(("user", "q")), "role_order"),
        (converse(("user", "q"), ("user", "q"), ("assistant", "a")), "role_order"),
        (converse(*TURNS, system="s"), "wrong_type"),
        (converse(("user", " "), ("assistant", "a")), "empty_content"),
        (converse(messages=[{"role": "user", "content": []}, {}]), "missing_role"),
        (converse(messages=[{"role": "user", "content": "q"}] * 2), "role_order"),
        (converse(*TURNS, system=["s"]), "wrong_type"),
        (converse(*TURNS, system=[{"text": 1}]), "wrong_type"),
        (converse(*TURNS, system=[{"image": {}}]), "unsupported_block"),
        ({"prompt": "q", "completion": "a"}, "mixed_schema"),
        (claude(*TURNS), "mixed_schema"),
    ],
)
def test_a_converse_record_that_cannot_be_used_is_refused(value: dict[str, Any], code: str) -> None:
    assert refusal(value, CONVERSATION).code == code


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (claude(*TURNS, extra=1), "extra_keys"),
        (claude(*TURNS, system=5), "wrong_type"),
        (claude(*TURNS, system=""), "empty_content"),
        (claude(("assistant", "a"), ("user", "q")), "role_order"),
        (claude(), "empty_messages"),
        (converse(*TURNS), "mixed_schema"),
    ],
)
def test_a_claude_record_that_cannot_be_used_is_refused(value: dict[str, Any], code: str) -> None:
    assert refusal(value, CLAUDE_MESSAGES).code == code


def test_a_document_is_its_text_as_it_stands() -> None:
    assert parse_document({"input": " a\n\n b "}, FILE, 7) == Document(" a\n\n b ", FILE, 7)


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ({}, "wrong_keys", "Its keys are none"),
        ({"text": "a"}, "wrong_keys", "Its keys are 'text'"),
        ({"input": ["a"]}, "wrong_type", "input must be a string, not an array"),
        ({"input": " \u200b"}, "empty_input", "input is empty"),
        ({"input": "a", "completion": "b"}, "mixed_schema", "a prompt/completion record"),
        (converse(*TURNS), "mixed_schema", "a Converse conversation. Labelled records are for"),
        (claude(*TURNS), "mixed_schema", "a Claude conversation"),
    ],
)
def test_a_document_that_cannot_be_used_is_refused(
    value: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(DataError) as raised:
        parse_document(value, FILE, 7)
    assert (raised.value.code, raised.value.line) == (code, 7)
    assert says in str(raised.value)
    assert str(raised.value).startswith(
        f'Input data at {FILE} must follow \'{{"input": "<raw text>"}}\' format. Line 7: '
    )


def test_a_message_stays_printable_and_short_whatever_the_record_holds() -> None:
    error = refusal({"\x1b[31m" * 500: 1, **{f"k{place}": 1 for place in range(100)}})
    assert str(error).isprintable()
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("value", "format", "code", "says"),
    [
        ({"prompt": "q", "completion": "a", "id": 1}, PROMPT_COMPLETION, "extra_keys", "'id'"),
        ({"prompt": "q\0", "completion": "a"}, PROMPT_COMPLETION, "null_byte", "character 2"),
        (converse(*TURNS, extra=1), CONVERSATION, "extra_keys", "further keys: 'extra'"),
        (converse(*TURNS, system=[]), CONVERSATION, "empty_system", "system is empty"),
        (converse(*TURNS, system=[{"text": "s", "x": 1}]), CONVERSATION, "extra_keys", "'x'"),
        ({"input": "a", "id": 1}, DOCUMENTS, "extra_keys", "further keys: 'id'"),
        ({"input": "a\0"}, DOCUMENTS, "null_byte", "NUL"),
    ],
)
def test_what_can_be_mended_is_said_and_trained_as_it_stands(
    value: dict[str, Any], format: str, code: str, says: str
) -> None:
    findings: list[Finding] = []
    content = read_content(value, (format,), findings)
    (finding,) = findings
    assert (finding.code, finding.severity) == (code, KINDS[code].severity) or code == "null_byte"
    assert finding.severity in (Severity.REPAIR, Severity.REVIEW)
    assert says in finding.message
    if format == DOCUMENTS:
        assert parse_document(value, FILE, 7).text == value["input"] == content.text
    else:
        assert parse(value, format) == content.messages
        assert content.messages[-1] == Message("assistant", "a")


def test_half_of_a_surrogate_pair_is_trained_as_the_replacement_character() -> None:
    findings: list[Finding] = []
    value = {"prompt": "\ud83d\ude00 \ud83d!", "completion": "a\udc00"}
    content = read_content(value, (PROMPT_COMPLETION,), findings)
    assert [message.text for message in content.messages] == ["\U0001f600 \ufffd!", "a\ufffd"]
    assert [(finding.code, finding.severity) for finding in findings] == [
        ("lone_surrogate", Severity.REPAIR)
    ] * 2


@pytest.mark.parametrize(
    ("name", "format"),
    [("dirty-pairs", PROMPT_COMPLETION), ("dirty-conversations", CONVERSATION)],
)
def test_the_dirty_sets_defects_are_found_under_their_codes(
    name: str, format: str, shared_data: Path
) -> None:
    lines = (shared_data / "dirty" / f"{name}.jsonl").read_bytes().split(b"\n")
    keys = (shared_data / "dirty" / f"{name}.key.jsonl").read_text().splitlines()
    wrong = []
    for key in map(json.loads, keys):
        line = lines[key["line"] - 1].removeprefix(b"\xef\xbb\xbf" if key["line"] == 1 else b"")
        found = None
        try:
            if line.strip():
                parse_record(parse_line(line, FILE, 1), (format,), FILE, 1)
            else:
                found = "blank_line"
        except DataError as error:
            found = error.code
        if found != key["defect"] and not (found is None and key["defect"] in NOT_IN_THIS_SLICE):
            wrong.append((key["line"], key["defect"], found))
    assert wrong == []
