"""Anthropic Claude messages: `{"anthropic_version": ..., "max_tokens": ..., "messages": [...]}`.

Text only: images, documents, tools and extended thinking are refused by name. Turns of one role in
a row are joined, as Anthropic's API does.

Source: user guide, "Anthropic Claude Messages API".
"""

from __future__ import annotations

import re
import uuid
from typing import Any

from outcrop.data.records import BETWEEN_BLOCKS, Message
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.schema import (
    MAX_STOP_SEQUENCES,
    Field,
    Fields,
    check,
    check_max_tokens,
    refuse,
)
from outcrop.serve.prompt_formats.turns import join_turns, text_of
from outcrop.serve.request import FinishReason, Generation, SamplingParams

REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
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
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body."""
    body = check(value, FIELDS)
    turns = [
        Message(turn["role"], _text(turn["content"], f"#/messages/{place}/content"))
        for place, turn in enumerate(body["messages"])
    ]
    system = _text(body["system"], "#/system")
    return NativeRequest(join_turns(turns, system), sampling(base, body, max_tokens))


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
        "content": [{"type": "text", "text": generation.text}],
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
        block = {"type": "text", "text": ""}
        found.append({"type": "message_start", "message": message})
        found.append({"type": "content_block_start", "index": 0, "content_block": block})
    if piece.text:
        delta = {"type": "text_delta", "text": piece.text}
        found.append({"type": "content_block_delta", "index": 0, "delta": delta})
    if piece.done is not None:
        ended = {
            "stop_reason": REASONS[piece.done.finish_reason],
            "stop_sequence": piece.done.stop_sequence,
        }
        usage = {"output_tokens": piece.output_tokens}
        found.append({"type": "content_block_stop", "index": 0})
        found.append({"type": "message_delta", "delta": ended, "usage": usage})
        found.append({"type": "message_stop"})
    return found


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
