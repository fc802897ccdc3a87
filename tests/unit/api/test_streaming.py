"""InvokeModelWithResponseStream as boto3 reads it: chunks, their end, and what ends them early."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import aclosing, closing
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError, ReadTimeoutError
from tests.unit.api.conftest import Context
from tests.unit.api.runtime_gateway import ANSWER, WEIGHTS, Gateway, running_gateway, wait_until
from tests.unit.store.build import new_throughput

from outcrop.api import runtime, targets
from outcrop.api.context import Services
from outcrop.data.records import Message
from outcrop.errors import (
    ApiError,
    ModelErrorException,
    ModelTimeoutException,
    ServiceUnavailableException,
    ThrottlingException,
    ValidationException,
)
from outcrop.serve.prompt_formats import NativeRequest
from outcrop.serve.request import Generation, SamplingParams, TokenEvent, TokenLogprob
from outcrop.store import servers, throughputs
from outcrop.store.database import transaction

TITAN = "amazon.titan-text-express-v1"
COHERE = "cohere.command-text-v14"
LLAMA = "meta.llama3-1-8b-instruct-v1:0"
CLAUDE = "anthropic.claude-3-haiku-20240307-v1:0"
MISTRAL = "mistral.mistral-7b-instruct-v0:2"
NOVA = "amazon.nova-micro-v1:0"
METRICS = "amazon-bedrock-invocationMetrics"
CLAUDE_BODY = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "Hi"}],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("streaming")) as place:
        yield place


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    """The shared gateway, whose model server answers as usual."""
    shared.model.script(*ANSWER)
    return shared


def ask(gateway: Gateway, model: str, body: Any, **params: Any) -> Any:
    client = gateway.client()
    return client.invoke_model_with_response_stream(modelId=model, body=json.dumps(body), **params)


def chunks(answer: Any) -> list[Any]:
    with closing(answer["body"]) as events:
        return [json.loads(event["chunk"]["bytes"]) for event in events]


def streamed(gateway: Gateway, model: str, body: Any) -> list[Any]:
    """Return the chunks of an answer, without the metrics, which are checked."""
    found = chunks(ask(gateway, model, body))
    metrics = found[-1].pop(METRICS)
    assert metrics.keys() == {
        "inputTokenCount",
        "outputTokenCount",
        "invocationLatency",
        "firstByteLatency",
    }
    assert metrics["inputTokenCount"] == 7
    assert metrics["outputTokenCount"] % 4 == 0
    assert 0 <= metrics["firstByteLatency"] <= metrics["invocationLatency"]
    assert not any(METRICS in chunk for chunk in found)
    return found


def test_titans_chunks_have_their_form(gateway: Gateway) -> None:
    def chunk(text: str, total: int | None, reason: str | None, count: int | None) -> Any:
        return {
            "outputText": text,
            "index": 0,
            "totalOutputTextTokenCount": total,
            "completionReason": reason,
            "inputTextTokenCount": count,
        }

    assert streamed(gateway, TITAN, {"inputText": "Hi"}) == [
        chunk("Hél", None, None, 7),
        chunk("lo", None, None, None),
        chunk(" you", 4, "FINISH", 7),
    ]


def test_coheres_chunks_have_their_form(gateway: Gateway) -> None:
    assert streamed(gateway, COHERE, {"prompt": "Hi", "stream": True}) == [
        {"text": "Hél", "is_finished": False},
        {"text": "lo", "is_finished": False},
        {"text": " you", "is_finished": False},
        {"is_finished": True, "finish_reason": "COMPLETE"},
    ]


def test_coheres_several_answers_have_an_index_and_one_set_of_metrics(gateway: Gateway) -> None:
    body = {"prompt": "Hi", "stream": True, "num_generations": 2}
    found = streamed(gateway, COHERE, body)
    assert [chunk["index"] for chunk in found] == [0] * 4 + [1] * 4
    assert [chunk["is_finished"] for chunk in found] == [False, False, False, True] * 2
    assert len(gateway.model.requests) == 2


def test_coheres_last_chunk_has_the_likelihoods_that_were_asked_for(gateway: Gateway) -> None:
    logprobs = (TokenLogprob("Hi", -1.0),)
    gateway.model.script(Generation("Hi", 7, 4, "length", None, logprobs))
    body = {"prompt": "Hi", "stream": True, "return_likelihoods": "GENERATION"}
    assert streamed(gateway, COHERE, body) == [
        {"text": "Hi", "is_finished": False},
        {
            "is_finished": True,
            "finish_reason": "MAX_TOKENS",
            "likelihood": -1.0,
            "token_likelihoods": [{"token": "Hi", "likelihood": -1.0}],
        },
    ]


def test_a_cohere_body_that_asks_for_no_pieces_gets_one_chunk(gateway: Gateway) -> None:
    (found,) = streamed(gateway, COHERE, {"prompt": "Hi", "num_generations": 2})
    assert [each["text"] for each in found["generations"]] == ["Héllo you"] * 2
    assert found["prompt"] == "Hi"


def test_llamas_chunks_have_their_form(gateway: Gateway) -> None:
    def chunk(text: str, prompt: int | None, count: int, reason: str | None) -> Any:
        return {
            "generation": text,
            "prompt_token_count": prompt,
            "generation_token_count": count,
            "stop_reason": reason,
        }

    assert streamed(gateway, LLAMA, {"prompt": "Hi"}) == [
        chunk("Hél", 7, 1, None),
        chunk("lo", None, 2, None),
        chunk(" you", None, 4, "stop"),
    ]


def test_mistrals_chunks_have_their_form(gateway: Gateway) -> None:
    assert streamed(gateway, MISTRAL, {"prompt": "Hi"}) == [
        {"outputs": [{"text": "Hél", "stop_reason": None}]},
        {"outputs": [{"text": "lo", "stop_reason": None}]},
        {"outputs": [{"text": " you", "stop_reason": "stop"}]},
    ]


def test_claudes_chunks_are_anthropics_events_in_order(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER[:2], Generation("Héllo", 7, 4, "stop_sequence", "\n"))
    start, *rest = streamed(gateway, CLAUDE, CLAUDE_BODY)
    assert start["type"] == "message_start"
    assert start["message"].pop("id").startswith("msg_bdrk_")
    assert start["message"] == {
        "type": "message",
        "role": "assistant",
        "model": "claude-3-haiku-20240307",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 1},
    }

    def delta(text: str) -> Any:
        inner = {"type": "text_delta", "text": text}
        return {"type": "content_block_delta", "index": 0, "delta": inner}

    assert rest == [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        delta("Hél"),
        delta("lo"),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "stop_sequence", "stop_sequence": "\n"},
            "usage": {"output_tokens": 4},
        },
        {"type": "message_stop"},
    ]


def test_novas_chunks_are_named_as_converses_events(gateway: Gateway) -> None:
    body = {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}

    def delta(text: str) -> Any:
        return {"contentBlockDelta": {"delta": {"text": text}, "contentBlockIndex": 0}}

    assert streamed(gateway, NOVA, body) == [
        {"messageStart": {"role": "assistant"}},
        *(delta("Hél"), delta("lo"), delta(" you")),
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "end_turn"}},
        {
            "metadata": {
                "usage": {"inputTokens": 7, "outputTokens": 4, "totalTokens": 11},
                "metrics": {},
                "trace": {},
            }
        },
    ]


def test_an_answer_of_nothing_ends_as_any_other(gateway: Gateway) -> None:
    gateway.model.script(Generation("", 7, 4, "stop"))
    bodies = {
        TITAN: {"inputText": "Hi"},
        COHERE: {"prompt": "Hi", "stream": True},
        LLAMA: {"prompt": "Hi"},
        MISTRAL: {"prompt": "Hi"},
        CLAUDE: CLAUDE_BODY,
        NOVA: {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]},
    }
    for model, body in bodies.items():
        assert streamed(gateway, model, body)


def test_the_head_has_both_content_types_and_the_request_id(gateway: Gateway) -> None:
    answer = ask(gateway, LLAMA, {"prompt": "Hi"}, performanceConfigLatency="standard")
    assert answer["contentType"] == "application/json"
    assert answer["performanceConfigLatency"] == "standard"
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    assert headers["content-type"] == "application/vnd.amazon.eventstream"
    assert headers["x-amzn-bedrock-content-type"] == "application/json"
    assert headers["x-amzn-requestid"]
    assert chunks(answer)


def test_streams_are_asked_for_as_invokemodel_asks(gateway: Gateway) -> None:
    client, body = gateway.client(), json.dumps({"prompt": "Hi", "temperature": 0})
    whole = client.invoke_model(modelId=LLAMA, body=body)
    assert json.loads(whole["body"].read())["generation"] == "Héllo you"
    assert chunks(ask(gateway, LLAMA, {"prompt": "Hi", "temperature": 0}))
    first, second = gateway.model.requests
    assert first == second


def test_every_form_of_a_models_id_is_streamed(gateway: Gateway) -> None:
    with transaction(gateway.engine) as connection:
        made = throughputs.create_throughput(
            connection,
            new_throughput(
                "fast",
                f"arn:aws:bedrock:{gateway.settings.region}::foundation-model/{TITAN}",
                weights=WEIGHTS,
            ),
            max_throughputs=1,
            max_model_units=1,
            machine_model_units=2,
        )
        throughputs.mark_in_service(connection, made.weights)
    region = gateway.settings.region
    for model in (
        f"{TITAN}:0:8k",
        f"arn:aws:bedrock:{region}::foundation-model/{TITAN}",
        made.arn,
        made.name,
    ):
        assert chunks(ask(gateway, model, {"inputText": "Hi"}))[-1][METRICS]


def test_who_may_only_invoke_may_not_stream(gateway: Gateway) -> None:
    client = gateway.client(gateway.user("only-invoke", "bedrock:InvokeModel"))
    body = json.dumps({"prompt": "Hi"})
    with pytest.raises(ClientError, match="InvokeModelWithResponseStream"):
        client.invoke_model_with_response_stream(modelId=LLAMA, body=body)
    assert client.invoke_model(modelId=LLAMA, body=body)["body"].read()


# --- what goes wrong before the first piece is an error of the request ---------------------------


def refusal(gateway: Gateway, model: str, body: Any, **params: Any) -> tuple[str, int, str]:
    with pytest.raises(ClientError) as caught:
        ask(gateway, model, body, **params)
    assert not isinstance(caught.value, EventStreamError)
    found = caught.value.response
    status = found["ResponseMetadata"]["HTTPStatusCode"]
    return found["Error"]["Code"], status, found["Error"]["Message"]


@pytest.mark.parametrize(
    ("body", "params", "named"),
    [
        ({}, {}, "required key [prompt]"),
        ({"prompt": "Hi", "max_gen_len": 10**6}, {}, "exceeds the model limit"),
        ({"prompt": "Hi"}, {"accept": "text/plain"}, "application/json"),
        ({"prompt": "Hi"}, {"guardrailIdentifier": "abc", "guardrailVersion": "1"}, "Guardrails"),
        ({"prompt": "Hi"}, {"performanceConfigLatency": "optimized"}, "is not supported for"),
        ({"prompt": "Hi"}, {"serviceTier": "flex"}, "service tier flex"),
        ({"prompt": "Hi"}, {"requestMetadata": "{"}, "requestMetadata is not JSON"),
        ({"prompt": "Hi"}, {"requestMetadata": "[1]"}, "requestMetadata"),
        ({"prompt": "Hi"}, {"requestMetadata": '{"a": 1}'}, "requestMetadata"),
        ({"prompt": "Hi"}, {"requestMetadata": "{}"}, "requestMetadata"),
    ],
)
def test_what_cannot_be_is_refused_before_the_stream(
    gateway: Gateway, body: Any, params: dict[str, Any], named: str
) -> None:
    code, status, message = refusal(gateway, LLAMA, body, **params)
    assert (code, status) == ("ValidationException", 400)
    assert named in message
    assert not gateway.model.requests


def test_metadata_and_what_is_usual_are_taken(gateway: Gateway) -> None:
    params = {
        "requestMetadata": '{"team": "a"}',
        "serviceTier": "default",
        "performanceConfigLatency": "standard",
        "accept": "*/*",
        "contentType": "application/json",
    }
    answer = ask(gateway, LLAMA, {"prompt": "Hi"}, **params)
    assert answer["serviceTier"] == "default"
    assert chunks(answer)


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (ValidationException("Too long."), "ValidationException", 400),
        (ThrottlingException("Too many."), "ThrottlingException", 429),
        (ModelErrorException("Broke."), "ModelErrorException", 424),
        (ModelTimeoutException("Late."), "ModelTimeoutException", 408),
    ],
)
def test_what_the_model_server_refuses_is_an_error_of_the_request(
    gateway: Gateway, error: ApiError, code: str, status: int
) -> None:
    gateway.model.script(error)
    assert refusal(gateway, LLAMA, {"prompt": "Hi"}) == (code, status, error.message)


# --- what goes wrong later is an event of the stream ---------------------------------------------


def broken(gateway: Gateway, model: str = LLAMA) -> tuple[list[Any], EventStreamError]:
    """Return the chunks that came before a stream's error, and the error."""
    found: list[Any] = []
    with closing(ask(gateway, model, {"prompt": "Hi"})["body"]) as events:
        try:
            found.extend(json.loads(event["chunk"]["bytes"]) for event in events)
        except EventStreamError as error:
            return found, error
    pytest.fail(f"the stream ended well after {found}")


