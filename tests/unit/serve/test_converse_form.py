"""A Converse request for each family: the same messages and sampling as its own body's."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.formats import parse_record
from outcrop.data.records import Message
from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel, shipped_models
from outcrop.serve.prompt_formats import FAMILIES, NativeRequest, parse_body
from outcrop.serve.prompt_formats.converse import check_paths, parse_converse, response_fields
from outcrop.serve.request import Generation, SamplingParams

IMPORTED_FAMILY = "imported"
TURNS = [{"role": "user", "content": [{"text": "Hi"}]}]
DEFAULTS: dict[str, SamplingParams] = {
    "titan": SamplingParams(temperature=0.7, top_p=0.9),
    "cohere": SamplingParams(temperature=0.9, top_p=0.75),
    "llama": SamplingParams(temperature=0.5, top_p=0.9),
    "mistral": SamplingParams(temperature=0.5, top_p=0.9, top_k=50),
    "claude": SamplingParams(temperature=1.0, top_p=1.0),
    "nova": SamplingParams(temperature=0.7, top_p=0.9),
    "imported": SamplingParams(temperature=0.5, top_p=0.9),
}


def base(family: str) -> BaseModel:
    if family == IMPORTED_FAMILY:  # no model that ships was imported
        return replace(base("llama"), body_family=IMPORTED_FAMILY)
    return next(model for model in shipped_models() if model.body_family == family)


def parse(family: str, **params: Any) -> NativeRequest:
    return parse_converse(base(family), {"messages": TURNS, **params})


def refused(family: str = "claude", **params: Any) -> str:
    with pytest.raises(ValidationException) as caught:
        parse(family, **params)
    return caught.value.message


def turn(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"text": text} for text in texts]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shortest_conversation_has_the_familys_defaults_and_no_bound(family: str) -> None:
    found = parse(family)
    assert found.messages == (Message("user", "Hi"),)
    assert found.sampling == DEFAULTS[family]
    assert found.num_generations == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_config_means_the_same_for_every_family(family: str) -> None:
    config = {"maxTokens": 9, "temperature": 0.25, "topP": 0.5, "stopSequences": ["a", "b"]}
    found = parse(family, inferenceConfig=config).sampling
    assert (found.max_tokens, found.temperature, found.top_p) == (9, 0.25, 0.5)
    assert found.stop == ("a", "b")


@pytest.mark.parametrize("family", FAMILIES)
def test_system_and_turns_are_those_of_the_conversation(family: str) -> None:
    found = parse(
        family,
        system=[{"text": "Be brief."}, {"cachePoint": {"type": "default"}}, {"text": "Be kind."}],
        messages=[
            {"role": "user", "content": [{"text": "A"}, {"cachePoint": {"type": "default"}}]},
            turn("assistant", "B"),
            turn("user", "User: C\nBot:", "D"),
            turn("assistant", "E"),
        ],
    )
    assert found.messages == (
        Message("system", "Be brief.\n\nBe kind."),
        Message("user", "A"),
        Message("assistant", "B"),
        Message("user", "User: C\nBot:\n\nD"),
        Message("assistant", "E"),
    )


def test_converse_and_novas_and_claudes_own_bodies_and_training_read_one_conversation() -> None:
    """One form of several blocks, so the tokens are the same wherever they are counted."""
    system = [{"text": "S"}, {"text": "T"}]
    messages = [turn("user", "A", "B"), turn("assistant", "C", "D")]
    spoken = parse("nova", system=system, messages=messages).messages
    nova = json.dumps({"system": system, "messages": messages}).encode()
    assert parse_body(base("nova"), nova).messages == spoken
    typed = [
        {"role": each["role"], "content": [{"type": "text", **block} for block in each["content"]]}
        for each in messages
    ]
    claude = {
        "anthropic_version": "bedrock-2023-05-31",
        "max_tokens": 9,
        "system": [{"type": "text", **block} for block in system],
        "messages": typed,
    }
    assert parse_body(base("claude"), json.dumps(claude).encode()).messages == spoken
    line = {"schemaVersion": "bedrock-conversation-2024", "system": system, "messages": messages}
    record = parse_record(line, ["conversation"], "train.jsonl", 1)
    assert record.messages == spoken


@pytest.mark.parametrize(
    ("family", "fields", "name", "value"),
    [
        ("claude", {"top_k": 7}, "top_k", 7),
        ("cohere", {"k": 7}, "top_k", 7),
        ("cohere", {"truncate": "END"}, "truncate", "end"),
        ("cohere", {"return_likelihoods": "GENERATION"}, "logprobs", True),
        ("mistral", {"top_k": 7}, "top_k", 7),
        ("nova", {"inferenceConfig": {"topK": 7}}, "top_k", 7),
        ("titan", {"textGenerationConfig": {"topP": 0.5}}, "top_p", 0.5),
        ("llama", {"top_p": 0.5}, "top_p", 0.5),
    ],
)
def test_additional_fields_are_the_familys_own(
    family: str, fields: dict[str, Any], name: str, value: object
) -> None:
    config = {"maxTokens": 5, "temperature": 0.1}
    found = parse(family, additionalModelRequestFields=fields, inferenceConfig=config).sampling
    assert getattr(found, name) == value
    assert (found.max_tokens, found.temperature) == (5, 0.1)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("claude", {"thinking": {}}, "#: extraneous key [thinking] is not permitted"),
        ("claude", {"top_k": -1}, "#/top_k: -1 is not greater or equal to 0"),
        ("claude", {"messages": []}, "extraneous key [messages]"),
        ("cohere", {"prompt": "x"}, "extraneous key [prompt]"),
        ("cohere", {"num_generations": 2}, "extraneous key [num_generations]"),
        ("cohere", {"stream": True}, "extraneous key [stream]"),
        ("llama", {"top_k": 1}, "extraneous key [top_k]"),
        ("mistral", {"top_k": "x"}, "expected type: Integer, found: String"),
        ("nova", {"inferenceConfig": {"topK": 129}}, "#/inferenceConfig/topK: 129 is not less"),
        ("nova", {"inferenceConfig": 5}, "#/inferenceConfig: expected type: JSONObject"),
        ("titan", {"textGenerationConfig": []}, "expected type: JSONObject, found: JSONArray"),
    ],
)
def test_a_wrong_additional_field_is_refused_as_the_model_refuses_it(
    family: str, fields: dict[str, Any], named: str
) -> None:
    found = refused(family, additionalModelRequestFields=fields, inferenceConfig={"maxTokens": 5})
    assert found.startswith("The model returned the following errors: Malformed input request")
    assert named in found


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("claude", {"temperature": 0.5}),
        ("titan", {"textGenerationConfig": {"temperature": 0.5}}),
        ("nova", {"inferenceConfig": {"temperature": 0.5}}),
    ],
)
def test_a_field_that_is_given_twice_is_a_conflict(family: str, fields: dict[str, Any]) -> None:
    config = {"temperature": 0.1}
    found = refused(family, additionalModelRequestFields=fields, inferenceConfig=config)
    assert "conflicts with inferenceConfig.temperature" in found


@pytest.mark.parametrize("fields", [[1], "top_k", 5, True])
def test_additional_fields_that_are_no_object_are_refused(fields: object) -> None:
    assert "must be a JSON object" in refused(additionalModelRequestFields=fields)


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("claude", {"maxTokens": 10**6}, "The maximum tokens you requested exceeds the model"),
        ("titan", {"topP": 0}, "#/textGenerationConfig/topP: 0 is not greater than 0"),
        ("cohere", {"stopSequences": ["a"] * 5}, "expected maximum item count: 4, found: 5"),
        *(
            (family, {"stopSequences": [""]}, "expected minLength: 1, actual: 0")
            for family in FAMILIES
        ),
        *(
            (family, {"stopSequences": ["x" * 1001]}, "expected maxLength: 1000")
            for family in FAMILIES
        ),
    ],
)
def test_inference_config_out_of_the_familys_range_is_refused(
    family: str, config: dict[str, Any], named: str
) -> None:
    assert named in refused(family, inferenceConfig=config)


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "A conversation must start with a user message."),
        ([turn("assistant", "A")], "A conversation must start with a user message."),
        ([turn("user", "A"), turn("user", "B")], "must alternate between user and assistant"),
        ([turn("user")], "The content field in the Message object at messages.0 is empty."),
        (
            [{"role": "user", "content": [{"cachePoint": {"type": "default"}}]}],
            "The content field in the Message object at messages.0 is empty.",
        ),
        (
            [turn("user", "A"), turn("assistant", "B", "")],
            "The text field in the ContentBlock object at messages.1.content.1 is blank.",
        ),
        ([turn("user", " \n")], "messages.0.content.0 is blank. Add text to the text field"),
        ([turn("system", "A")], "This model doesn't support the role system at messages.0"),
    ],
)
def test_turns_in_no_order_and_empty_ones_are_refused_in_bedrocks_words(
    messages: list[Any], named: str
) -> None:
    assert named in refused(messages=messages)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (name, f"This model doesn't support the {name} content block that you provided.")
        for name in (
            *("image", "document", "video", "audio", "guardContent", "reasoningContent"),
            *("citationsContent", "searchResult", "toolAddition"),
        )
    ],
)
def test_content_that_is_no_text_is_refused_by_name_and_place(name: str, named: str) -> None:
    found = refused(messages=[turn("user", "A"), turn("assistant", "B"), block(name)])
    assert found.startswith(named)
    assert "messages.2.content.0" in found


def block(name: str) -> dict[str, Any]:
    return {"role": "user", "content": [{name: {}}]}


def test_a_system_block_that_is_no_text_or_blank_is_refused() -> None:
    assert "guardContent" in refused(system=[{"guardContent": {}}])
    found = refused(system=[{"text": "A"}, {"text": " "}])
    assert "SystemContentBlock object at system.1 is blank" in found


# --- fields of the answer -------------------------------------------------------------------------


def fields(family: str, *paths: str) -> dict[str, Any]:
    generation = Generation("Hi", 7, 3, "stop_sequence", "Q:")
    return response_fields(base(family), parse(family), generation, paths)


def test_fields_of_the_models_own_answer_are_returned_and_absent_ones_left_out() -> None:
    assert fields("claude", "/stop_sequence") == {"stop_sequence": "Q:"}
    assert fields("claude", "/usage/input_tokens", "/absent", "/usage/absent") == {
        "usage": {"input_tokens": 7}
    }
    assert fields("llama", "/generation_token_count") == {"generation_token_count": 3}
    assert fields("cohere", "/generations/0/finish_reason", "/generations/1/id") == {
        "generations": {"0": {"finish_reason": "COMPLETE"}}
    }
    assert fields("mistral", "/outputs/00/text", f"/outputs/{'9' * 5000}") == {}
    assert fields("claude", "/usage", "/usage/input_tokens")["usage"]["input_tokens"] == 7
    assert fields("claude", "/stop_sequence", "/stop_sequence/deeper") == {"stop_sequence": "Q:"}
    assert fields("claude", "/a~1b", "/c~0d", "/a//b") == {}


@pytest.mark.parametrize("path", ["", "/", "stop_sequence", "/a~", "/a~2", "$.a"])
def test_a_path_that_is_no_pointer_is_refused_with_its_place(path: str) -> None:
    with pytest.raises(ValidationException, match=r"additionalModelResponseFieldPaths\.1 is"):
        check_paths(["/good", path])


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                sorted({key for family in FAMILIES.values() for key in family.fields} | {"topP"})
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FAMILIES)), ANY, st.lists(st.text(max_size=9), max_size=2))
def test_whatever_the_additional_fields_hold_there_is_an_answer_or_a_refusal(
    family: str, additional: Any, paths: list[str]
) -> None:
    with suppress(ValidationException):
        found = parse(family, additionalModelRequestFields=additional)
        response_fields(base(family), found, Generation("Hi", 7, 3, "stop"), paths)
