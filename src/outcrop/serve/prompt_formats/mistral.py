"""Mistral: `{"prompt": ..., "max_tokens": ..., "stop": [...]}`.

Source: user guide, "Mistral AI text completion".
"""

from __future__ import annotations

from typing import Any

from outcrop.data.markup import parse_prompt
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.schema import Field, Fields, check, check_max_tokens
from outcrop.serve.request import FinishReason, Generation, SamplingParams

REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "stop_sequence": "stop",
    "tool_calls": "stop",
}
FIELDS: Fields = {
    "prompt": Field("string", required=True, minimum=1),
    "max_tokens": Field("integer", 512, minimum=1),
    "stop": Field("strings", (), maximum=10),
    "temperature": Field("number", 0.5, minimum=0, maximum=1),
    "top_p": Field("number", 0.9, minimum=0, maximum=1),
    "top_k": Field("integer", 50, minimum=1, maximum=200),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body."""
    body = check(value, FIELDS)
    prompt = body["prompt"]
    return NativeRequest(parse_prompt("mistral", prompt), sampling(base, body, max_tokens), prompt)


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn."""
    return SamplingParams(
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        max_tokens=check_max_tokens(body["max_tokens"], max_tokens),
        stop=tuple(body["stop"]),
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    return {
        "outputs": [
            {"text": generation.text, "stop_reason": REASONS[generation.finish_reason]}
            for generation in generations
        ]
    }


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks."""
    reason = REASONS[piece.done.finish_reason] if piece.done else None
    return [{"outputs": [{"text": piece.text, "stop_reason": reason}]}]
