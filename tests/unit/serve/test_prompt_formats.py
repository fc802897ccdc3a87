"""Bodies of each family: defaults, ranges, errors, and the answers' own forms."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.records import Message
from outcrop.errors import ApiError, ValidationException
from outcrop.models.catalog import BaseModel, shipped_models
from outcrop.serve.prompt_formats import FAMILIES, format_body, parse_body
from outcrop.serve.request import FinishReason, Generation, SamplingParams, TokenLogprob

AGAIN = "please reformat your input and try again."
USER = (Message("user", "Hi"),)
BODIES: dict[str, dict[str, Any]] = {
    "titan": {"inputText": "Hi"},
    "cohere": {"prompt": "Hi"},
    "llama": {"prompt": "Hi"},
    "mistral": {"prompt": "Hi"},
    "claude": {
        "anthropic_version": "bedrock-2023-05-31",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": "Hi"}],
    },
    "nova": {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
}
DEFAULTS: dict[str, SamplingParams] = {
    "titan": SamplingParams(temperature=0.7, top_p=0.9, max_tokens=512),
    "cohere": SamplingParams(temperature=0.9, top_p=0.75, max_tokens=20, truncate="end"),
    "llama": SamplingParams(temperature=0.5, top_p=0.9, max_tokens=512),
    "mistral": SamplingParams(temperature=0.5, top_p=0.9, top_k=50, max_tokens=512),
    "claude": SamplingParams(temperature=1.0, top_p=1.0, max_tokens=100),
    "nova": SamplingParams(temperature=0.7, top_p=0.9, max_tokens=None),
}
MAX_TOKENS_KEY = {
    "titan": ("textGenerationConfig", "maxTokenCount"),
    "cohere": ("max_tokens",),
    "llama": ("max_gen_len",),
    "mistral": ("max_tokens",),
    "claude": ("max_tokens",),
    "nova": ("inferenceConfig", "maxTokens"),
}


def base(family: str) -> BaseModel:
    return next(model for model in shipped_models() if model.body_family == family)


def parse(family: str, body: Any) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_body(base(family), raw)


def message(family: str, body: Any) -> str:
    with pytest.raises(ValidationException) as caught:
        parse(family, body)
    return caught.value.message


def with_key(family: str, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    body = dict(BODIES[family])
    if len(path) == 2:
        body[path[0]] = {path[1]: value}
    else:
        body[path[0]] = value
    return body


def answer(family: str, generation: Generation, *, body: Any = None) -> Any:
    request = parse(family, body or BODIES[family])
    return json.loads(format_body(base(family), request, [generation] * request.num_generations))


def done(reason: FinishReason = "stop", stop: str | None = None) -> Generation:
    return Generation("Héllo", 7, 3, reason, stop)


@pytest.mark.parametrize("family", BODIES)
def test_the_shortest_body_has_the_familys_defaults(family: str) -> None:
    found = parse(family, BODIES[family])
    assert found.messages == USER
    assert found.sampling == DEFAULTS[family]
    assert found.num_generations == 1


def test_every_family_of_the_catalogue_is_spoken() -> None:
    shipped = {model.body_family for model in shipped_models()}
    assert shipped <= set(FAMILIES)
    # Imported models have three forms of a body, and a module of tests of their own.
    assert set(FAMILIES) == {*BODIES, "imported"}


def test_titans_own_names_are_read() -> None:
    config = {"temperature": 0, "topP": 0.5, "maxTokenCount": 9, "stopSequences": ["|", "User:"]}
    found = parse("titan", {"inputText": "Hi", "textGenerationConfig": config})
    assert found.sampling == SamplingParams(
        temperature=0, top_p=0.5, max_tokens=9, stop=("|", "User:")
    )


def test_cohere_zeros_switch_the_cuts_off() -> None:
    found = parse(
        "cohere",
        {
            "prompt": "Hi",
            "p": 0,
            "k": 0,
            "temperature": 5,
            "stop_sequences": ["\n"],
            "num_generations": 5,
            "return_likelihoods": "GENERATION",
            "truncate": "START",
            "stream": False,
            "logit_bias": {},
        },
    )
    assert found.num_generations == 5
    assert found.sampling == SamplingParams(
        temperature=5, max_tokens=20, stop=("\n",), logprobs=True, truncate="start"
    )


def test_claude_blocks_system_and_turns_of_one_role_are_joined() -> None:
    found = parse(
        "claude",
        {
            **BODIES["claude"],
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "x"}}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "A"}]},
                {"role": "user", "content": "B"},
                {"role": "assistant", "content": "C"},
                {"role": "user", "content": "D"},
                {"role": "assistant", "content": "E"},
            ],
            "top_k": 3,
            "stop_sequences": ["x"],
            "metadata": {"user_id": "1"},
        },
    )
    assert found.messages == (
        Message("system", "Be brief."),
        Message("user", "A\nB"),
        Message("assistant", "C"),
        Message("user", "D"),
        Message("assistant", "E"),
    )
    assert found.sampling.top_k == 3


def test_nova_reads_both_names_of_the_token_limit() -> None:
    for name in ("maxTokens", "max_new_tokens"):
        body = {**BODIES["nova"], "system": [{"text": "S"}], "inferenceConfig": {name: 5}}
        found = parse("nova", body)
        assert found.sampling.max_tokens == 5
        assert found.messages[0] == Message("system", "S")


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("titan", "User: Hi\nBot:"),
        (
            "llama",
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("llama", "<s>[INST] Hi [/INST]"),
        ("mistral", "<s>[INST] Hi [/INST]"),
    ],
)
def test_mark_up_in_prompts_becomes_turns(family: str, prompt: str) -> None:
    key = "inputText" if family == "titan" else "prompt"
    assert parse(family, {key: prompt}).messages == USER


@pytest.mark.parametrize(
    ("family", "reason", "wire"),
    [
        ("titan", "stop", "FINISH"),
        ("titan", "length", "LENGTH"),
        ("titan", "stop_sequence", "STOP_CRITERIA_MET"),
        ("cohere", "stop", "COMPLETE"),
        ("cohere", "length", "MAX_TOKENS"),
        ("cohere", "stop_sequence", "COMPLETE"),
        ("llama", "stop", "stop"),
        ("llama", "length", "length"),
        ("mistral", "stop", "stop"),
        ("mistral", "length", "length"),
        ("mistral", "stop_sequence", "stop"),
        ("claude", "stop", "end_turn"),
        ("claude", "length", "max_tokens"),
        ("claude", "stop_sequence", "stop_sequence"),
        ("nova", "stop", "end_turn"),
        ("nova", "length", "max_tokens"),
        ("nova", "stop_sequence", "stop_sequence"),
    ],
)
def test_finish_reasons_have_the_familys_words(
    family: str, reason: FinishReason, wire: str
) -> None:
    assert f'"{wire}"' in json.dumps(answer(family, done(reason)))


def test_titans_answer_has_its_form() -> None:
    assert answer("titan", done()) == {
        "inputTextTokenCount": 7,
        "results": [{"tokenCount": 3, "outputText": "Héllo", "completionReason": "FINISH"}],
    }


def test_coheres_answer_has_its_form() -> None:
    found = answer("cohere", done())
    (generation,) = found["generations"]
    assert found.keys() == {"generations", "id", "prompt"}
    assert found["prompt"] == "Hi"
    assert generation.pop("id") != found["id"]
    assert generation == {"text": "Héllo", "finish_reason": "COMPLETE"}


def test_cohere_answers_of_several_have_an_index() -> None:
    found = answer("cohere", done(), body={"prompt": "Hi", "num_generations": 3})
    assert [each["index"] for each in found["generations"]] == [0, 1, 2]
    assert len({each["id"] for each in found["generations"]}) == 3


def test_cohere_likelihoods_are_told_by_token() -> None:
    tokens = (TokenLogprob("Hé", -1.0), TokenLogprob("llo", -2.0))
    generation = Generation("Héllo", 7, 3, "stop", None, tokens)
    (found,) = answer("cohere", generation)["generations"]
    assert found["likelihood"] == -1.5
    assert found["token_likelihoods"] == [
        {"token": "Hé", "likelihood": -1.0},
        {"token": "llo", "likelihood": -2.0},
    ]


def test_llamas_answer_has_its_form() -> None:
    assert answer("llama", done()) == {
        "generation": "Héllo",
        "prompt_token_count": 7,
        "generation_token_count": 3,
        "stop_reason": "stop",
    }


def test_mistrals_answer_has_its_form() -> None:
    assert answer("mistral", done()) == {"outputs": [{"text": "Héllo", "stop_reason": "stop"}]}


def test_claudes_answer_has_its_form() -> None:
    found = answer("claude", done("stop_sequence", "Q:"))
    assert found.pop("id").startswith("msg_bdrk_")
    assert found.pop("model").startswith("claude-3")
    assert found == {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": "Héllo"}],
        "stop_reason": "stop_sequence",
        "stop_sequence": "Q:",
        "usage": {"input_tokens": 7, "output_tokens": 3},
    }


def test_novas_answer_has_its_form() -> None:
    assert answer("nova", done()) == {
        "output": {"message": {"role": "assistant", "content": [{"text": "Héllo"}]}},
        "stopReason": "end_turn",
        "usage": {"inputTokens": 7, "outputTokens": 3, "totalTokens": 10},
    }


@pytest.mark.parametrize("family", BODIES)
def test_an_unknown_key_is_refused_in_bedrocks_words(family: str) -> None:
    wanted = f"Malformed input request: #: extraneous key [x] is not permitted, {AGAIN}"
    assert message(family, {**BODIES[family], "x": 1}) == wanted


@pytest.mark.parametrize("family", BODIES)
def test_each_missing_key_is_named(family: str) -> None:
    for key in BODIES[family]:
        if (family, key) != ("nova", "schemaVersion"):
            body = {name: value for name, value in BODIES[family].items() if name != key}
            wanted = f"Malformed input request: #: required key [{key}] not found, {AGAIN}"
            assert message(family, body) == wanted


@pytest.mark.parametrize("family", BODIES)
def test_too_many_tokens_are_refused_in_bedrocks_words(family: str) -> None:
    limit = base(family).max_output_tokens
    assert parse(family, with_key(family, MAX_TOKENS_KEY[family], limit)).sampling.max_tokens
    assert message(family, with_key(family, MAX_TOKENS_KEY[family], limit + 1)) == (
        f"The maximum tokens you requested exceeds the model limit of {limit}. Try again with a "
        f"maximum tokens value that is lower than {limit}."
    )
    for wrong in (0, -1):
        path = "/".join(MAX_TOKENS_KEY[family])
        assert f"#/{path}: {wrong} is not greater or equal to 1" in message(
            family, with_key(family, MAX_TOKENS_KEY[family], wrong)
        )


@pytest.mark.parametrize(
    ("family", "path", "value", "violation"),
    [
        ("titan", ("inputText",), "", "expected minLength: 1, actual: 0"),
        ("titan", ("inputText",), 3, "expected type: String, found: Integer"),
        ("titan", ("textGenerationConfig",), [], "expected type: JSONObject, found: JSONArray"),
        ("titan", ("textGenerationConfig", "temperature"), 1.1, "1.1 is not less or equal to 1"),
        ("titan", ("textGenerationConfig", "temperature"), -0.1, "-0.1 is not greater or equal to"),
        ("titan", ("textGenerationConfig", "topP"), 0, "0 is not greater than 0"),
        ("titan", ("textGenerationConfig", "topP"), True, "expected type: Number, found: Boolean"),
        ("titan", ("textGenerationConfig", "stopSequences"), [""], "expected minLength: 1"),
        ("titan", ("textGenerationConfig", "stopSequences"), ["x" * 1001], "expected maxLength"),
        ("titan", ("textGenerationConfig", "maxTokenCount"), 1.5, "type: Integer, found: Number"),
        ("cohere", ("temperature",), 5.1, "5.1 is not less or equal to 5"),
        ("cohere", ("k",), 501, "501 is not less or equal to 500"),
        ("cohere", ("num_generations",), 6, "6 is not less or equal to 5"),
        ("cohere", ("stop_sequences",), ["a"] * 5, "expected maximum item count: 4, found: 5"),
        ("cohere", ("return_likelihoods",), "SOME", "SOME is not a valid enum value"),
        ("cohere", ("stream",), "yes", "expected type: Boolean, found: String"),
        ("llama", ("temperature",), None, "expected type: Number, found: Null"),
        ("llama", ("top_p",), "0.9", "expected type: Number, found: String"),
        ("llama", ("prompt",), "", "expected minLength: 1, actual: 0"),
        ("mistral", ("top_k",), 0, "0 is not greater or equal to 1"),
        ("claude", ("anthropic_version",), "2023", "2023 is not a valid enum value"),
        ("claude", ("messages",), [], "expected minimum item count: 1, found: 0"),
        ("claude", ("messages",), ["x"], "expected type: JSONObject, found: String"),
        ("claude", ("system",), 5, "expected type: String or JSONArray"),
        ("nova", ("messages",), {}, "expected type: JSONArray, found: JSONObject"),
        ("nova", ("inferenceConfig", "topK"), 129, "129 is not less or equal to 128"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_is_allowed(
    family: str, path: tuple[str, ...], value: Any, violation: str
) -> None:
    found = message(family, with_key(family, path, value))
    assert found.startswith(f"Malformed input request: #/{'/'.join(path)}")
    assert violation in found
    assert found.endswith(AGAIN)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("claude", {"tools": [{}]}, "#/tools/0: required key [name] not found"),
        ("claude", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type text"),
        ("claude", {"messages": [{"role": "assistant", "content": "Hi"}]}, "first message"),
        ("claude", {"messages": [{"role": "user", "content": ""}]}, "must not be empty"),
        ("claude", {"messages": [{"role": "system", "content": "Hi"}]}, "enum"),
        ("nova", {"toolConfig": {}}, "toolConfig"),
        ("nova", {"messages": [{"role": "user", "content": [{"image": {}}]}]}, "image"),
        ("nova", {"messages": [{"role": "user", "content": []}]}, "minimum item count"),
        ("llama", {"images": []}, "images"),
        ("cohere", {"stream": True}, "stream"),
        ("cohere", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("cohere", {"return_likelihoods": "ALL"}, "ALL"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(
    family: str, changes: dict[str, Any], named: str
) -> None:
    assert named in message(family, {**BODIES[family], **changes})


STOP_KEYS = {
    "titan": ("textGenerationConfig", "stopSequences"),
    "cohere": ("stop_sequences",),
    "claude": ("stop_sequences",),
    "mistral": ("stop",),
    "nova": ("inferenceConfig", "stopSequences"),
}


@pytest.mark.parametrize("family", STOP_KEYS)
@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([""], "expected minLength: 1, actual: 0"),
        (["x" * 1001], "expected maxLength: 1000, actual: 1001"),
        (["x"] * 2501, "found: 2501"),
        ([1], "expected type: String, found: Integer"),
        ("x", "expected type: JSONArray, found: String"),
        ({"0": "x"}, "expected type: JSONArray, found: JSONObject"),
    ],
)
def test_stop_sequences_that_are_empty_huge_or_too_many_are_refused(
    family: str, value: Any, named: str
) -> None:
    *parents, last = STOP_KEYS[family]
    changes: dict[str, Any] = {last: value}
    for key in reversed(parents):
        changes = {key: changes}
    assert named in message(family, {**BODIES[family], **changes})


def test_several_violations_are_counted_and_told() -> None:
    found = message("llama", {"temperature": 2, "x": 1})
    assert found.startswith(f"Malformed input request: 3 schema violations found, {AGAIN}")
    for part in ("[prompt]", "[x]", "#/temperature: 2"):
        assert part in found


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty"),
        (b"{", "line 1, column 2"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
        (b'{"prompt": "a\\u0000"}', "U+0000"),
        (b'{"prompt": "Hi",}', "not JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b"[" * 200_000, "nests deeper"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "number"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    found = message("llama", body)
    assert found.startswith(f"Malformed input request, {AGAIN}")
    assert reason in found


@pytest.mark.parametrize("body", [b"[]", b'"Hi"', b"null", b"3", b"true"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    assert "#: expected type: JSONObject, found: " in message("llama", body)


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert parse("llama", b'\xef\xbb\xbf{"prompt": "Hi"}').messages == USER


def test_a_long_key_is_not_repeated_in_full() -> None:
    assert len(message("llama", {"prompt": "Hi", "x" * 100_000: 1})) < 300


KEYS = sorted(
    {
        "inputText textGenerationConfig temperature topP maxTokenCount stopSequences prompt p k "
        "max_tokens stop_sequences return_likelihoods stream num_generations logit_bias truncate "
        "top_p top_k max_gen_len stop anthropic_version messages system metadata role content "
        "type text schemaVersion inferenceConfig maxTokens",
    }.pop().split()
)
WORDS = ["user", "assistant", "text", "END", "GENERATION", "bedrock-2023-05-31", "messages-v1"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(), inner, max_size=6)
    ),
    max_leaves=25,
)


@given(st.sampled_from(sorted(BODIES)), st.dictionaries(st.sampled_from(KEYS), JSON))
def test_no_json_does_anything_but_parse_or_be_refused(family: str, value: Any) -> None:
    for body in (value, {**BODIES[family], **value}):
        with suppress(ValidationException):
            found = parse(family, body)
            assert found.messages
            found.messages[0].text.encode("utf-8")
            assert format_body(base(family), found, [done()] * found.num_generations)


@given(st.sampled_from(sorted(BODIES)), st.binary(max_size=60))
def test_no_bytes_do_anything_but_be_refused(family: str, body: bytes) -> None:
    with pytest.raises(ApiError):
        parse(family, body)