def test_a_model_server_that_dies_ends_the_stream_with_the_modelled_error(
    gateway: Gateway,
) -> None:
    gateway.model.script(*ANSWER[:2], ending="cut")
    found, error = broken(gateway)
    assert [chunk["generation"] for chunk in found] == ["Hél", "lo"]
    assert error.response["Error"]["Code"] == "modelStreamErrorException"
    assert "before the answer was complete" in error.response["Error"]["Message"]
    gateway.model.script(*ANSWER)
    assert chunks(ask(gateway, LLAMA, {"prompt": "Hi"}))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelErrorException("Broke."), "modelStreamErrorException"),
        (ModelTimeoutException("Late."), "modelTimeoutException"),
        (ThrottlingException("Enough."), "throttlingException"),
        (ServiceUnavailableException("Ending."), "serviceUnavailableException"),
        (ValidationException("Wrong."), "validationException"),
    ],
)
def test_an_error_in_mid_stream_is_an_event_of_its_name(
    gateway: Gateway, error: ApiError, code: str
) -> None:
    gateway.model.script(ANSWER[0], error)
    found, raised = broken(gateway)
    assert len(found) == 1
    assert raised.response["Error"] == {"Code": code, "Message": error.message}


def test_a_fault_of_ours_is_told_by_request_id_and_logged(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise RuntimeError("the secret cause")

    caplog.set_level(logging.INFO, "outcrop.gateway")
    monkeypatch.setattr("outcrop.api.streaming.milliseconds", lambda since: 1)
    gateway.model.script(*ANSWER)
    monkeypatch.setattr("outcrop.api.streaming._metrics", fail)
    found, error = broken(gateway)
    assert len(found) == 2
    assert error.response["Error"]["Code"] == "internalServerException"
    assert "secret" not in error.response["Error"]["Message"]
    wait_until(lambda: "200 InternalServerException" in caplog.text)
    assert "the secret cause" in caplog.text


def test_a_model_that_takes_too_long_in_mid_stream_ends_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_gateway(tmp_path_factory.mktemp("late"), invoke_timeout_seconds=1) as place:
        place.model.script(ANSWER[0], ending="wait")
        found, error = broken(place)
        assert len(found) == 1
        assert error.response["Error"]["Code"] == "modelTimeoutException"
        assert place.model.was_left.wait(10)


# --- clients that go away ------------------------------------------------------------------------


def test_a_client_that_goes_away_in_mid_stream_cancels_the_request(
    gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outcrop.gateway")
    gateway.model.script(*ANSWER[:2], ending="wait")
    answer = ask(gateway, LLAMA, {"prompt": "Hi"})
    assert next(iter(answer["body"]))["chunk"]
    assert not gateway.model.was_left.is_set()
    answer["body"].close()
    assert gateway.model.was_left.wait(10)
    wait_until(lambda: "InvokeModelWithResponseStream 499" in caplog.text)


def test_a_client_that_goes_away_before_the_first_piece_cancels_the_request(
    gateway: Gateway,
) -> None:
    gateway.model.script(ending="wait")
    hasty = gateway.client(read_timeout=0.3)
    with pytest.raises(ReadTimeoutError):
        hasty.invoke_model_with_response_stream(modelId=LLAMA, body=b'{"prompt": "Hi"}')
    assert gateway.model.was_left.wait(10)


def test_a_gateway_that_ends_tells_its_streams_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with running_gateway(tmp_path_factory.mktemp("ending")) as place:
        place.model.script(ANSWER[0], ending="wait")
        answer = ask(place, LLAMA, {"prompt": "Hi"})
        with closing(answer["body"]) as body:
            events = iter(body)
            assert next(events)["chunk"]
            place.server.should_exit = True
            with pytest.raises(EventStreamError, match="The service is ending") as caught:
                next(events)
        assert caught.value.response["Error"]["Code"] == "serviceUnavailableException"
        assert place.model.was_left.wait(10)


def test_time_that_a_slow_reader_takes_is_not_the_models(
    gateway: Gateway, context: Context, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    with transaction(services.engine) as connection:
        servers.want(connection, WEIGHTS)
        servers.mark_starting(connection, WEIGHTS, str(gateway.model.socket))
        servers.mark_ready(connection, WEIGHTS, 1)
    clock = [0.0]
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    caller = context("InvokeModel")
    target = targets.resolve(caller, LLAMA, "InvokeModel")
    native = NativeRequest((Message("user", "Hi"),), SamplingParams())

    async def read() -> list[object]:
        found: list[object] = []
        async with aclosing(runtime.stream(caller, target, native)) as events:
            async for event in events:
                found.append(event)
                clock[0] += 10 * services.settings.invoke_timeout_seconds
        return found

    assert asyncio.run(read()) == list(ANSWER)


def test_a_prompt_is_in_no_log(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert chunks(ask(gateway, LLAMA, {"prompt": "a very private matter"}))
    wait_until(lambda: "InvokeModelWithResponseStream 200" in caplog.text)
    ours = [line.getMessage() for line in caplog.records if line.name.startswith("outcrop")]
    assert not any("private" in line or "Héllo" in line for line in ours)


def test_held_back_text_comes_with_the_last_chunk_alone(gateway: Gateway) -> None:
    gateway.model.script(TokenEvent("ab", 7, 2), Generation("ab", 7, 4, "length"))
    found = streamed(gateway, LLAMA, {"prompt": "Hi"})
    assert [chunk["generation"] for chunk in found] == ["ab", ""]
    assert found[-1]["stop_reason"] == "length"
