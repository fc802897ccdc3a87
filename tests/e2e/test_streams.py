"""Streams and conversations on the real service: the words of InvokeModel, and a server that dies.

Forms, refusals and clients that go away are tests/unit/api/test_streaming.py and test_converse.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError
from tests.e2e.service import COHERE, LLAMA, TITAN, Service

from outcrop.models.weights import SHIPPED_KEY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = "Name three colours."
CLAUDE = "anthropic.claude-3-haiku-20240307-v1:0"
NOVA = "amazon.nova-micro-v1:0"
MODEL_SERVER = f"outcrop model-server --weights {SHIPPED_KEY}"
"""That of the base; models of weights of their own have others beside it."""
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    TITAN: (
        {"inputText": PROMPT, "textGenerationConfig": {"maxTokenCount": 16, "temperature": 0}},
        lambda body: body["results"][0]["outputText"],
        lambda chunk: chunk["outputText"],
    ),
    COHERE: (
        {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True},
        lambda body: body["generations"][0]["text"],
        lambda chunk: chunk.get("text", ""),
    ),
    LLAMA: (
        {"prompt": PROMPT, "max_gen_len": 16, "temperature": 0},
        lambda body: body["generation"],
        lambda chunk: chunk["generation"],
    ),
    CLAUDE: (
        {
            "anthropic_version": "bedrock-2023-05-31",
            "max_tokens": 16,
            "temperature": 0,
            "messages": [{"role": "user", "content": PROMPT}],
        },
        lambda body: body["content"][0]["text"],
        lambda chunk: chunk.get("delta", {}).get("text", ""),
    ),
    NOVA: (
        {
            "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
            "inferenceConfig": {"maxTokens": 16, "temperature": 0},
        },
        lambda body: body["output"]["message"]["content"][0]["text"],
        lambda chunk: chunk.get("contentBlockDelta", {}).get("delta", {}).get("text", ""),
    ),
}


def events(stream: Any) -> Iterator[Any]:
    with closing(stream):
        yield from stream


def conversation(model: str = NOVA, *, most: int = 16) -> dict[str, Any]:
    return {
        "modelId": model,
        "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
        "inferenceConfig": {"maxTokens": most, "temperature": 0},
    }


@pytest.mark.parametrize("model", CASES)
def test_the_pieces_of_a_stream_are_the_whole_answer(service: Service, model: str) -> None:
    body, whole, piece = CASES[model]
    runtime = service.client("bedrock-runtime", attempts=8)
    plain = json.dumps({key: value for key, value in body.items() if key != "stream"})
    answer = runtime.invoke_model(modelId=model, body=plain)
    stream = runtime.invoke_model_with_response_stream(modelId=model, body=json.dumps(body))
    chunks = [json.loads(event["chunk"]["bytes"]) for event in events(stream["body"])]
    text = whole(json.loads(answer["body"].read()))
    assert text
    assert "".join(map(piece, chunks)) == text
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    metrics = chunks[-1]["amazon-bedrock-invocationMetrics"]
    assert str(metrics["inputTokenCount"]) == headers["x-amzn-bedrock-input-token-count"]
    assert str(metrics["outputTokenCount"]) == headers["x-amzn-bedrock-output-token-count"]

    spoken = runtime.converse(**conversation(model))
    assert spoken["output"]["message"]["content"][0]["text"] == text
    assert spoken["usage"]["inputTokens"] == metrics["inputTokenCount"]


def test_a_conversation_has_the_same_words_and_tokens_in_pieces(service: Service) -> None:
    runtime = service.client("bedrock-runtime", attempts=8)
    whole = runtime.converse(**conversation())
    found = list(events(runtime.converse_stream(**conversation())["stream"]))
    deltas = [
        each["contentBlockDelta"]["delta"]["text"] for each in found if "contentBlockDelta" in each
    ]
    assert "".join(deltas) == whole["output"]["message"]["content"][0]["text"]
    assert found[-1]["metadata"]["usage"] == whole["usage"]
    spoken = {"messages": conversation()["messages"]}
    counted = runtime.count_tokens(modelId=NOVA, input={"converse": spoken})
    assert counted["inputTokens"] == whole["usage"]["inputTokens"]


def test_a_model_server_that_is_killed_ends_its_streams_with_an_error_and_comes_back(
    service: Service,
) -> None:
    runtime = service.client("bedrock-runtime", attempts=8)
    before = runtime.converse(**conversation())["output"]
    found = events(runtime.converse_stream(**conversation(most=4000))["stream"])
    assert next(found) == {"messageStart": {"role": "assistant"}}
    os.kill(service.process(MODEL_SERVER).pid, signal.SIGKILL)
    with pytest.raises(EventStreamError) as caught:
        list(found)
    assert caught.value.response["Error"]["Code"] == "modelStreamErrorException"
    assert runtime.converse(**conversation())["output"] == before


def test_a_prompt_beyond_the_context_is_refused_before_the_stream(service: Service) -> None:
    runtime = service.client("bedrock-runtime", attempts=8)
    asked = conversation()
    asked["messages"] = [{"role": "user", "content": [{"text": "rock " * 9000}]}]
    for call in (runtime.converse, runtime.converse_stream):
        with pytest.raises(ClientError, match="tokens") as caught:
            call(**asked)
        assert not isinstance(caught.value, EventStreamError)
        assert caught.value.response["Error"]["Code"] == "ValidationException"


def test_metrics_count_what_was_answered_and_repeat_none_of_it(service: Service) -> None:
    runtime = service.client("bedrock-runtime", attempts=8)
    body = json.dumps({"inputText": PROMPT, "textGenerationConfig": {"maxTokenCount": 16}})
    runtime.invoke_model(modelId=TITAN, body=body)
    with urllib.request.urlopen(f"{service.url}/metrics") as response:
        text = response.read().decode()
    counts = re.findall(r"^outcrop_generation_tokens_total{[^}]*} (\d+)$", text, re.MULTILINE)
    assert sum(map(int, counts)) > 0
    assert "outcrop_model_server_up" in text
    assert "colours" not in text
