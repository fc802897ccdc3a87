"""Cohere Command: `{"prompt": ..., "max_tokens": ..., "num_generations": ...}`.

Source: user guide, "Cohere Command models". Two things are refused and said so: `logit_bias` (it
names tokens of a vocabulary that the model behind the id does not have) and likelihoods of the
prompt (`return_likelihoods: ALL`). A stream comes in pieces only where the body has `stream: true`;
else it has one chunk, the whole answer.
"""

from __future__ import annotations

import uuid
from typing import Any

from outcrop.data.markup import parse_prompt
from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.schema import Field, Fields, check, check_max_tokens
from outcrop.serve.request import FinishReason, Generation, SamplingParams, Truncate

REASONS: dict[FinishReason, str] = {
    "stop": "COMPLETE",
    "length": "MAX_TOKENS",
    "stop_sequence": "COMPLETE",
    "tool_calls": "COMPLETE",
}
TRUNCATE: dict[str, Truncate] = {"NONE": "none", "START": "start", "END": "end"}
FIELDS: Fields = {
    "prompt": Field("string", required=True, minimum=1),
    "temperature": Field("number", 0.9, minimum=0, maximum=5),
    "p": Field("number", 0.75, minimum=0, maximum=1),
    "k": Field("integer", 0, minimum=0, maximum=500),
    "max_tokens": Field("integer", 20, minimum=1),
    "stop_sequences": Field("strings", (), maximum=4),
    "return_likelihoods": Field("string", "NONE", enum=("GENERATION", "ALL", "NONE")),
    "stream": Field("boolean", False),
    "num_generations": Field("integer", 1, minimum=1, maximum=5),
    "logit_bias": Field("object"),
    "truncate": Field("string", "END", enum=tuple(TRUNCATE)),
}


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body. `p` and `k` of 0 switch their cut off."""
    body = check(value, FIELDS)
    prompt = body["prompt"]
    return NativeRequest(
        parse_prompt("cohere", prompt),
        sampling(base, body, max_tokens),
        prompt,
        num_generations=body["num_generations"],
        in_pieces=body["stream"],
    )


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body wants tokens to be drawn."""
    if body["logit_bias"]:
        raise ValidationException(
            "logit_bias is not supported: it names tokens of Cohere's vocabulary, and "
            f"{base.model_id} is served here by {base.model_name}. Leave logit_bias out."
        )
    if body["return_likelihoods"] == "ALL":
        raise ValidationException(
            "return_likelihoods ALL is not supported: the likelihoods of the prompt are not "
            "computed. Use GENERATION or NONE."
        )
    return SamplingParams(
        temperature=body["temperature"],
        top_p=body["p"] or 1.0,
        top_k=body["k"] or None,
        max_tokens=check_max_tokens(body["max_tokens"], max_tokens),
        stop=tuple(body["stop_sequences"]),
        logprobs=body["return_likelihoods"] == "GENERATION",
        truncate=TRUNCATE[body["truncate"]],
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body."""
    answers = []
    for index, generation in enumerate(generations):
        answer: dict[str, Any] = {
            "finish_reason": REASONS[generation.finish_reason],
            "id": str(uuid.uuid4()),
            "text": generation.text,
        }
        if len(generations) > 1:
            answer["index"] = index
        answers.append(answer | _likelihoods(generation))
    return {"generations": answers, "id": str(uuid.uuid4()), "prompt": request.prompt}


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks."""
    index = {"index": piece.number} if request.num_generations > 1 else {}
    found: list[dict[str, Any]] = []
    if piece.text:
        found.append({"text": piece.text, "is_finished": False, **index})
    if piece.done is not None:
        last = {"is_finished": True, "finish_reason": REASONS[piece.done.finish_reason], **index}
        found.append(last | _likelihoods(piece.done))
    return found


def _likelihoods(generation: Generation) -> dict[str, Any]:
    if generation.logprobs is None:
        return {}
    logprobs = [token.logprob for token in generation.logprobs if token.logprob is not None]
    return {
        # The mean, so that answers of different lengths compare.
        "likelihood": sum(logprobs) / len(logprobs) if logprobs else 0.0,
        "token_likelihoods": [
            {"token": token.text, "likelihood": token.logprob} for token in generation.logprobs
        ],
    }
