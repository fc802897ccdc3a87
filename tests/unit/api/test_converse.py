"""Converse, ConverseStream and CountTokens as boto3 reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError
from tests.unit.api.runtime_gateway import ANSWER, WEIGHTS, Gateway, running_gateway
from tests.unit.store.build import new_throughput

from outcrop.data.records import Message
from outcrop.errors import ModelErrorException, ModelTimeoutException, ThrottlingException
from outcrop.models.catalog import shipped_models
from outcrop.serve.request import Generation
from outcrop.store import throughputs
from outcrop.store.database import transaction

CLAUDE = "anthropic.claude-3-haiku-20240307-v1:0"
TITAN = "amazon.titan-text-express-v1"
MODELS = [model.model_id for model in shipped_models()]
TURNS = [{"role": "user", "content": [{"text": "Hi"}]}]
USAGE = {"inputTokens": 7, "outputTokens": 4, "totalTokens": 11}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("converse")) as place:
        yield place


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    """The shared gateway, whose model server answers as usual."""
    shared.model.script(*ANSWER)
    return shared


def converse(gateway: Gateway, model: str = CLAUDE, **params: Any) -> Any:
    found = gateway.client().converse(**{"modelId": model, "messages": TURNS, **params})
    found.pop("ResponseMetadata")
    return found


def events(gateway: Gateway, model: str = CLAUDE, **params: Any) -> list[Any]:
    client = gateway.client()
    answer = client.converse_stream(**{"modelId": model, "messages": TURNS, **params})
    with closing(answer["stream"]) as found:
        return list(found)


CALLS: dict[str, Callable[..., Any]] = {"Converse": converse, "ConverseStream": events}


def refusal(gateway: Gateway, call: str, **params: Any) -> tuple[str, int, str]:
    with pytest.raises(ClientError) as caught:
        CALLS[call](gateway, **params)
    assert not isinstance(caught.value, EventStreamError)
    found = caught.value.response
    status = found["ResponseMetadata"]["HTTPStatusCode"]
    return found["Error"]["Code"], status, found["Error"]["Message"]


@pytest.mark.parametrize("model", MODELS)
def test_every_text_model_converses(gateway: Gateway, model: str) -> None:
    found = converse(gateway, model)
    assert found.pop("metrics")["latencyMs"] >= 0
    assert found == {
        "output": {"message": {"role": "assistant", "content": [{"text": "Héllo you"}]}},
        "stopReason": "end_turn",
        "usage": USAGE,
    }


@pytest.mark.parametrize("model", MODELS)
def test_every_text_model_streams_the_events_in_order(gateway: Gateway, model: str) -> None:
    *found, last = events(gateway, model)

    def delta(text: str) -> Any:
        return {"contentBlockDelta": {"delta": {"text": text}, "contentBlockIndex": 0}}

    assert found == [
        {"messageStart": {"role": "assistant"}},
        *(delta("Hél"), delta("lo"), delta(" you")),
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "end_turn"}},
    ]
    assert last["metadata"].pop("metrics")["latencyMs"] >= 0
    assert last == {"metadata": {"usage": USAGE}}


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        (Generation("Hi", 7, 4, "stop"), "end_turn"),
        (Generation("Hi", 7, 4, "length"), "max_tokens"),
        (Generation("Hi", 7, 4, "stop_sequence", "Q:"), "stop_sequence"),
    ],
)
def test_stop_reasons_are_converses(gateway: Gateway, generation: Generation, reason: str) -> None:
    gateway.model.script(generation)
    assert converse(gateway)["stopReason"] == reason
    assert {"messageStop": {"stopReason": reason}} in events(gateway)


def test_what_the_model_is_asked_is_what_its_own_body_asks(gateway: Gateway) -> None:
    config = {"maxTokens": 9, "temperature": 0.5, "topP": 0.25, "stopSequences": ["Q:"]}
    asked: dict[str, Any] = {
        "system": [{"text": "Be brief."}],
        "inferenceConfig": config,
        "additionalModelRequestFields": {"top_k": 5},
    }
    converse(gateway, **asked)
    events(gateway, **asked)
    body = {
        "anthropic_version": "bedrock-2023-05-31",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "stop_sequences": ["Q:"],
        "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}],
    }
    gateway.client().invoke_model(modelId=CLAUDE, body=json.dumps(body))["body"].read()
    first, second, third = gateway.model.requests
    assert first == second == third
    assert first.messages == (Message("system", "Be brief."), Message("user", "Hi"))


def test_fields_of_the_models_own_answer_come_where_they_are_asked_for(gateway: Gateway) -> None:
    gateway.model.script(Generation("Hi", 7, 4, "stop_sequence", "Q:"))
    asked: dict[str, Any] = {"additionalModelResponseFieldPaths": ["/stop_sequence", "/absent"]}
    fields = {"stop_sequence": "Q:"}
    assert converse(gateway, **asked)["additionalModelResponseFields"] == fields
    stop = {"stopReason": "stop_sequence", "additionalModelResponseFields": fields}
    assert {"messageStop": stop} in events(gateway, **asked)


def test_metadata_latency_and_tier_that_are_usual_are_taken_and_told(gateway: Gateway) -> None:
    usual: dict[str, Any] = {
        "performanceConfig": {"latency": "standard"},
        "serviceTier": {"type": "default"},
    }
    asked: dict[str, Any] = {"requestMetadata": {"team": "a"}, **usual}
    assert converse(gateway, **asked).items() >= usual.items()
    assert events(gateway, **asked)[-1]["metadata"].items() >= usual.items()


TOOL = {"toolSpec": {"name": "t", "inputSchema": {"json": {"type": "object"}}}}
SCHEMA = {"type": "json_schema", "structure": {"jsonSchema": {"schema": "{}"}}}
IMAGE = {"image": {"format": "png", "source": {"bytes": b"x"}}}
DOCUMENT = {"document": {"format": "txt", "name": "d", "source": {"bytes": b"x"}}}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"toolConfig": {"tools": [TOOL]}}, "This model doesn't support tool use."),
        ({"guardrailConfig": {"guardrailIdentifier": "a", "guardrailVersion": "1"}}, "Guardrails"),
        ({"outputConfig": {"textFormat": SCHEMA}}, "outputConfig"),
        ({"promptVariables": {"a": {"text": "b"}}}, "promptVariables"),
        ({"performanceConfig": {"latency": "optimized"}}, "Latency performance configuration is"),
        ({"performanceConfig": {"latency": "quick"}}, "enum value set: [standard, optimized]"),
        ({"serviceTier": {"type": "priority"}}, "service tier priority is not supported"),
        ({"requestMetadata": {}}, "requestMetadata"),
        ({"requestMetadata": {"a": "b" * 257}}, "requestMetadata"),
        ({"additionalModelResponseFieldPaths": ["stop"]}, "JSON pointer"),
        ({"additionalModelResponseFieldPaths": ["/a"] * 11}, "less than or equal to 10"),
        ({"inferenceConfig": {"temperature": 1.5}}, "less than or equal to 1"),
        ({"inferenceConfig": {"maxTokens": 10**6}}, "exceeds the model limit"),
        ({"inferenceConfig": {"stopSequences": ["x"] * 2501}}, "less than or equal to 2500"),
        ({"messages": []}, "must start with a user message"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "support the image content block"),
        ({"messages": [{"role": "user", "content": [DOCUMENT]}]}, "support the document content"),
        ({"messages": [{"role": "user", "content": [IMAGE] * 1000}]}, "messages.0.content.0"),
        ({"model": "amazon.unknown-v1"}, "model identifier is invalid"),
    ],
)
def test_what_is_not_offered_is_refused_in_bedrocks_words_before_any_stream(
    gateway: Gateway, call: str, params: dict[str, Any], named: str
) -> None:
    code, status, message = refusal(gateway, call, **params)
    assert (code, status) == ("ValidationException", 400)
    assert named in message
    assert not gateway.model.requests


@pytest.mark.parametrize("call", CALLS)
def test_what_the_model_server_refuses_is_an_error_of_the_request(
    gateway: Gateway, call: str
) -> None:
    gateway.model.script(ThrottlingException("Too many."))
    assert refusal(gateway, call) == ("ThrottlingException", 429, "Too many.")
    gateway.model.script(ModelErrorException("Broke."))
    assert refusal(gateway, call) == ("ModelErrorException", 424, "Broke.")


def test_a_model_server_that_dies_ends_the_stream_with_the_modelled_error(
    gateway: Gateway,
) -> None:
    gateway.model.script(*ANSWER[:2], ending="cut")
    answer = gateway.client().converse_stream(modelId=CLAUDE, messages=TURNS)
    found: list[Any] = []
    with closing(answer["stream"]) as stream, pytest.raises(EventStreamError) as caught:
        found.extend(stream)
    assert caught.value.response["Error"]["Code"] == "modelStreamErrorException"
    gateway.model.script(*ANSWER)
    assert events(gateway)


def test_an_error_that_the_stream_does_not_list_is_a_model_stream_error(gateway: Gateway) -> None:
    gateway.model.script(ANSWER[0], ModelTimeoutException("Late."))
    with pytest.raises(EventStreamError) as caught:
        events(gateway)
    assert caught.value.response["Error"] == {
        "Code": "modelStreamErrorException",
        "Message": "Late.",
    }


@pytest.mark.parametrize("call", ["converse", "converse_stream"])
def test_a_client_that_goes_away_cancels_the_request(gateway: Gateway, call: str) -> None:
    gateway.model.script(*ANSWER[:1], ending="wait")
    if call == "converse_stream":
        answer = gateway.client().converse_stream(modelId=CLAUDE, messages=TURNS)
        assert next(iter(answer["stream"])) == {"messageStart": {"role": "assistant"}}
        answer["stream"].close()
    else:
        hasty = gateway.client(read_timeout=0.3)
        with pytest.raises(Exception, match="Read timeout"):
            hasty.converse(modelId=CLAUDE, messages=TURNS)
    assert gateway.model.was_left.wait(10)


def test_every_form_of_a_models_id_converses(gateway: Gateway) -> None:
    arn = f"arn:aws:bedrock:{gateway.settings.region}::foundation-model/{TITAN}"
    with transaction(gateway.engine) as connection:
        made = throughputs.create_throughput(
            connection, new_throughput("fast", arn, weights=WEIGHTS),
            max_throughputs=1, max_model_units=1, machine_model_units=2,
        )  # fmt: skip
        throughputs.mark_in_service(connection, made.weights)
    for model in (f"{TITAN}:0:8k", arn, made.arn, made.name):
        assert converse(gateway, model)["usage"] == USAGE
        assert events(gateway, model)[-1]["metadata"]["usage"] == USAGE


def test_converse_needs_invokemodel_and_its_stream_the_streams_action(gateway: Gateway) -> None:
    for number, (action, call, other) in enumerate(
        [
            ("InvokeModel", "converse", "converse_stream"),
            ("InvokeModelWithResponseStream", "converse_stream", "converse"),
        ]
    ):
        user = gateway.user(f"user-{number}", f"bedrock:{action}")
        client = gateway.client(user)
        answer = getattr(client, call)(modelId=CLAUDE, messages=TURNS)
        if "stream" in answer:
            with closing(answer["stream"]) as stream:
                assert list(stream)
        with pytest.raises(ClientError, match="AccessDenied"):
            getattr(client, other)(modelId=CLAUDE, messages=TURNS)


# --- CountTokens ----------------------------------------------------------------------------------


def test_a_conversation_is_counted_as_it_would_be_rendered(gateway: Gateway) -> None:
    client = gateway.client()
    spoken: dict[str, Any] = {"messages": TURNS, "system": [{"text": "Be brief."}]}
    found = client.count_tokens(modelId=CLAUDE, input={"converse": spoken})
    assert found["inputTokens"] == 7
    converse(gateway, **spoken)
    (asked,) = gateway.model.requests
    assert gateway.model.counted == [asked.messages]


def test_a_body_that_is_to_be_streamed_is_counted_too(gateway: Gateway) -> None:
    body = b'{"prompt": "Hi", "stream": true}'
    cohere = "cohere.command-text-v14"
    found = gateway.client().count_tokens(modelId=cohere, input={"invokeModel": {"body": body}})
    assert found["inputTokens"] == 7


@pytest.mark.parametrize(
    ("spoken", "named"),
    [
        ({"messages": TURNS, "toolConfig": {"tools": [TOOL]}}, "doesn't support tool use"),
        ({"system": [{"text": "S"}]}, "must start with a user message"),
        (
            {"messages": TURNS, "additionalModelRequestFields": {"thinking": 1}},
            "extraneous key [thinking]",
        ),
    ],
)
def test_a_conversation_that_would_be_refused_is_not_counted(
    gateway: Gateway, spoken: dict[str, Any], named: str
) -> None:
    with pytest.raises(ClientError) as caught:
        gateway.client().count_tokens(modelId=CLAUDE, input={"converse": spoken})
    assert caught.value.response["Error"]["Code"] == "ValidationException"
    assert named in caught.value.response["Error"]["Message"]
