"""`/v1/completions`, asked by OpenAI's own client through a real gateway."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.api.runtime_gateway import ANSWER, SECONDS, Gateway, running_gateway

from outcrop.errors import ValidationException
from outcrop.identity import api_keys
from outcrop.serve.prompt_formats import openai_answers as answers
from outcrop.serve.request import Generation, TokenEvent, TokenLogprob

LLAMA = "meta.llama3-8b-instruct-v1:0"
TITAN = "amazon.titan-text-lite-v1"
TEXT = {"model": LLAMA, "prompt": "Hello"}
PROMPT = (
    TokenLogprob("Hé", None),
    TokenLogprob("l", -0.5, (("l", -0.5), ("x", -1.0))),
    TokenLogprob("lo", -3.0, (("x", -0.25), ("y", -1.0))),
)
DRAWN = TokenLogprob("!", -0.75, (("!", -0.75), ("?", -2.0)))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("completions") / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def _scripted(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER)


@pytest.fixture(scope="module")
def key(gateway: Gateway) -> str:
    return api_keys.load_or_make_api_key(gateway.settings).key


@pytest.fixture
def client(gateway: Gateway, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as made:
        yield made


def _logprobs(answer: Any) -> Any:
    found = answer.choices[0].logprobs
    assert found is not None
    return found


# --- prompts --------------------------------------------------------------------------------------


def test_each_prompt_of_a_list_is_completed(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = client.completions.create(model=LLAMA, prompt=["one", "two"], n=2, max_tokens=5)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"Héllo you"}
    asked = sorted(str(item.prompt) for item in gateway.model.requests)
    assert asked == ["one", "one", "two", "two"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 16)


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_prompt_of_several_refuses_the_request(
    gateway: Gateway, client: openai.OpenAI, stream: bool
) -> None:
    gateway.model.late_refusal = ("two", ValidationException("not this one"))
    with pytest.raises(openai.BadRequestError, match="not this one"):
        client.completions.create(model=LLAMA, prompt=["one", "two"], stream=stream)


def test_a_completion_that_sets_nothing_has_openais_defaults(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    client.completions.create(model=LLAMA, prompt="x")
    sampling = gateway.model.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, 16)
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.top_logprobs) == (False, False, 0)


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("User: Hi\nBot:", ["User: Hi\nBot:"]),  # mark-up of the family is text here
        (["<s>[INST] Hi"], ["<s>[INST] Hi"]),
        ([5, 0, 7], [(5, 0, 7)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
        ([[5], "a"], [(5,), "a"]),
    ],
)
def test_a_prompt_is_taken_as_it_stands(
    gateway: Gateway, client: openai.OpenAI, prompt: Any, asked: list[Any]
) -> None:
    client.completions.create(model=TITAN, prompt=prompt)
    assert sorted((item.prompt for item in gateway.model.requests), key=str) == asked
    assert all(item.messages == () for item in gateway.model.requests)


# --- echo -----------------------------------------------------------------------------------------


def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=LLAMA, prompt=["one ", "two "], echo=True)
    assert [choice.text for choice in answer.choices] == ["one Héllo you", "two Héllo you"]
    with client.completions.create(model=LLAMA, prompt="one ", echo=True, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "one Héllo you"


def test_echo_of_token_ids_is_the_text_of_the_tokens(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.model.script(
        TokenEvent("!", 3, 1), Generation("!?", 3, 2, "length", prompt_logprobs=PROMPT)
    )
    answer = client.completions.create(model=LLAMA, prompt=[5, 6, 7], echo=True)
    assert gateway.model.requests[0].sampling.prompt_logprobs
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("Héllo!?", None)
    with client.completions.create(model=LLAMA, prompt=[5, 6, 7], echo=True, stream=True) as stream:
        assert [chunk.choices[0].text for chunk in stream] == ["Héllo!?", ""]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Héllo", [5, 6, 7]])
def test_without_tokens_to_draw_an_echo_is_the_prompt_alone(
    gateway: Gateway, client: openai.OpenAI, prompt: Any, stream: bool
) -> None:
    gateway.model.script(
        TokenEvent("!", 3, 1),
        Generation("!", 3, 1, "stop", logprobs=(DRAWN,), prompt_logprobs=PROMPT),
    )
    asked: dict[str, Any] = {"model": LLAMA, "prompt": prompt, "echo": True, "max_tokens": 0}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    found: Any = client.completions.create(**asked, logprobs=1, stream=stream)
    parts = list(found) if stream else [found]
    choices = [choice for part in parts for choice in part.choices]
    assert "".join(choice.text for choice in choices) == "Héllo"
    assert choices[-1].logprobs.tokens == ["Hé", "l", "lo"]
    assert choices[-1].finish_reason == "length"
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (3, 0)
    assert gateway.model.requests[0].sampling.max_tokens == 1


# --- log-probabilities ----------------------------------------------------------------------------


def test_log_probabilities_of_a_completions_tokens(gateway: Gateway, client: openai.OpenAI) -> None:
    tokens = (TokenLogprob("ab", -0.5), TokenLogprob("c", -2.0))
    gateway.model.script(Generation("abc", 7, 2, "stop", logprobs=tokens))
    found = _logprobs(client.completions.create(model=LLAMA, prompt="x", logprobs=0))
    assert (found.tokens, found.token_logprobs) == (["ab", "c"], [-0.5, -2.0])
    assert (found.text_offset, found.top_logprobs) == ([0, 2], None)
    assert not gateway.model.requests[0].sampling.prompt_logprobs


def test_the_likeliest_tokens_and_the_one_that_came_are_told(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    tokens = (
        TokenLogprob("a", -0.5, (("a", -0.5), ("b", -1.0))),
        TokenLogprob("c", -9.0, (("a", -0.5), ("b", -1.0))),
        # Tokens that share a text: the likeliest of them is told, so who came is still no winner.
        TokenLogprob("\ufffd", -9.0, (("\ufffd", -0.5), ("\ufffd", -1.0))),
    )
    gateway.model.script(Generation("ac\ufffd", 7, 3, "length", logprobs=tokens))
    found = _logprobs(client.completions.create(model=LLAMA, prompt="x", logprobs=2))
    assert gateway.model.requests[0].sampling.top_logprobs == 2
    assert found.top_logprobs == [
        {"a": -0.5, "b": -1.0},
        {"a": -0.5, "b": -1.0, "c": -9.0},
        {"\ufffd": -0.5},
    ]


@pytest.mark.parametrize("prompt", ["Héllo", [5, 6, 7]])
def test_echo_with_log_probabilities_tells_those_of_the_prompt(
    gateway: Gateway, client: openai.OpenAI, prompt: Any
) -> None:
    gateway.model.script(Generation("!", 3, 1, "length", logprobs=(DRAWN,), prompt_logprobs=PROMPT))
    answer = client.completions.create(
        model=LLAMA, prompt=prompt, echo=True, logprobs=2, max_tokens=1
    )
    assert gateway.model.requests[0].sampling.prompt_logprobs
    assert answer.choices[0].text == "Héllo!"
    found = _logprobs(answer)
    assert found.tokens == ["Hé", "l", "lo", "!"]
    assert found.token_logprobs == [None, -0.5, -3.0, -0.75]
    assert found.text_offset == [0, 2, 3, 5]
    assert found.top_logprobs == [
        None,
        {"l": -0.5, "x": -1.0},
        {"x": -0.25, "y": -1.0, "lo": -3.0},
        {"!": -0.75, "?": -2.0},
    ]


def test_beside_an_echo_the_token_that_ended_the_answer_has_its_place(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    # Clients leave out as many places at the end as they asked for tokens.
    gateway.model.script(Generation("", 3, 1, "stop", logprobs=(), prompt_logprobs=PROMPT))
    found = _logprobs(
        client.completions.create(model=LLAMA, prompt="Héllo", echo=True, logprobs=1, max_tokens=1)
    )
    assert found.tokens == ["Hé", "l", "lo", ""]
    assert found.token_logprobs == [None, -0.5, -3.0, None]
    assert found.text_offset == [0, 2, 3, 5]
    assert found.top_logprobs[-1] is None


def test_offsets_are_places_in_the_text_where_tokens_share_characters(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    part = "\ufffd"
    texts = ["a", part, part, part, "b", f" {part}", part, " b", "Paris", "is", "", "cut off"]
    tokens = tuple(TokenLogprob(text, -1.0) for text in texts)
    gateway.model.script(Generation("a日b é bParis is", 7, 12, "stop_sequence", logprobs=tokens))
    found = _logprobs(client.completions.create(model=LLAMA, prompt="x", logprobs=0))
    assert found.text_offset == [0, 1, 1, 1, 2, 3, 4, 5, 7, 13, 15, 15]


@given(st.text("ab é日\U0001f600", max_size=20), st.sets(st.integers(1, 80)))
def test_wherever_a_text_is_cut_whole_tokens_stand_where_they_are_said_to(
    text: str, cuts: set[int]
) -> None:
    content = text.encode()
    places = [0, *sorted(place for place in cuts if place < len(content)), len(content)]
    texts = [content[a:b].decode(errors="replace") for a, b in itertools.pairwise(places)]
    tokens = tuple(TokenLogprob(token, -1.0) for token in texts)
    told = answers.logprobs("text", Generation(text, 1, len(tokens), "length", logprobs=tokens))
    assert told is not None
    assert told["text_offset"] == sorted(told["text_offset"])
    for token, offset in zip(texts, told["text_offset"], strict=True):
        assert 0 <= offset <= len(text)
        assert "\ufffd" in token or text.startswith(token, offset)


def test_log_probabilities_of_a_stream_are_in_its_last_chunk(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.model.script(
        TokenEvent("!", 3, 1),
        Generation("!", 3, 1, "length", logprobs=(DRAWN,), prompt_logprobs=PROMPT),
    )
    with client.completions.create(
        model=LLAMA, prompt="Héllo", logprobs=1, echo=True, stream=True
    ) as stream:
        *parts, last = list(stream)
    assert [part.choices[0].text for part in parts] == ["Héllo", "!"]
    assert all(part.choices[0].logprobs is None for part in parts)
    assert _logprobs(last).token_logprobs == [None, -0.5, -3.0, -0.75]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"prompt": None}, "prompt", "must be a string or an array, not null"),
        ({"prompt": {}}, "prompt", "an object"),
        ({"prompt": 5}, "prompt", "the number 5"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [""]}, "prompt[0]", "must not be empty"),
        ({"prompt": [[]]}, "prompt[0]", "must not be empty"),
        ({"prompt": [[1], []]}, "prompt[1]", "must not be empty"),
        ({"prompt": [[[1]]]}, "prompt[0][0]", "a token id, a whole number, not an array"),
        ({"prompt": [[]] * 5000}, "prompt", "5,000 prompts; 2,048 are allowed"),
        ({"prompt": ["a", {}]}, "prompt[1]", "a string or an array of token ids, not an object"),
        ({"prompt": ["a", 1]}, "prompt[1]", "the number 1"),
        ({"prompt": [1, "a"]}, "prompt[1]", "a token id, a whole number, not a string"),
        ({"prompt": [1, 2.5]}, "prompt[1]", "not the number 2.5"),
        ({"prompt": [2.0]}, "prompt[0]", "not the number 2.0"),
        ({"prompt": [1, True]}, "prompt[1]", "a boolean"),
        ({"prompt": [True]}, "prompt[0]", "a boolean"),
        ({"prompt": [1, None]}, "prompt[1]", "null"),
        ({"prompt": [1, -1]}, "prompt[1]", "is -1, which is no token id"),
        ({"prompt": [[10**30]]}, "prompt[0][0]", "no token id of any model"),
        ({"prompt": ["a"] * 3000}, "prompt", "3,000 prompts"),
        ({"prompt": ["a"] * 100, "n": 100}, "prompt", "10,000 answers"),
        ({"logprobs": 6}, "logprobs", "between 0 and 5"),
        ({"logprobs": -1}, "logprobs", "between 0 and 5"),
        ({"logprobs": True}, "logprobs", "a whole number"),
        ({"logprobs": "1"}, "logprobs", "a whole number"),
        ({"top_logprobs": 1}, "top_logprobs", "is not known"),
        ({"max_tokens": 0}, "max_tokens", "'echo': true only"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "between 0 and"),
        ({"echo": 1}, "echo", "true or false"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "is not known"),
    ],
)
def test_a_faulty_completion_is_refused_by_the_name_of_the_field(
    gateway: Gateway, key: str, change: Mapping[str, Any], param: str, text: str
) -> None:
    with httpx.Client(trust_env=False, timeout=SECONDS) as http:
        answer = http.post(
            f"{gateway.url}/v1/completions",
            content=json.dumps({**TEXT, **change}),
            headers={"authorization": f"Bearer {key}"},
        )
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert error["message"].startswith(f"'{param}' ")
    assert text in error["message"]
    assert gateway.model.requests == []


def test_a_token_that_the_model_does_not_know_is_the_callers_mistake(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.model.script(ValidationException("The prompt has the token 300."))
    with pytest.raises(openai.BadRequestError, match="the token 300"):
        client.completions.create(model=LLAMA, prompt=[300])
