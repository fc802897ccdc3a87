"""Imported models: three forms of a body, told apart by their keys.

    {"prompt": ..., "max_gen_len": ...}   Bedrock's completion, answered as Llama's is
    {"prompt": ..., "max_tokens": ...}    OpenAI's completion
    {"messages": ...}                     OpenAI's chat completion

The prompt of a completion is what the model goes on with, as it stands: whoever imports a model
writes its mark-up, so the control tokens that a prompt spells are control tokens. Conversations are
rendered by the model's own chat template.

Source: user guide, "Invoke your imported model"; OpenAI API Reference for its two forms.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats import llama, openai_answers
from outcrop.serve.prompt_formats.native import NativeRequest, Piece
from outcrop.serve.prompt_formats.openai_answers import Reply
from outcrop.serve.prompt_formats.openai_requests import Ask, parse_chat, parse_completion
from outcrop.serve.prompt_formats.schema import (
    TRY_AGAIN,
    Field,
    Fields,
    check,
    check_max_tokens,
    refuse,
)
from outcrop.serve.request import Generation, SamplingParams, TokenLogprob

FIELDS: Fields = {
    "prompt": Field("string", required=True, minimum=1),
    "temperature": Field("number", 0.5, minimum=0, maximum=2),
    "top_p": Field("number", 0.9, minimum=0, maximum=1),
    "top_k": Field("integer", minimum=1),
    "max_gen_len": Field("integer", 512, minimum=1),
    "stop": Field("strings", (), maximum=2500),
    "logprobs": Field("integer", minimum=0, maximum=20),
}
"""Of Bedrock's completion. `logprobs` is how many likeliest tokens are told beside each."""
NOT_DRAWN = ("structured_outputs", "guided_json", "guided_regex", "guided_choice")
"""Keys of OpenAI-style bodies that ask for answers of a form, which nothing draws here."""


def parse(base: BaseModel, value: dict[str, Any], max_tokens: int) -> NativeRequest:
    """Read a body of any of the three forms."""
    if "messages" in value:
        return _openai(base, value, "chat")
    if "max_gen_len" in value or ("prompt" in value and "max_tokens" not in value):
        body = check(value, FIELDS)
        return NativeRequest(
            (),
            sampling(base, body, max_tokens),
            body["prompt"],
            raw_prompt=body["prompt"],
            spells_control=True,
        )
    if "prompt" in value:
        return _openai(base, value, "text")
    refuse("#: one of the keys [messages] and [prompt] must be there")


def sampling(base: BaseModel, body: dict[str, Any], max_tokens: int) -> SamplingParams:
    """Return how a checked body of Bedrock's completion wants tokens to be drawn."""
    return SamplingParams(
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        max_tokens=check_max_tokens(body["max_gen_len"], max_tokens),
        stop=tuple(body["stop"]),
        logprobs=body.get("logprobs") is not None,
        top_logprobs=body.get("logprobs") or 0,
    )


def format(base: BaseModel, request: NativeRequest, generations: list[Generation]) -> Any:
    """Return the answer's body in the form of the request."""
    if request.reply is not None:
        return openai_answers.whole(request.reply, generations, len(generations))
    answer = llama.format(base, request, generations)
    tokens = generations[0].logprobs
    return answer if tokens is None else {**answer, "logprobs": _logprobs(tokens)}


def chunks(base: BaseModel, request: NativeRequest, piece: Piece) -> list[dict[str, Any]]:
    """Return a streamed answer's next chunks in the form of the request."""
    reply = request.reply
    if reply is None:
        (chunk,) = llama.chunks(base, request, piece)
        if piece.done is not None and piece.done.logprobs is not None:
            chunk["logprobs"] = _logprobs(piece.done.logprobs)
        return [chunk]
    found = []
    if reply.kind == "chat" and piece.is_first:
        found.append(openai_answers.text_chunk(reply, piece.number, piece.text, first=True))
    elif piece.text:
        found.append(openai_answers.text_chunk(reply, piece.number, piece.text))
    if piece.done is not None:
        if calls := openai_answers.calls_chunk(reply, piece.number, piece.done):
            found.append(calls)
        found.append(openai_answers.last_chunk(reply, piece.number, piece.done))
    return found


def _openai(base: BaseModel, value: dict[str, Any], kind: openai_answers.Kind) -> NativeRequest:
    """Read a body of OpenAI's; what it asks for that InvokeModel has no place for is refused."""
    body = {name: item for name, item in value.items() if name not in ("model", "stream_options")}
    in_pieces = body.pop("stream", None)
    if in_pieces is not None and not isinstance(in_pieces, bool):
        _refuse("'stream' must be true or false.")
    for name in NOT_DRAWN:
        if body.get(name) is not None:
            _refuse(f"'{name}' is not supported by this service; leave it out.")
    try:
        ask = parse_chat(base, body) if kind == "chat" else parse_completion(base, body)
    except ValidationException as error:
        _refuse(error.message)
    request = ask.requests[0]
    _check_one(ask, request)
    return replace(
        request,
        num_generations=ask.choices_each,
        in_pieces=in_pieces,
        reply=Reply(kind, base.full_name),
        spells_control=isinstance(request.raw_prompt, str),
    )


def _check_one(ask: Ask, request: NativeRequest) -> None:
    if len(ask.requests) != ask.choices_each:
        _refuse("'prompt' must be one text, or one list of token ids.")
    if ask.prompt_only or any(prompt != "" for prompt in ask.prompts):
        _refuse("'echo' is not supported by InvokeModel; leave it out.")
    if ask.choices_each > 1 and request.sampling.seed is not None:
        _refuse(
            "'n' above 1 and 'seed' together are not supported: every answer would be the same."
        )


def _logprobs(tokens: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [
        {"token": token.text, "logprob": token.logprob, "top_logprobs": dict(token.top)}
        for token in tokens
    ]


def _refuse(reason: str) -> NoReturn:
    raise ValidationException(f"Malformed input request: {reason} {TRY_AGAIN.capitalize()}")
