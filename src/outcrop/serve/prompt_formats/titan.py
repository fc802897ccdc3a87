"""Amazon Titan Text: `{"inputText": ..., "textGenerationConfig": {...}}`.

Source: user guide, "Amazon Titan Text models". The guide lists the reason FINISHED; its samples
and the live service say FINISH.
"""

from __future__ import annotations

from typing import Any

from outcrop.data.markup import parse_prompt
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.schema import (
    MAX_STOP_SEQUENCES,
    Field,
    Fields,
    check,
    check_max_tokens,
)
from outcrop.serve.request import FinishReason, Generation, SamplingParams

REASONS: dict[FinishReason, str] = {
    "stop": "FINISH",
    "length": "LENGTH",
    "stop_sequence": "STOP_CRITERIA_MET",
    "tool_calls": "FINISH",
}
FIELDS: Fields = {
    "inputText": Field("string", required=True, minimum=1),
    "textGenerationConfig": Field(
        "object",
        fields={
            "temperature": Field("number", 0.7, minimum=0, maximum=1),
            "topP": Field("number", 0.9, above=0, maximum=1),
            "maxTokenCount": Field("integer", 512, minimum=1),
            "stopSequences": Field("strings", (), maximum=MAX_STOP_SEQUENCES),
        },
    ),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body; a prompt in `User:` / `Bot:` form becomes turns."""
    body = check(value, FIELDS)
    return NativeRequest(parse_prompt("titan", body["inputText"]), sampling(base, body, max_tokens))


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn."""
    config = body["textGenerationConfig"]
    return SamplingParams(
        temperature=config["temperature"],
        top_p=config["topP"],
        max_tokens=check_max_tokens(config["maxTokenCount"], max_tokens),
        stop=tuple(config["stopSequences"]),
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    return {
        "inputTextTokenCount": generations[0].input_tokens,
        "results": [
            {
                "tokenCount": generation.output_tokens,
                "outputText": generation.text,
                "completionReason": REASONS[generation.finish_reason],
            }
            for generation in generations
        ],
    }


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks."""
    done = piece.done
    return [
        {
            "outputText": piece.text,
            "index": piece.number,
            "totalOutputTextTokenCount": piece.output_tokens if done else None,
            "completionReason": REASONS[done.finish_reason] if done else None,
            "inputTextTokenCount": piece.input_tokens if piece.is_first or done else None,
        }
    ]
