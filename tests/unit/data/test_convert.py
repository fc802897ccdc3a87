"""Converting records: nothing that is trained on is lost, and what has no place is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data.convert import convert_record, jsonl_rows, write_rows
from outcrop.data.defects import Unusable
from outcrop.data.formats import (
    CLAUDE_MESSAGES,
    CONVERSATION,
    DISTILLATION_PROMPTS,
    EVALUATION_PROMPTS,
    PROMPT_COMPLETION,
    REINFORCEMENT,
    read_content,
)
from outcrop.data.sources import local_file
from outcrop.errors import DataError
from outcrop.models.catalog import DOCUMENTS

PAIR = {"prompt": "Is it open?", "completion": " Yes"}
CLAUDE = {
    "system": "Be brief",
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ],
}


def test_a_pair_becomes_each_format_that_has_place_for_it() -> None:
    assert convert_record(PAIR, CONVERSATION) == {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": [
            {"role": "user", "content": [{"text": "Is it open?"}]},
            {"role": "assistant", "content": [{"text": " Yes"}]},
        ],
    }
    assert convert_record(PAIR, CLAUDE_MESSAGES)["messages"][1]["content"] == " Yes"
    assert convert_record(PAIR, EVALUATION_PROMPTS) == {
        "prompt": "Is it open?",
        "referenceResponse": " Yes",
    }
    assert convert_record(PAIR, REINFORCEMENT) == {
        "messages": [{"role": "user", "content": "Is it open?"}],
        "reference_answer": " Yes",
    }
    assert convert_record(PAIR, PROMPT_COMPLETION) == PAIR


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(
    lambda text: any(character.isalnum() for character in text)
)


@settings(deadline=None)
@given(st.one_of(st.none(), TEXT), st.lists(TEXT, min_size=1, max_size=3), TEXT)
def test_conversations_come_back_as_they_were(
    system: str | None, texts: list[str], answer: str
) -> None:
    turns = [text for said in texts for text in (said, answer)]
    value: dict[str, Any] = {} if system is None else {"system": system}
    value["messages"] = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(turns)
    ]
    converse = convert_record(value, CONVERSATION)
    assert convert_record(converse, CLAUDE_MESSAGES) == value
    before = read_content(value, (CLAUDE_MESSAGES,), [])
    assert read_content(converse, (CONVERSATION,), []) == before
    if system is None and len(texts) == 1:
        pair = convert_record(converse, PROMPT_COMPLETION)
        assert convert_record(pair, CONVERSATION) == converse
        assert convert_record(pair, CLAUDE_MESSAGES) == value
    else:
        with pytest.raises(Unusable):
            convert_record(value, PROMPT_COMPLETION)


@pytest.mark.parametrize(
    ("value", "target", "said"),
    [
        (CLAUDE, PROMPT_COMPLETION, "system text"),
        ({"messages": CLAUDE["messages"]}, PROMPT_COMPLETION, "4 turns"),
        ({"messages": CLAUDE["messages"]}, EVALUATION_PROMPTS, "4 turns"),
        ({"input": "text"}, PROMPT_COMPLETION, "no prompt and no answer"),
        (PAIR, DOCUMENTS, "A labelled record"),
        ({**PAIR, "id": 4}, CONVERSATION, "would be lost"),
        ({"prompt": "a", "category": "b"}, DISTILLATION_PROMPTS, "category would be lost"),
        ({"prompt": "a", "referenceResponse": "b", "category": "c"}, PROMPT_COMPLETION, "category"),
        ({"recordId": "1", "modelInput": {}}, CONVERSATION, "cannot be converted"),
        ({"question": "a"}, CONVERSATION, "no known format"),
        ({"prompt": "a", "completion": 4}, CONVERSATION, "must be a string"),
    ],
)
def test_what_would_be_lost_is_refused_with_the_reason(
    value: dict[str, Any], target: str, said: str
) -> None:
    with pytest.raises(Unusable, match=said):
        convert_record(value, target)


def test_an_image_is_refused() -> None:
    image = {"image": {"format": "png", "source": {"s3Location": {"uri": "s3://b/a.png"}}}}
    value = convert_record(PAIR, CONVERSATION)
    value["messages"][0]["content"].append(image)
    with pytest.raises(Unusable, match="image"):
        convert_record(value, CLAUDE_MESSAGES)


def test_prompts_without_answers_are_for_a_teacher() -> None:
    asked = convert_record({"prompt": "a"}, EVALUATION_PROMPTS)
    assert asked == {"prompt": "a"}
    value = {
        "schemaVersion": "bedrock-conversation-2024",
        "messages": [{"role": "user", "content": [{"text": "a"}]}],
    }
    assert convert_record(value, DISTILLATION_PROMPTS) == value
    with pytest.raises(Unusable, match="no answer"):
        convert_record(value, PROMPT_COMPLETION)
    with pytest.raises(Unusable, match="no answer"):
        convert_record(value, CONVERSATION)


def test_mark_up_of_a_family_becomes_turns() -> None:
    value = {"prompt": "User: a\nBot: b\nUser: c\nBot:", "completion": " d"}
    turns = convert_record(value, CLAUDE_MESSAGES, body_family="titan")["messages"]
    assert [turn["content"] for turn in turns] == ["a", "b", "c", " d"]
    assert len(convert_record(value, CLAUDE_MESSAGES)["messages"]) == 2


def test_a_file_is_converted_whole_or_refused_with_its_line(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = [json.dumps(PAIR), "", json.dumps({**PAIR, "id": 1}), '{"cut', json.dumps(PAIR)]
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3 cannot be converted.*--skip-refused") as caught:
        write_rows(jsonl_rows(local_file(source), CONVERSATION), target)
    assert caught.value.line == 3
    assert not target.exists()
    found = write_rows(jsonl_rows(local_file(source), CONVERSATION), target, skip_refused=True)
    assert (found.num_records, found.num_refused) == (2, 2)
    assert [(defect.place.line, defect.code) for defect in found.refused] == [
        (3, "extra_keys"),
        (4, "invalid_json"),
    ]
    assert len(target.read_bytes().splitlines()) == 2


def test_nothing_to_convert_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text('{"x": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match="1 could not be converted"):
        write_rows(jsonl_rows(local_file(source), CONVERSATION), target, skip_refused=True)
    with pytest.raises(DataError, match="no record"):
        write_rows(iter(()), target)
    assert not target.exists()
    with pytest.raises(DataError, match="is read"):
        write_rows(iter(()), source, sources=[source], force=True)
