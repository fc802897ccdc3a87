"""Tools in Converse, in bodies and in OpenAI-style chats, as clients read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import pytest
from botocore.exceptions import ClientError
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from tests.unit.api.runtime_gateway import WEIGHTS, Gateway, running_gateway
from tests.unit.serve import tool_templates

from outcrop.data.records import Message, Tool, ToolCall
from outcrop.identity.api_keys import load_or_make_api_key
from outcrop.models.catalog import shipped_models
from outcrop.serve.request import Generation, TokenEvent
from outcrop.store import servers
from outcrop.store.database import transaction

PLAIN = "amazon.titan-text-lite-v1"
"""Served by the shipped model, whose template has no tools."""
CLAUDE = "anthropic.claude-3-haiku-20240307-v1:0"
NOVA = next(model.model_id for model in shipped_models() if model.body_family == "nova")
TITAN = "amazon.titan-text-express-v1"
LLAMA, MISTRAL, ODD = "mine.llama", "mine.mistral", "mine.odd"
TEMPLATES = {
    CLAUDE: tool_templates.HERMES,
    NOVA: tool_templates.HERMES,
    TITAN: tool_templates.HERMES,
    LLAMA: tool_templates.LLAMA,
    MISTRAL: tool_templates.MISTRAL,
    ODD: "{{ tools }}<tool_call><function=",
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SPEC = {"name": "get_weather", "description": "Weather.", "inputSchema": {"json": SCHEMA}}
TOOLS = {"tools": [{"toolSpec": SPEC}]}
GIVEN = Tool("get_weather", "Weather.", SCHEMA)
TURNS = [{"role": "user", "content": [{"text": "Warm in Paris?"}]}]
WRITTEN = (
    'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
)
ANSWER = (
    TokenEvent("I look.\n<tool_", 9, 3),
    TokenEvent('call>\n{"name": "get_weather", "argu', 9, 6),
    TokenEvent('ments": {"city": "Paris"}', 9, 8),
    Generation(WRITTEN, 9, 12, "stop"),
)
USE = {"toolUseId": "tooluse_1", "name": "get_weather", "input": {"city": "Paris"}}
RESULT = {"toolUseId": "tooluse_1", "content": [{"text": "21"}, {"json": {"unit": "C"}}]}
WITH_RESULT = [
    *TURNS,
    {"role": "assistant", "content": [{"text": "I look."}, {"toolUse": USE}]},
    {"role": "user", "content": [{"toolResult": RESULT}, {"text": "So?"}]},
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("tools")
    entries = folder / "models" / "catalog"
    entries.mkdir(parents=True)
    for number, (model_id, template) in enumerate(TEMPLATES.items()):
        model = folder / f"model{number}"
        model.mkdir()
        tool_templates.give_template(model, template)
        family = "llama3" if model_id.startswith("mine.") else ""
        (entries / f"{number}.toml").write_text(entry(model_id, family, model), encoding="utf-8")
    with running_gateway(folder) as place:
        with transaction(place.engine) as connection:
            for number in range(len(TEMPLATES)):
                servers.want(connection, f"model{number}")
                servers.mark_starting(connection, f"model{number}", str(place.model.socket))
                servers.mark_ready(connection, f"model{number}", 1)
        yield place


def entry(model_id: str, family: str, folder: Path) -> str:
    named = ("model_name", "provider_name", "full_name", "license", "quantization", "origin")
    lines = [
        f'model_id = "{model_id}"',
        "context_tokens = 2048",
        *(f'{name} = "x"' for name in named),
    ]
    if family:
        found = next(m.family for m in shipped_models() if m.body_family == "llama")
        lines.append(f'family = "{found}"')
    weights = f'key = "{folder.name}"\nfolder = "{folder}"\ndigest = "0"'
    return "\n".join([*lines, "[weights]", weights, ""])


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    shared.model.script(*ANSWER)
    return shared


def converse(gateway: Gateway, model: str = CLAUDE, **params: Any) -> Any:
    asked = {"modelId": model, "messages": TURNS, "toolConfig": TOOLS, **params}
    return gateway.client().converse(**{k: v for k, v in asked.items() if v is not None})


def events(gateway: Gateway, **params: Any) -> list[Any]:
    asked = {"modelId": CLAUDE, "messages": TURNS, "toolConfig": TOOLS, **params}
    with closing(gateway.client().converse_stream(**asked)["stream"]) as found:
        return list(found)


def refusal(gateway: Gateway, **params: Any) -> str:
    with pytest.raises(ClientError) as caught:
        converse(gateway, **params)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400
    assert caught.value.response["Error"]["Code"] == "ValidationException"
    assert not gateway.model.requests
    return str(caught.value.response["Error"]["Message"])


@pytest.mark.parametrize("model", [CLAUDE, NOVA, TITAN])
def test_a_call_is_a_content_block_of_converses_answer(gateway: Gateway, model: str) -> None:
    found = converse(gateway, model)
    text, use = found["output"]["message"]["content"]
    assert text == {"text": "I look."}
    assert use["toolUse"].pop("toolUseId").startswith("tooluse_")
    assert use == {"toolUse": {"name": "get_weather", "input": {"city": "Paris"}}}
    assert found["stopReason"] == "tool_use"
    assert found["usage"] == {"inputTokens": 9, "outputTokens": 12, "totalTokens": 21}
    (request,) = gateway.model.requests
    assert request.tools == (GIVEN,)
    assert request.start == ""
    assert request.shown == ("<tool_call>",)


def test_a_streamed_call_is_a_block_of_its_own(gateway: Gateway) -> None:
    found = events(gateway)
    start = found[3]["contentBlockStart"]["start"]["toolUse"]
    assert start.pop("toolUseId").startswith("tooluse_")
    given = '{"city": "Paris"}'
    assert found[:-1] == [
        {"messageStart": {"role": "assistant"}},
        {"contentBlockDelta": {"delta": {"text": "I look."}, "contentBlockIndex": 0}},
        {"contentBlockStop": {"contentBlockIndex": 0}},
        {
            "contentBlockStart": {
                "start": {"toolUse": {"name": "get_weather"}},
                "contentBlockIndex": 1,
            }
        },
        {"contentBlockDelta": {"delta": {"toolUse": {"input": given}}, "contentBlockIndex": 1}},
        {"contentBlockStop": {"contentBlockIndex": 1}},
        {"messageStop": {"stopReason": "tool_use"}},
    ]


@pytest.mark.parametrize(
    ("choice", "start"),
    [
        ({"auto": {}}, ""),
        ({"any": {}}, '<tool_call>\n{"name": "'),
        (
            {"tool": {"name": "get_weather"}},
            '<tool_call>\n{"name": "get_weather", "arguments":',
        ),
    ],
)
def test_the_choice_of_tools_is_what_the_answer_begins_with(
    gateway: Gateway, choice: dict[str, Any], start: str
) -> None:
    rest = WRITTEN.partition("<tool_call>")[1:]
    answer = "".join(rest).removeprefix(start)
    gateway.model.script(Generation(answer, 9, 12, "stop"))
    found = converse(gateway, toolConfig={**TOOLS, "toolChoice": choice})
    (use,) = found["output"]["message"]["content"]
    assert use["toolUse"]["input"] == {"city": "Paris"}
    assert gateway.model.requests[0].start == start


@pytest.mark.parametrize(
    ("model", "answer", "shown"),
    [
        (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}', "<|python_tag|>"),
        (
            MISTRAL,
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]',
            "[TOOL_CALLS]",
        ),
    ],
)
def test_each_models_own_form_of_calls_is_understood(
    gateway: Gateway, model: str, answer: str, shown: str
) -> None:
    gateway.model.script(Generation(answer, 9, 12, "stop"))
    found = converse(gateway, model)
    assert found["output"]["message"]["content"][0]["toolUse"]["input"] == {"city": "Paris"}
    assert gateway.model.requests[0].shown == (shown,)


def test_calls_and_results_reach_the_model_in_order(gateway: Gateway) -> None:
    converse(gateway, messages=WITH_RESULT)
    assert gateway.model.requests[0].messages == (
        Message("user", "Warm in Paris?"),
        Message("assistant", "I look.", (ToolCall("tooluse_1", "get_weather", {"city": "Paris"}),)),
        Message("tool", '21\n\n{"unit": "C"}', call_id="tooluse_1"),
        Message("user", "So?"),
    )


def test_a_tool_that_failed_is_told_so(gateway: Gateway) -> None:
    failed = {"toolUseId": "tooluse_1", "content": [{"text": "no such city"}], "status": "error"}
    turns = [*WITH_RESULT[:2], {"role": "user", "content": [{"toolResult": failed}]}]
    converse(gateway, messages=turns)
    assert gateway.model.requests[0].messages[-1].text == "Error: no such city"


@pytest.mark.parametrize("stop", ["length", "stop_sequence"])
def test_an_answer_that_was_cut_off_keeps_its_own_reason(gateway: Gateway, stop: Any) -> None:
    gateway.model.script(Generation(WRITTEN, 9, 12, stop))
    reason = {"length": "max_tokens"}.get(stop, stop)
    assert converse(gateway)["stopReason"] == reason


def test_a_malformed_call_is_text(gateway: Gateway) -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": '
    gateway.model.script(TokenEvent(text[:5], 9, 2), Generation(text, 9, 12, "stop"))
    found = converse(gateway)
    assert found["output"]["message"]["content"] == [{"text": text}]
    assert found["stopReason"] == "end_turn"
    shown = [
        e["contentBlockDelta"]["delta"]["text"] for e in events(gateway) if "contentBlockDelta" in e
    ]
    assert "".join(shown) == text


def test_an_empty_answer_has_one_empty_block(gateway: Gateway) -> None:
    gateway.model.script(Generation("", 9, 1, "stop"))
    assert converse(gateway)["output"]["message"]["content"] == [{"text": ""}]
    assert {"contentBlockStop": {"contentBlockIndex": 0}} in events(gateway)


def test_tools_count_as_tokens_of_the_prompt(gateway: Gateway) -> None:
    asked = {"converse": {"messages": TURNS, "toolConfig": TOOLS}}
    counted = gateway.client().count_tokens(modelId=CLAUDE, input=asked)
    assert counted["inputTokens"] == 7
    assert gateway.model.counted_tools[-1] == (GIVEN,)


@pytest.mark.parametrize("messages", [TURNS, WITH_RESULT])
def test_a_model_whose_template_has_no_tools_refuses_them(gateway: Gateway, messages: Any) -> None:
    assert refusal(gateway, model=PLAIN, messages=messages) == (
        "This model doesn't support tool use."
    )
    with pytest.raises(ClientError, match="doesn't support tool use"):
        gateway.client().converse_stream(modelId=PLAIN, messages=TURNS, toolConfig=TOOLS)


def use_turns(*blocks: Any) -> list[Any]:
    return [*TURNS, {"role": "assistant", "content": [{"toolUse": USE}]}, *blocks]


TWICE = {"tools": [{"toolSpec": SPEC}, {"toolSpec": SPEC}]}
STRICT = {"tools": [{"toolSpec": {**SPEC, "strict": True}}]}
IMAGE = {"image": {"format": "png", "source": {"bytes": b"x"}}}


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"model": ODD}, "in what form it writes calls is not known here"),
        ({"toolConfig": TWICE}, "two tools with the name get_weather"),
        ({"toolConfig": STRICT}, "toolConfig.tools.0.toolSpec.strict"),
        (
            {"toolConfig": {**TOOLS, "toolChoice": {"tool": {"name": "other"}}}},
            "'other' to be called, which is not among its tools",
        ),
        (
            {
                "toolConfig": {**TOOLS, "toolChoice": {"any": {}}},
                "messages": [*TURNS, {"role": "assistant", "content": [{"text": "It"}]}],
            },
            "The choice of tools is any",
        ),
        ({"messages": WITH_RESULT, "toolConfig": None}, "The toolConfig field must be defined"),
        (
            {"messages": use_turns({"role": "user", "content": [{"text": "So?"}]})},
            "Expected toolResult blocks at messages.2.content for the following Ids: tooluse_1",
        ),
        ({"messages": use_turns()}, "The conversation ends with toolUse blocks"),
        (
            {"messages": [{"role": "user", "content": [{"toolResult": RESULT}]}]},
            "exceeds the number of toolUse blocks of previous turn",
        ),
        (
            {"messages": [{"role": "user", "content": [{"toolUse": USE}]}]},
            "cannot be in a message of the role user",
        ),
        (
            {
                "messages": use_turns(
                    {
                        "role": "user",
                        "content": [{"toolResult": {"toolUseId": "tooluse_1", "content": [IMAGE]}}],
                    }
                )
            },
            "the content image of a tool result",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    gateway: Gateway, params: dict[str, Any], named: str
) -> None:
    assert named in refusal(gateway, **params)


# --- InvokeModel ----------------------------------------------------------------------------------

CLAUDE_BODY = {
    "anthropic_version": "bedrock-2023-05-31",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Warm?"}],
    "tools": [{"name": "get_weather", "description": "Weather.", "input_schema": SCHEMA}],
}
NOVA_BODY = {"messages": TURNS, "toolConfig": TOOLS}


def invoke(gateway: Gateway, body: Any, model: str = CLAUDE) -> Any:
    answer = gateway.client().invoke_model(modelId=model, body=json.dumps(body))
    return json.loads(answer["body"].read())


def chunks(gateway: Gateway, body: Any, model: str = CLAUDE) -> list[Any]:
    client = gateway.client()
    answer = client.invoke_model_with_response_stream(modelId=model, body=json.dumps(body))
    with closing(answer["body"]) as found:
        return [json.loads(event["chunk"]["bytes"]) for event in found]


def test_claudes_body_has_tools_in_its_own_form(gateway: Gateway) -> None:
    found = invoke(gateway, CLAUDE_BODY)
    text, use = found["content"]
    assert text == {"type": "text", "text": "I look."}
    assert use.pop("id").startswith("toolu_bdrk_")
    assert use == {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    assert found["stop_reason"] == "tool_use"
    assert gateway.model.requests[0].tools == (GIVEN,)


def test_claudes_stream_has_calls_as_blocks(gateway: Gateway) -> None:
    found = chunks(gateway, CLAUDE_BODY)
    kinds = [chunk["type"] for chunk in found]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert found[4]["content_block"]["input"] == {}
    assert found[5]["delta"] == {"type": "input_json_delta", "partial_json": '{"city": "Paris"}'}
    assert found[7]["delta"]["stop_reason"] == "tool_use"


def test_claudes_calls_and_results_reach_the_model(gateway: Gateway) -> None:
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "21", "is_error": False}
    turns = [
        *CLAUDE_BODY["messages"],  # type: ignore[misc]
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
        {"role": "user", "content": "So?"},
    ]
    invoke(gateway, {**CLAUDE_BODY, "messages": turns, "tool_choice": {"type": "none"}})
    (request,) = gateway.model.requests
    assert request.messages[1:] == (
        Message("assistant", "", (ToolCall("toolu_1", "get_weather", {"city": "Paris"}),)),
        Message("tool", "21", call_id="toolu_1"),
        Message("user", "So?"),
    )


def test_where_no_call_is_wanted_none_is_looked_for(gateway: Gateway) -> None:
    found = invoke(gateway, {**CLAUDE_BODY, "tool_choice": {"type": "none"}})
    assert found["content"] == [{"type": "text", "text": WRITTEN}]
    assert found["stop_reason"] == "end_turn"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tools": [{"name": "get_weather"}]}, "#/tools/0: required key [input_schema] not found"),
        ({"tools": [{"type": "bash_20241022", "name": "bash", "input_schema": {}}]}, "enum"),
        ({"tools": "all"}, "#/tools: expected type: JSONArray"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "'a b'"),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "disable_parallel"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "'x' to be called"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "required key [tool_use_id]",
        ),
    ],
)
def test_faulty_tools_of_a_body_are_refused_by_name(
    gateway: Gateway, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ClientError, match="ValidationException") as caught:
        invoke(gateway, {**CLAUDE_BODY, **changes})
    assert named in caught.value.response["Error"]["Message"]
    assert not gateway.model.requests


def test_novas_body_has_tools_in_converses_form(gateway: Gateway) -> None:
    found = invoke(gateway, {**NOVA_BODY, "messages": WITH_RESULT}, NOVA)
    assert found["output"]["message"]["content"][1]["toolUse"]["name"] == "get_weather"
    assert found["stopReason"] == "tool_use"
    names = [next(iter(chunk)) for chunk in chunks(gateway, NOVA_BODY, NOVA)]
    assert names == [
        *("messageStart", "contentBlockDelta", "contentBlockStop"),
        *("contentBlockStart", "contentBlockDelta", "contentBlockStop"),
        *("messageStop", "metadata"),
    ]


def test_a_body_with_tools_for_a_model_without_is_refused(gateway: Gateway) -> None:
    plain = "anthropic.claude-3-sonnet-20240229-v1:0"
    assert next(m for m in shipped_models() if m.model_id == plain).weights == WEIGHTS
    with pytest.raises(ClientError, match="doesn't support tool use"):
        invoke(gateway, CLAUDE_BODY, plain)


# --- OpenAI's form --------------------------------------------------------------------------------

FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}
FUNCTIONS: Any = [{"type": "function", "function": FUNCTION}]
HELLO: Any = [{"role": "user", "content": "Warm?"}]
CALLED: Any = [
    *HELLO,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21"},
]


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    key = load_or_make_api_key(gateway.settings).key
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as made:
        yield made


def test_openais_answer_has_the_calls(client: openai.OpenAI, gateway: Gateway) -> None:
    found = client.chat.completions.create(model=TITAN, messages=HELLO, tools=FUNCTIONS)
    choice = found.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls or []
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert gateway.model.requests[0].tools == (GIVEN,)


def test_openais_stream_has_the_calls_before_its_end(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=TITAN, messages=HELLO, tools=FUNCTIONS, stream=True
    )
    deltas = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content or "" for choice in deltas) == "I look."
    called = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert [(call.index, call.function and call.function.name) for call in called] == [
        (0, "get_weather")
    ]
    assert deltas[-1].finish_reason == "tool_calls"


def test_openais_calls_and_results_reach_the_model(client: openai.OpenAI, gateway: Gateway) -> None:
    client.chat.completions.create(model=TITAN, messages=CALLED, tools=FUNCTIONS)
    client.chat.completions.create(model=TITAN, messages=CALLED)
    with_tools, without = gateway.model.requests
    assert with_tools.messages == without.messages
    assert without.tools == ()
    assert with_tools.messages[1:] == (
        Message("assistant", "", (ToolCall("call_1", "get_weather", {"city": "Paris"}),)),
        Message("tool", "21", call_id="call_1"),
    )


def test_openais_choice_is_kept(client: openai.OpenAI, gateway: Gateway) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("none", "auto", "required", named):
        client.chat.completions.create(
            model=TITAN, messages=HELLO, tools=FUNCTIONS, tool_choice=choice
        )
    starts = [request.start for request in gateway.model.requests]
    opened = '<tool_call>\n{"name": "'
    assert starts == ["", "", opened, f'{opened}get_weather", "arguments":']


@pytest.mark.parametrize(
    ("model", "changes", "param"),
    [
        (PLAIN, {}, "tools"),
        (TITAN, {"tools": [{"type": "web_search"}]}, "tools[0]"),
        (TITAN, {"tools": [*FUNCTIONS, *FUNCTIONS]}, "tools"),
        (
            TITAN,
            {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
            "tools[0].function.strict",
        ),
        (TITAN, {"tool_choice": "all"}, "tool_choice"),
        (TITAN, {"parallel_tool_calls": False}, "parallel_tool_calls"),
        (TITAN, {"messages": CALLED[:2]}, "messages"),
        (TITAN, {"messages": [CALLED[0], CALLED[2]]}, "messages"),
        (TITAN, {"messages": [*CALLED[:2], *HELLO]}, "messages"),
    ],
)
def test_openais_faulty_tools_are_refused_by_the_name_of_the_field(
    client: openai.OpenAI, gateway: Gateway, model: str, changes: Any, param: str
) -> None:
    asked: Any = {"model": model, "messages": HELLO, "tools": FUNCTIONS, **changes}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.param == param
    assert not gateway.model.requests
