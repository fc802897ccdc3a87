"""The OpenAI-style paths, asked by OpenAI's own client through a real gateway."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import sqlalchemy as sa
from tests.unit.api.runtime_gateway import (
    ANSWER,
    SECONDS,
    WEIGHTS,
    Gateway,
    running_gateway,
    wait_until,
)
from tests.unit.store.build import ACCOUNT, REGION, new_model, new_throughput

from outcrop.data.records import Message
from outcrop.errors import (
    ApiError,
    ModelErrorException,
    ModelNotReadyException,
    ThrottlingException,
    ValidationException,
)
from outcrop.identity import accounts, api_keys
from outcrop.serve.request import Generation, TokenEvent, TokenLogprob
from outcrop.store import identity, models, throughputs
from outcrop.store.database import transaction

LLAMA = "meta.llama3-8b-instruct-v1:0"
TITAN = "amazon.titan-text-lite-v1"
HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT = {"model": LLAMA, "messages": HELLO}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("openai") / "data") as found:
        yield found


@pytest.fixture(autouse=True)
def _scripted(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER)


@pytest.fixture(scope="module")
def key(gateway: Gateway) -> str:
    """The key that the first start made."""
    return api_keys.load_or_make_api_key(gateway.settings).key


@pytest.fixture
def client(gateway: Gateway, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as made:
        yield made


def _post(
    gateway: Gateway, path: str, body: object, key: str | None, method: str = "POST"
) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with httpx.Client(trust_env=False, timeout=SECONDS) as http:
        return http.request(method, f"{gateway.url}{path}", headers=headers, content=content)


def _user(gateway: Gateway, name: str, *statements: dict[str, Any]) -> str:
    """Return the API key of a new user with these permissions."""
    key = api_keys.new_api_key(ACCOUNT, name)
    policy = json.dumps({"Version": "2012-10-17", "Statement": list(statements)})
    with transaction(gateway.engine) as connection:
        accounts.create_user(connection, ACCOUNT, name)
        if statements:
            accounts.put_user_policy(connection, ACCOUNT, name, "p", policy)
        api_keys.put_api_key(connection, key)
    return key.key


def _allow(action: str | list[str], resource: str = "*") -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource}


# --- chat completions -----------------------------------------------------------------------------


def test_a_chat_is_answered_in_openais_shape(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=LLAMA,
        messages=[
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Well"},
            {"role": "user", "content": "now"},
        ],
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.25,
        stop=["\n", "END"],
        seed=4,
    )
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == LLAMA
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Héllo you")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 4)
    assert answer.usage.total_tokens == 11
    (asked,) = gateway.model.requests
    assert asked.messages == (
        Message("system", "Be short."),
        Message("user", "Hello"),
        Message("assistant", "Yes?"),
        Message("user", "Well\nnow"),
    )
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (9, 0.5, 0.25)
    assert (sampling.stop, sampling.seed, sampling.logprobs) == (("\n", "END"), 4, False)


def test_a_chat_that_sets_nothing_has_openais_defaults(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    client.chat.completions.create(model=LLAMA, messages=HELLO)
    sampling = gateway.model.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 1.0, None)
    assert (sampling.stop, sampling.seed) == ((), None)


def test_several_answers_are_drawn_from_seeds_that_follow_from_the_one_given(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    answer = client.chat.completions.create(model=LLAMA, messages=HELLO, n=3, seed=10)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(item.sampling.seed or 0 for item in gateway.model.requests) == [10, 11, 12]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 12)


def test_an_answer_that_was_cut_says_length(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.model.script(Generation("cut", 7, 3, "length"))
    answer = client.chat.completions.create(model=LLAMA, messages=HELLO, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    gateway.model.script(Generation("a", 7, 3, "stop_sequence", "END"))
    answer = client.chat.completions.create(model=LLAMA, messages=HELLO, stop="END")
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities_of_a_chats_tokens(gateway: Gateway, client: openai.OpenAI) -> None:
    tokens = (TokenLogprob("é", -0.5), TokenLogprob("\ufffd", -2.0))
    gateway.model.script(Generation("é", 7, 2, "stop", logprobs=tokens))
    answer = client.chat.completions.create(
        model=LLAMA, messages=HELLO, logprobs=True, top_logprobs=0
    )
    assert gateway.model.requests[0].sampling.logprobs
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [(item.token, item.logprob) for item in found.content] == [("é", -0.5), ("\ufffd", -2.0)]
    assert [item.bytes for item in found.content] == [[0xC3, 0xA9], None]
    assert [item.top_logprobs for item in found.content] == [[], []]


def test_the_likeliest_tokens_stand_beside_those_of_a_chat(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    token = TokenLogprob("a", -1.5, (("b", -0.5), ("\ufffd", -1.0)))
    gateway.model.script(Generation("a", 7, 1, "stop", logprobs=(token,)))
    answer = client.chat.completions.create(
        model=LLAMA, messages=HELLO, logprobs=True, top_logprobs=20
    )
    assert gateway.model.requests[0].sampling.top_logprobs == 20
    assert answer.choices[0].logprobs is not None
    (found,) = answer.choices[0].logprobs.content or []
    assert [(top.token, top.logprob, top.bytes) for top in found.top_logprobs] == [
        ("b", -0.5, [98]),
        ("\ufffd", -1.0, None),
    ]


# --- streams --------------------------------------------------------------------------------------


def test_a_streamed_chat_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=LLAMA, messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, last, counts = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].delta.content for part in parts] == ["", "Hél", "lo", " you"]
    assert {part.choices[0].finish_reason for part in parts} == {None}
    assert last.choices[0].finish_reason == "stop"
    assert counts.choices == []
    assert counts.usage is not None
    assert (counts.usage.prompt_tokens, counts.usage.completion_tokens) == (7, 4)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_has_no_usage_unless_it_is_asked_for(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model=LLAMA, messages=HELLO, stream=True) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_streams_bytes_are_server_sent_events_with_an_end(gateway: Gateway, key: str) -> None:
    gateway.model.script(Generation("a\u2028b", 7, 1, "stop"))
    answer = _post(gateway, "/v1/chat/completions", {**CHAT, "stream": True}, key)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.content.endswith(b"data: [DONE]\n\n")
    assert answer.content.isascii()  # U+2028 ends a line for some clients
    events = [line for line in answer.content.split(b"\n\n") if line]
    assert all(event.startswith(b"data: ") for event in events)


def test_several_streamed_answers_each_have_a_beginning_and_an_end(client: openai.OpenAI) -> None:
    texts, ends = ["", ""], [0, 0]
    with client.chat.completions.create(model=LLAMA, messages=HELLO, n=2, stream=True) as stream:
        for chunk in stream:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason is not None
    assert (texts, ends) == (["Héllo you"] * 2, [1, 1])


def test_log_probabilities_of_a_stream_are_in_its_last_chunk(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.model.script(
        TokenEvent("a", 7, 1), Generation("a", 7, 1, "stop", logprobs=(TokenLogprob("a", -1.0),))
    )
    with client.completions.create(model=LLAMA, prompt="x", logprobs=0, stream=True) as stream:
        *parts, last = list(stream)
    assert all(part.choices[0].logprobs is None for part in parts)
    assert last.choices[0].logprobs is not None
    assert last.choices[0].logprobs.token_logprobs == [-1.0]


def test_an_error_in_mid_stream_reaches_the_client(gateway: Gateway, client: openai.OpenAI) -> None:
    gateway.model.script(ANSWER[0], ending="cut")
    with client.chat.completions.create(model=LLAMA, messages=HELLO, stream=True) as stream:
        assert next(stream).choices[0].delta.content == ""
        assert next(stream).choices[0].delta.content == "Hél"
        with pytest.raises(openai.APIError, match="ended before the answer was complete"):
            next(stream)


def test_what_is_refused_before_the_first_token_has_its_status_in_a_stream_too(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    gateway.model.script(ValidationException("The prompt is too long."))
    with pytest.raises(openai.BadRequestError, match="too long"):
        client.chat.completions.create(model=LLAMA, messages=HELLO, stream=True)


def test_a_client_that_goes_away_ends_its_answers(gateway: Gateway, key: str) -> None:
    gateway.model.script(ANSWER[0], ending="wait")
    body = json.dumps({**CHAT, "stream": True})
    with (
        httpx.Client(trust_env=False, timeout=SECONDS) as http,
        http.stream(
            *("POST", f"{gateway.url}/v1/chat/completions"),
            content=body,
            headers={"authorization": f"Bearer {key}"},
        ) as answer,
    ):
        parts = answer.iter_bytes()  # one that nobody holds closes the connection
        assert next(parts).startswith(b"data: ")
        assert not gateway.model.was_left.is_set()
    assert gateway.model.was_left.wait(SECONDS)


def test_a_client_that_does_not_wait_for_a_whole_answer_ends_it(gateway: Gateway, key: str) -> None:
    gateway.model.script(ANSWER[0], ending="wait")

    def ask() -> None:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(trust_env=False, timeout=1) as http:
            http.post(
                f"{gateway.url}/v1/chat/completions",
                json=CHAT,
                headers={"authorization": f"Bearer {key}"},
            )

    asking = threading.Thread(target=ask)
    asking.start()
    assert gateway.model.was_left.wait(SECONDS)
    asking.join(SECONDS)


@pytest.mark.parametrize("stream", [False, True])
def test_a_gateway_that_ends_tells_who_waits(tmp_path: Path, stream: bool) -> None:
    with running_gateway(tmp_path / "data") as ending:
        key = api_keys.load_or_make_api_key(ending.settings).key
        ending.model.script(ANSWER[0], ending="wait")
        headers = {"authorization": f"Bearer {key}"}
        with (
            httpx.Client(trust_env=False, timeout=SECONDS, headers=headers) as http,
            ThreadPoolExecutor(1) as pool,
        ):
            body = {**CHAT, "stream": stream}
            asked = pool.submit(http.post, f"{ending.url}/v1/chat/completions", json=body)
            wait_until(lambda: bool(ending.model.requests))
            ending.server.should_exit = True
            answer = asked.result(SECONDS)
        assert ending.model.was_left.wait(SECONDS)
    assert "The service is ending. Ask again." in answer.text
    assert "[DONE]" not in answer.text
    if not stream:
        assert answer.status_code == 503


# --- models ---------------------------------------------------------------------------------------


@pytest.fixture
def throughput(gateway: Gateway) -> Iterator[str]:
    """The ARN of a throughput of a custom model that is in service."""
    with transaction(gateway.engine) as connection:
        made = throughputs.create_throughput(
            *(connection, new_throughput("fast", weights=WEIGHTS)),
            max_throughputs=2,
            max_model_units=1,
            machine_model_units=2,
        )
        throughputs.mark_in_service(connection, made.weights)
        found = throughputs.get_throughput(connection, ACCOUNT, REGION, made.arn)
        assert found is not None
    yield made.arn
    with transaction(gateway.engine) as connection:
        throughputs.delete_throughput(connection, found, now=found.created_at)


def test_the_list_has_base_models_custom_models_and_throughputs(
    gateway: Gateway, client: openai.OpenAI, throughput: str
) -> None:
    with transaction(gateway.engine) as connection:
        models.insert_model(connection, new_model("listed", spec={"weights": WEIGHTS}))
        custom = models.get_model(connection, ACCOUNT, REGION, "listed")
    assert custom is not None
    found = {model.id: model for model in client.models.list()}
    assert found[custom.arn].owned_by == ACCOUNT
    client.chat.completions.create(model="listed", messages=HELLO)
    assert gateway.model.requests[0].adapter_digest == custom.artifact_digest
    with transaction(gateway.engine) as connection:
        models.delete_model(connection, custom)
    assert custom.arn not in {model.id for model in client.models.list()}
    assert {LLAMA, TITAN, throughput} <= set(found)
    assert found[LLAMA].owned_by == "HuggingFaceTB"  # whose model it really is
    assert found[throughput].owned_by == ACCOUNT
    assert found[throughput].created > 1_700_000_000


def test_the_list_has_what_the_key_may_ask(gateway: Gateway, throughput: str) -> None:
    key = _user(
        *(gateway, "lister", _allow("bedrock:CallWithBearerToken")),
        _allow("bedrock:InvokeModel", f"arn:aws:bedrock:*::foundation-model/{TITAN}"),
    )
    with openai.OpenAI(api_key=key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [TITAN]
        with pytest.raises(openai.PermissionDeniedError):
            client.models.retrieve(LLAMA)


def test_a_model_is_described_by_every_name(client: openai.OpenAI, throughput: str) -> None:
    assert client.models.retrieve(LLAMA).id == LLAMA
    assert client.models.retrieve(throughput).id == throughput
    assert client.models.retrieve("fast").id == throughput
    arn = f"arn:aws:bedrock:{REGION}::foundation-model/{TITAN}"
    assert client.models.retrieve(arn).id == TITAN
    assert client.models.retrieve(f"{TITAN}:0:4k").id == f"{TITAN}:0:4k"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("unknown")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "name", [LLAMA, f"arn:aws:bedrock:{REGION}::foundation-model/{LLAMA}", "fast", "arn"]
)
def test_a_model_is_asked_by_every_form_of_its_id(
    client: openai.OpenAI, throughput: str, name: str
) -> None:
    model = throughput if name == "arn" else name
    answer = client.chat.completions.create(model=model, messages=HELLO)
    assert answer.model == model


def test_a_model_that_cannot_be_asked_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="identifier is invalid") as refused:
        client.chat.completions.create(model="unknown", messages=HELLO)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "wrong", "x" * 10_000, "schlüssel"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/anything"])
def test_without_a_key_that_is_known_nothing_is_answered(
    gateway: Gateway, key: str | None, path: str
) -> None:
    headers = {} if key is None else {b"authorization": f"Bearer {key}".encode()}
    with httpx.Client(trust_env=False, timeout=SECONDS) as http:
        answer = http.post(f"{gateway.url}{path}", headers=headers, json=CHAT)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert gateway.model.requests == []


@pytest.mark.parametrize("value", ["Basic eDp5", "AWS4-HMAC-SHA256 nonsense", "Bearer"])
def test_another_kind_of_authorization_is_refused_in_openais_shape(
    gateway: Gateway, value: str
) -> None:
    with httpx.Client(trust_env=False, timeout=SECONDS) as http:
        answer = http.get(f"{gateway.url}/v1/models", headers={"authorization": value})
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_disabled_key_opens_nothing(gateway: Gateway) -> None:
    key = _user(gateway, "gone", _allow("*"))
    assert _post(gateway, "/v1/models", b"", key, "GET").status_code == 200
    with transaction(gateway.engine) as connection:
        found = identity.api_key(connection, api_keys.digest(key))
        assert found is not None
        api_keys.disable_api_key(connection, found.key_id)
    assert _post(gateway, "/v1/models", b"", key, "GET").status_code == 401


@pytest.mark.parametrize(
    ("actions", "stream", "status"),
    [
        ([], False, 403),
        (["bedrock:InvokeModel"], False, 403),
        (["bedrock:CallWithBearerToken"], False, 403),
        (["bedrock:CallWithBearerToken", "bedrock:InvokeModel"], False, 200),
        (["bedrock:CallWithBearerToken", "bedrock:InvokeModel"], True, 403),
        (["bedrock:CallWithBearerToken", "bedrock:InvokeModelWithResponseStream"], True, 200),
    ],
)
def test_a_key_may_what_its_user_may(
    gateway: Gateway, actions: list[str], stream: bool, status: int
) -> None:
    name = "may-" + "-".join(action.partition(":")[2] for action in [*actions, f":{stream}"])
    key = _user(gateway, name, *([_allow(actions)] if actions else []))
    answer = _post(gateway, "/v1/chat/completions", {**CHAT, "stream": stream}, key)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "insufficient_permissions"


# --- bad input ------------------------------------------------------------------------------------

CHAT_FAULTS: list[tuple[Mapping[str, Any], str, str]] = [
    ({"model": None}, "model", "must name a model, not be null"),
    ({"model": 5}, "model", "the number 5"),
    ({"model": "x" * 3000}, "model", "2,048 are allowed"),
    ({"messages": None}, "messages", "at least one message"),
    ({"messages": []}, "messages", "an empty array"),
    ({"messages": "Hello"}, "messages", "a string"),
    ({"messages": ["Hello"]}, "messages[0]", "must be an object"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "a message of the user"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "a string"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "an array"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "null"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages[0].content[0]", "an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "'image_url'; only 'text' is read",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content[0].text",
        "must be a string",
    ),
    (
        {"messages": [*HELLO, {"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages[1].tool_calls[0]",
        "must be an object with id",
    ),
    ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, "messages[0].name", "not"),
    ({"temperature": 3}, "temperature", "is 3; it must be between 0 and 2"),
    ({"temperature": "warm"}, "temperature", "a string"),
    ({"temperature": True}, "temperature", "a boolean"),
    ({"top_p": -0.1}, "top_p", "between 0 and 1"),
    ({"max_tokens": 0}, "max_tokens", "is 0; it must be between 1 and"),
    ({"max_tokens": 10**9}, "max_tokens", "it must be between 1 and"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens", "a whole number"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
    ({"n": 0}, "n", "between 1 and 128"),
    ({"n": 129}, "n", "between 1 and 128"),
    ({"seed": 2**63}, "seed", "it must be between"),
    ({"seed": "x"}, "seed", "a whole number"),
    ({"stop": ""}, "stop", "a text of 0 characters"),
    ({"stop": ["x" * 2000]}, "stop", "a text of 2,000 characters"),
    ({"stop": [7]}, "stop", "the number 7"),
    ({"stop": 7}, "stop", "a string or a list"),
    ({"stop": ["x"] * 3000}, "stop", "3,000 texts; 2,500 are allowed"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true only"),
    ({"stream": True, "stream_options": 1}, "stream_options", "must be an object"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        "stream_options.include_usage",
        "true or false",
    ),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "not known"),
    ({"logprobs": 1}, "logprobs", "true or false"),
    ({"top_logprobs": 2}, "top_logprobs", "needs 'logprobs': true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "between 0 and 20"),
    ({"logprobs": True, "top_logprobs": "2"}, "top_logprobs", "a whole number"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "must be an object"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it out, or send 0"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
    ({"prediction": {}}, "prediction", "leave it out."),
    ({"colour": "red"}, "colour", "is not known"),
]


@pytest.mark.parametrize(
    ("change", "param", "text"), CHAT_FAULTS, ids=[fault[2] for fault in CHAT_FAULTS]
)
def test_a_faulty_chat_is_refused_by_the_name_of_the_field(
    gateway: Gateway, key: str, change: Mapping[str, Any], param: str, text: str
) -> None:
    answer = _post(gateway, "/v1/chat/completions", {**CHAT, **change}, key)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert error["message"].startswith(f"'{param}' ")
    assert text in error["message"]
    assert gateway.model.requests == []


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=LLAMA,
        messages=[{"role": "system", "content": ""}, *HELLO],
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tools=[],
        user="ann",
        metadata={"a": "b"},
        store=False,
        stop=None,
    )


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff", b"[" * 5000, b'{"model": "\\ud800"}']
)
def test_a_body_that_is_no_object_is_refused(gateway: Gateway, key: str, body: bytes) -> None:
    answer = _post(gateway, "/v1/chat/completions", body, key)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_body_that_is_too_large_is_refused(gateway: Gateway, key: str) -> None:
    body = b" " * (gateway.settings.max_body_bytes + 1)
    answer = _post(gateway, "/v1/chat/completions", body, key)
    assert answer.status_code == 400
    assert "25000000 bytes" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/chat/completions", 405, "method_not_supported"),
        ("DELETE", "/v1/completions", 405, "method_not_supported"),
        ("POST", "/v1/models", 405, "method_not_supported"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("GET", "/v1/", 404, "unknown_url"),
    ],
)
def test_what_is_not_offered_is_named(
    gateway: Gateway, key: str, method: str, path: str, status: int, code: str
) -> None:
    answer = _post(gateway, path, b"", key, method)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ("allow" in answer.headers) == (status == 405)
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("error", "status", "header"),
    [
        (ThrottlingException("Too many."), 429, ("retry-after", "1")),
        (ModelNotReadyException("Loading."), 503, ("retry-after", "1")),
        (ModelErrorException("It failed."), 500, ("x-should-retry", None)),
        (
            ApiError("Slow.", code="ModelTimeoutException", http_status=408),
            408,
            ("x-should-retry", "false"),
        ),
    ],
)
def test_an_error_of_the_model_has_the_status_that_openais_client_understands(
    gateway: Gateway, key: str, error: ApiError, status: int, header: tuple[str, str | None]
) -> None:
    gateway.model.script(error)
    answer = _post(gateway, "/v1/chat/completions", CHAT, key)
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == error.message
    assert answer.headers.get(header[0]) == header[1]


def test_a_fault_of_ours_names_the_request_and_not_the_cause(tmp_path: Path) -> None:
    with running_gateway(tmp_path / "data") as broken:
        key = api_keys.load_or_make_api_key(broken.settings).key
        with transaction(broken.engine) as connection:
            connection.execute(sa.text("DROP TABLE throughput"))
        answer = _post(broken, "/v1/models", b"", key, "GET")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (500, "server_error")
    assert answer.headers["x-request-id"] in error["message"]
    assert "throughput" not in answer.text


def test_a_path_of_a_model_is_read_as_it_was_sent(gateway: Gateway, key: str) -> None:
    path = f"/v1/models/{quote(f'arn:aws:bedrock:{REGION}::foundation-model/{LLAMA}', safe='')}"
    assert _post(gateway, path, b"", key, "GET").status_code == 200


def test_the_log_has_no_text_of_a_prompt(
    gateway: Gateway, key: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG", logger="outcrop.gateway")
    body = {**CHAT, "messages": [{"role": "user", "content": "a secret"}]}
    assert _post(gateway, "/v1/chat/completions", body, key).status_code == 200
    line = "POST /v1/chat/completions 200 arn:aws:iam::123456789012:user/owner"
    deadline = time.monotonic() + SECONDS  # it is written after the answer was sent
    while line not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.005)
    assert "secret" not in caplog.text
    assert key not in caplog.text
