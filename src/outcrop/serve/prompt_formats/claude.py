"""Anthropic Claude messages: `{"anthropic_version": ..., "max_tokens": ..., "messages": [...]}`.

Text and tools: images, documents and extended thinking are refused by name. Turns of one role in
a row are joined, as Anthropic's API does.

Source: user guide, "Anthropic Claude Messages API".
"""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import replace
from typing import Any

from outcrop.data.records import BETWEEN_BLOCKS, Message, Tool, ToolCall
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import BlockPart, NativeRequest, Piece, ToolUse
from outcrop.serve.prompt_formats.schema import (
    MAX_STOP_SEQUENCES,
    Field,
    Fields,
    check,
    check_max_tokens,
    refuse,
)
from outcrop.serve.prompt_formats.tools import (
    Turn,
    join_tool_turns,
    result_of,
    tool_messages,
    tool_use,
)
from outcrop.serve.prompt_formats.turns import join_turns, text_of
from outcrop.serve.request import FinishReason, Generation, SamplingParams

REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
}
VERSION = "bedrock-2023-05-31"
FIELDS: Fields = {
    "anthropic_version": Field("string", required=True, enum=(VERSION,)),
    "max_tokens": Field("integer", required=True, minimum=1),
    "messages": Field(
        "objects",
        required=True,
        minimum=1,
        fields={
            "role": Field("string", required=True, enum=("user", "assistant")),
            "content": Field("any", required=True),
        },
    ),
    "system": Field("any", ""),
    "temperature": Field("number", 1.0, minimum=0, maximum=1),
    "top_p": Field("number", 1.0, minimum=0, maximum=1),
    "top_k": Field("integer", 0, minimum=0),
    "stop_sequences": Field("strings", (), maximum=MAX_STOP_SEQUENCES),
    "metadata": Field("object"),
    "tools": Field(
        "objects",
        (),
        fields={
            "type": Field("string", "custom", enum=("custom",)),
            "name": Field("string", required=True),
            "description": Field("string", ""),
            "input_schema": Field("object", required=True),
            "cache_control": Field("any"),
        },
    ),
    "tool_choice": Field(
        "object",
        fields={
            "type": Field("string", "auto", enum=("auto", "any", "tool", "none")),
            "name": Field("string", ""),
            "disable_parallel_tool_use": Field("boolean", False),
        },
    ),
}
_USE: Fields = {
    "type": Field("string"),
    "id": Field("string", required=True, minimum=1),
    "name": Field("string", required=True, minimum=1),
    "input": Field("object", required=True),
    "cache_control": Field("any"),
}
_RESULT: Fields = {
    "type": Field("string"),
    "tool_use_id": Field("string", required=True, minimum=1),
    "content": Field("any", ""),
    "is_error": Field("boolean", False),
    "cache_control": Field("any"),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body."""
    body = check(value, FIELDS)
    system = _text(body["system"], "#/system")
    how = sampling(base, body, max_tokens)
    if body["tools"] or _speaks_of_tools(body["messages"]):
        tools = _tool_use(body["tools"], body["tool_choice"])
        turns = join_tool_turns(
            [
                _turn(turn, f"#/messages/{place}/content")
                for place, turn in enumerate(body["messages"])
            ]
        )
        return NativeRequest(tool_messages(turns, system, "#/messages"), how, tool_use=tools)
    plain = [
        Message(turn["role"], _text(turn["content"], f"#/messages/{place}/content"))
        for place, turn in enumerate(body["messages"])
    ]
    return NativeRequest(join_turns(plain, system), how)


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn."""
    return SamplingParams(
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"] or None,
        max_tokens=check_max_tokens(body["max_tokens"], max_tokens),
        stop=tuple(body["stop_sequences"]),
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    generation = generations[0]
    return {
        **_head(base),
        "content": [_block(item) for item in generation.content or (generation.text,)],
        "stop_reason": REASONS[generation.finish_reason],
        "stop_sequence": generation.stop_sequence,
        "usage": {
            "input_tokens": generation.input_tokens,
            "output_tokens": generation.output_tokens,
        },
    }


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks: events of Anthropic's stream."""
    found: list[dict[str, Any]] = []
    if piece.is_first:
        message = {
            **_head(base),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {"input_tokens": piece.input_tokens, "output_tokens": piece.output_tokens},
        }
        found.append({"type": "message_start", "message": message})
    for part in piece.blocks:
        found += _block_events(part)
    if piece.done is not None:
        ended = {
            "stop_reason": REASONS[piece.done.finish_reason],
            "stop_sequence": piece.done.stop_sequence,
        }
        usage = {"output_tokens": piece.output_tokens}
        found.append({"type": "message_delta", "delta": ended, "usage": usage})
        found.append({"type": "message_stop"})
    return found


def _block(item: str | ToolCall) -> dict[str, Any]:
    if isinstance(item, str):
        return {"type": "text", "text": item}
    return {"type": "tool_use", "id": item.id, "name": item.name, "input": dict(item.arguments)}


def _block_events(part: BlockPart) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if part.is_start:
        block = _block("" if part.call is None else replace(part.call, arguments={}))
        found.append({"type": "content_block_start", "index": part.index, "content_block": block})
    if part.text:
        delta = {"type": "text_delta", "text": part.text}
        found.append({"type": "content_block_delta", "index": part.index, "delta": delta})
    if part.call is not None:
        given = json.dumps(part.call.arguments, ensure_ascii=False)
        delta = {"type": "input_json_delta", "partial_json": given}
        found.append({"type": "content_block_delta", "index": part.index, "delta": delta})
    if part.is_end:
        found.append({"type": "content_block_stop", "index": part.index})
    return found


def _tool_use(tools: list[dict[str, Any]], choice: dict[str, Any]) -> ToolUse:
    if choice["disable_parallel_tool_use"]:
        refuse("#/tool_choice: disable_parallel_tool_use is not supported by this model")
    named = [Tool(tool["name"], tool["description"], tool["input_schema"]) for tool in tools]
    found = tool_use(named, choice["type"], choice["name"], "#/tools")
    return replace(found, id_prefix="toolu_bdrk_")


def _speaks_of_tools(messages: list[dict[str, Any]]) -> bool:
    return any(
        isinstance(block, dict) and block.get("type") in ("tool_use", "tool_result")
        for turn in messages
        if isinstance(turn["content"], list)
        for block in turn["content"]
    )


def _turn(turn: dict[str, Any], path: str) -> Turn:
    """Read a turn that may have calls of an assistant or results of a user."""
    content, role = turn["content"], turn["role"]
    if not isinstance(content, list):
        return Turn(role, _text(content, path))
    rest: list[Any] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for place, block in enumerate(content):
        here = f"{path}/{place}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use" and role == "assistant":
            use = check(block, _USE, here)
            calls.append(ToolCall(use["id"], use["name"], use["input"]))
        elif kind == "tool_result" and role == "user":
            result = check(block, _RESULT, here)
            text = _text(result["content"], f"{here}/content")
            results.append(result_of(result["tool_use_id"], [text], failed=result["is_error"]))
        else:
            rest.append(block)
    return Turn(role, _text(rest, path), tuple(calls), tuple(results))


def _head(base: BaseModel) -> dict[str, Any]:
    return {
        "id": f"msg_bdrk_{uuid.uuid4().hex[:24]}",
        "type": "message",
        "role": "assistant",
        "model": _short_id(base.model_id),
    }


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        refuse(f"{path}: expected type: String or JSONArray")
    blocks = []
    for place, block in enumerate(content):
        here = f"{path}/{place}"
        if isinstance(block, dict) and block.get("type") != "text":
            refuse(f"{here}: only content of type text is supported by this model")
        # A cache mark changes what a prompt costs on Bedrock, never the answer.
        blocks.append(text_of(block, here, ignored=("type", "cache_control")))
    return BETWEEN_BLOCKS.join(blocks)


def _short_id(model_id: str) -> str:
    """`anthropic.claude-3-haiku-20240307-v1:0` -> `claude-3-haiku-20240307`."""
    return re.sub(r"-v\d+(:.*)?$", "", model_id.removeprefix("anthropic."))
