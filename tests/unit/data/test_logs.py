"""Invocation logs as training records: every family's bodies, streams, filters."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import pytest

from outcrop.data.convert import Row
from outcrop.data.defects import Unusable
from outcrop.data.facts import DataFile
from outcrop.data.formats import (
    CLAUDE_MESSAGES,
    CONVERSATION,
    DISTILLATION_PROMPTS,
    PROMPT_COMPLETION,
)
from outcrop.data.logs import log_rows, make_filter, read_call
from outcrop.errors import DataError


def call(asked: Any, answered: Any, **more: Any) -> dict[str, Any]:
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "timestamp": "2026-11-01T00:00:00Z",
        "requestId": "1",
        "operation": "InvokeModel",
        "modelId": "amazon.titan-text-express-v1",
        "input": {"inputContentType": "application/json", "inputBodyJson": asked},
        "output": {"outputContentType": "application/json", "outputBodyJson": answered},
        **more,
    }


CLAUDE_BODY = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 9,
    "system": "Be brief",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
}
CONVERSE_BODY = {
    "system": [{"text": "Be brief"}],
    "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
    "inferenceConfig": {"maxTokens": 9},
}
MESSAGE = {"message": {"role": "assistant", "content": [{"text": "Hello"}]}}
DELTAS = [{"contentBlockDelta": {"delta": {"text": part}}} for part in ("Hel", "lo")]

BODIES = {
    "titan": ({"inputText": "Hi"}, {"results": [{"outputText": "Hello", "tokenCount": 1}]}, ""),
    "titan stream": (
        {"inputText": "Hi"},
        [{"outputText": "Hel", "index": 0}, {"outputText": "lo"}],
        "",
    ),
    "llama": ({"prompt": "Hi", "max_gen_len": 9}, {"generation": "Hello"}, ""),
    "llama stream": ({"prompt": "Hi"}, [{"generation": "Hel"}, {"generation": "lo"}], ""),
    "cohere": ({"prompt": "Hi"}, {"generations": [{"text": "Hello", "id": "1"}]}, ""),
    "cohere stream": (
        {"prompt": "Hi", "stream": True},
        [{"text": "Hel", "is_finished": False}, {"text": "lo"}, {"is_finished": True}],
        "",
    ),
    "mistral": ({"prompt": "Hi"}, {"outputs": [{"text": "Hello", "stop_reason": "stop"}]}, ""),
    "mistral stream": ({"prompt": "Hi"}, [{"outputs": [{"text": "Hello"}]}], ""),
    "claude": (
        CLAUDE_BODY,
        {"type": "message", "content": [{"type": "text", "text": "Hello"}]},
        "Be brief",
    ),
    "claude stream": (
        CLAUDE_BODY,
        [
            {"type": "message_start", "message": {}},
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello"}},
            {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
        ],
        "Be brief",
    ),
    "nova": ({"schemaVersion": "messages-v1", **CONVERSE_BODY}, {"output": MESSAGE}, "Be brief"),
    "converse": (CONVERSE_BODY, {"output": MESSAGE, "stopReason": "end_turn"}, "Be brief"),
    "converse stream": (
        CONVERSE_BODY,
        [{"messageStart": {"role": "assistant"}}, *DELTAS, {"messageStop": {}}],
        "Be brief",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_every_familys_bodies_become_messages(name: str) -> None:
    asked, answered, system = BODIES[name]
    messages = [(message.role, message.text) for message in read_call(call(asked, answered))]
    expected = [("user", "Hi"), ("assistant", "Hello")]
    assert messages == ([("system", system), *expected] if system else expected)
    without = read_call(call(asked, answered), answered=False)
    assert without[-1].text == "Hi"


def test_mark_up_in_a_prompt_becomes_turns() -> None:
    titan = read_call(
        call({"inputText": "User: a\nBot: b\nUser: c\nBot:"}, {"results": [{"outputText": " d"}]})
    )
    assert [message.text for message in titan] == ["a", "b", "c", " d"]
    llama = read_call(call({"prompt": "<s>[INST] a [/INST]"}, {"generation": "b"}))
    assert [message.text for message in llama] == ["a", "b"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": 1}, "no record of invocation logging"),
        (call({"inputText": "a"}, None), "no output"),
        (call({"inputText": "a"}, {"results": [{"outputText": " "}]}), "answer is empty"),
        (call({"inputText": "a"}, {"results": []}), "0 answers"),
        (call({"inputImage": "a"}, {}), "no known text model"),
        (call(CONVERSE_BODY, {"stopReason": "tool_use", "output": MESSAGE}), "tool_use"),
        (call(CONVERSE_BODY, {"embedding": [1]}), "no known text model"),
        (call({"prompt": "a"}, {"generation": "b"}, errorCode="ThrottlingException"), "Throttling"),
        (
            call({"messages": [{"role": "user", "content": [{"image": {}}]}]}, {"output": MESSAGE}),
            "only text",
        ),
        (call({"messages": [{"role": "assistant", "content": "a"}]}, {}), "user's turn"),
        (
            {**call({}, {}), "input": {"inputBodyS3Path": "s3://logs/data/1"}},
            "s3://logs/data/1, which is not read",
        ),
    ],
)
def test_a_call_that_teaches_nothing_is_refused_with_the_reason(
    value: dict[str, Any], said: str
) -> None:
    with pytest.raises(Unusable, match=said):
        read_call(value)


def rows(calls: list[Any], target: str, **options: Any) -> list[Row]:
    content = "\n".join(json.dumps(each) for each in calls).encode()
    data = DataFile("log.json.gz", "training", lambda: io.BytesIO(gzip.compress(content)))
    return list(log_rows(data, target, **options))


def test_a_packed_log_becomes_records_of_each_format() -> None:
    calls = [call(*BODIES["claude"][:2]), call(*BODIES["titan"][:2])]
    found = rows(calls, CONVERSATION)
    assert [row.line for row in found] == [1, 2]
    assert found[0].value is not None
    assert found[0].value["system"] == [{"text": "Be brief"}]
    assert rows(calls[1:], PROMPT_COMPLETION)[0].value == {"prompt": "Hi", "completion": "Hello"}
    assert rows(calls[:1], CLAUDE_MESSAGES)[0].value == {
        "system": "Be brief",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    }


def test_without_the_logged_answers_only_prompts_are_taken() -> None:
    failed = call(CONVERSE_BODY, None)
    (row,) = rows([failed], DISTILLATION_PROMPTS, use_prompt_response=False)
    assert row.value is not None
    assert [turn["role"] for turn in row.value["messages"]] == ["user"]


METADATA = [{"team": "a"}, {"team": "a", "stage": "test"}, {"team": "b"}, None, {}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"equals": {"team": "a"}}, [1, 2]),
        ({"notEquals": {"team": "a"}}, [3, 4, 5]),
        ({"andAll": [{"equals": {"team": "a"}}, {"notEquals": {"stage": "test"}}]}, [1]),
        ({"orAll": [{"equals": {"team": "b"}}, {"equals": {"stage": "test"}}]}, [2, 3]),
    ],
)
def test_calls_are_taken_by_their_metadata(value: object, expected: list[int]) -> None:
    calls = [
        call({"inputText": "a"}, {"results": [{"outputText": "b"}]})
        | ({} if metadata is None else {"requestMetadata": metadata})
        for metadata in METADATA
    ]
    found = rows(calls, PROMPT_COMPLETION, matches=make_filter(value))
    assert [row.line for row in found] == expected


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"like": {"a": "b"}},
        {"equals": {"a": "b"}, "notEquals": {"c": "d"}},
        {"equals": {"a": "b", "c": "d"}},
        {"equals": {"a": 1}},
        {"andAll": []},
        {"andAll": [{"equals": {"a": "b"}}] * 17},
        {"orAll": [{"andAll": [{"equals": {"a": "b"}}]}]},
    ],
)
def test_a_filter_of_another_form_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="metadata filter"):
        make_filter(value)
