"""Meta Llama 2 and 3: `{"prompt": ..., "max_gen_len": ..., "temperature": ..., "top_p": ...}`.

Source: user guide, "Meta Llama models".
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
    "temperature": Field("number", 0.5, minimum=0, maximum=1),
    "top_p": Field("number", 0.9, minimum=0, maximum=1),
    "max_gen_len": Field("integer", 512, minimum=1),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body; the mark-up of Llama 2 and 3 becomes turns."""
    body = check(value, FIELDS)
    prompt = body["prompt"]
    return NativeRequest(parse_prompt("llama", prompt), sampling(base, body, max_tokens), prompt)


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn."""
    return SamplingParams(
        temperature=body["temperature"],
        top_p=body["top_p"],
        max_tokens=check_max_tokens(body["max_gen_len"], max_tokens),
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    generation = generations[0]
    return {
        "generation": generation.text,
        "prompt_token_count": generation.input_tokens,
        "generation_token_count": generation.output_tokens,
        "stop_reason": REASONS[generation.finish_reason],
    }


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks."""
    return [
        {
            "generation": piece.text,
            "prompt_token_count": piece.input_tokens if piece.is_first else None,
            "generation_token_count": piece.output_tokens,
            "stop_reason": REASONS[piece.done.finish_reason] if piece.done else None,
        }
    ]
