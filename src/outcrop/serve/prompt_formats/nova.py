"""Amazon Nova: `{"messages": [...], "system": [...], "inferenceConfig": {...}}`, text and tools.

Images, videos and documents are refused by name.

Source: Nova user guide, "Complete request schema".
"""

from __future__ import annotations

from typing import Any

from outcrop.data.records import BETWEEN_BLOCKS, Message
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, Piece, ToolUse
from outcrop.serve.prompt_formats.schema import (
    MAX_STOP_SEQUENCES,
    Field,
    Fields,
    check,
    check_max_tokens,
)
from outcrop.serve.prompt_formats.tools import (
    converse_block_events,
    converse_content,
    converse_turn,
    join_tool_turns,
    speaks_of_tools,
    tool_config,
    tool_messages,
)
from outcrop.serve.prompt_formats.turns import join_turns, text_of
from outcrop.serve.request import FinishReason, Generation, SamplingParams

REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
}
FIELDS: Fields = {
    "schemaVersion": Field("string", "messages-v1", enum=("messages-v1",)),
    "messages": Field(
        "objects",
        required=True,
        minimum=1,
        fields={
            "role": Field("string", required=True, enum=("user", "assistant")),
            "content": Field("objects", required=True, minimum=1),
        },
    ),
    "system": Field("objects", ()),
    "inferenceConfig": Field(
        "object",
        fields={
            "maxTokens": Field("integer", minimum=1),
            "max_new_tokens": Field("integer", minimum=1),
            "temperature": Field("number", 0.7, minimum=0, maximum=1),
            "topP": Field("number", 0.9, minimum=0, maximum=1),
            "topK": Field("integer", 0, minimum=0, maximum=128),
            "stopSequences": Field("strings", (), maximum=MAX_STOP_SEQUENCES),
        },
    ),
    "toolConfig": Field("object"),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body."""
    body = check(value, FIELDS)
    system = _text(body["system"], "#/system")
    how = sampling(base, body, max_tokens)
    config = body["toolConfig"]
    tools = None if config is None else tool_config(config, "toolConfig")
    if tools is not None or speaks_of_tools(body["messages"]):
        turns = join_tool_turns(
            [
                converse_turn(turn, f"#/messages/{place}/content", text_of)
                for place, turn in enumerate(body["messages"])
            ]
        )
        messages = tool_messages(turns, system, "#/messages")
        return NativeRequest(messages, how, tool_use=tools or ToolUse((), "none"))
    plain = [
        Message(turn["role"], _text(turn["content"], f"#/messages/{place}/content"))
        for place, turn in enumerate(body["messages"])
    ]
    return NativeRequest(join_turns(plain, system), how)


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn.

    Without maxTokens the answer ends where the model's limit is. `max_new_tokens` is the older name
    of maxTokens, which published samples still use.
    """
    config = body["inferenceConfig"]
    return SamplingParams(
        temperature=config["temperature"],
        top_p=config["topP"],
        top_k=config["topK"] or None,
        max_tokens=check_max_tokens(config["maxTokens"] or config["max_new_tokens"], max_tokens),
        stop=tuple(config["stopSequences"]),
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    generation = generations[0]
    return {
        "output": {"message": {"role": "assistant", "content": converse_content(generation)}},
        "stopReason": REASONS[generation.finish_reason],
        "usage": _usage(generation),
    }


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks, which have the names of ConverseStream's events."""
    found: list[dict[str, Any]] = []
    if piece.is_first:
        found.append({"messageStart": {"role": "assistant"}})
    found += [{name: value} for name, value in converse_block_events(piece.blocks)]
    if piece.done is not None:
        found.append({"messageStop": {"stopReason": REASONS[piece.done.finish_reason]}})
        found.append({"metadata": {"usage": _usage(piece.done), "metrics": {}, "trace": {}}})
    return found


def _usage(generation: Generation) -> dict[str, int]:
    return {
        "inputTokens": generation.input_tokens,
        "outputTokens": generation.output_tokens,
        "totalTokens": generation.input_tokens + generation.output_tokens,
    }


def _text(blocks: list[dict[str, Any]], path: str) -> str:
    return BETWEEN_BLOCKS.join(
        text_of(block, f"{path}/{place}") for place, block in enumerate(blocks)
    )
