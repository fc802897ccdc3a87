"""Answers in OpenAI's shapes: objects, the chunks of a stream, models and errors.

Turns generations and errors into JSON objects. Knows neither requests nor sockets.

Source: OpenAI API Reference: the chat completion, chat completion chunk, completion and model
objects; guide "Error codes" for statuses, and its client for which of them are asked again.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from outcrop.errors import ApiError
from outcrop.serve.prompt_formats import openai_tools
from outcrop.serve.request import FinishReason, Generation, TokenLogprob

Kind = Literal["chat", "text"]

REASONS: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "stop_sequence": "stop",
    "tool_calls": "tool_calls",
}
END_OF_STREAM = b"data: [DONE]\n\n"
CODES = {
    "ResourceNotFoundException": (404, "invalid_request_error", "model_not_found"),
    "AccessDeniedException": (403, "invalid_request_error", "insufficient_permissions"),
    "ThrottlingException": (429, "rate_limit_error", "rate_limit_exceeded"),
    "ModelNotReadyException": (503, "server_error", "model_not_ready"),
    "ServiceUnavailableException": (503, "server_error", "service_unavailable"),
    "ModelTimeoutException": (408, "server_error", "timeout"),
    "ModelErrorException": (500, "server_error", "model_error"),
    "ModelStreamErrorException": (500, "server_error", "model_error"),
}
"""AWS's code -> status, type and code of OpenAI's. All others keep their status."""
REPLACEMENT = "\ufffd"
"""What a part of a character is decoded to."""
END_TOKEN = TokenLogprob("", None)
"""Where an answer ended by itself: the model server does not tell this token's log-probability."""
RETRY_SECONDS = 1
"""What `Retry-After` says to who came too early."""


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer say of it."""

    kind: Kind
    model: str
    """As the request named it."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, chunk: bool) -> dict[str, Any]:
        """Return the members before the choices."""
        if self.kind == "chat":
            name = "chat.completion.chunk" if chunk else "chat.completion"
            return {**self._named(f"chatcmpl-{self.id}", name)}
        return self._named(f"cmpl-{self.id}", "text_completion")

    def _named(self, answer_id: str, name: str) -> dict[str, Any]:
        return {"id": answer_id, "object": name, "created": self.created, "model": self.model}


def with_prompt(generation: Generation, prompt: str | None, *, prompt_only: bool) -> Generation:
    """Return an answer that begins with what is echoed, in its text and its log-probabilities.

    Args:
        prompt: an empty text where nothing is echoed; None where the prompt was token ids, whose
            own texts are put together: a character that several of them share is not whole there.
        prompt_only: leaves out the answer itself.
    """
    if prompt_only:
        told = None if generation.logprobs is None else ()
        generation = replace(
            generation, text="", output_tokens=0, finish_reason="length", logprobs=told
        )
    before, after = generation.prompt_logprobs or (), generation.logprobs
    if prompt is None:
        prompt = "".join(token.text for token in before)
    if before and after is not None:
        # The last place is that of the last token drawn, which clients that count tokens rely on.
        ended = len(after) < generation.output_tokens
        after = (*before, *after, END_TOKEN) if ended else (*before, *after)
    return replace(generation, text=prompt + generation.text, logprobs=after)


def whole(reply: Reply, generations: Sequence[Generation], choices_each: int) -> dict[str, Any]:
    """Return the answer that is not streamed.

    Args:
        choices_each: answers to one prompt, which is counted once.
    """
    choices = []
    for index, generation in enumerate(generations):
        end: dict[str, Any] = {
            "logprobs": logprobs(reply.kind, generation),
            "finish_reason": REASONS[generation.finish_reason],
        }
        if reply.kind == "chat":
            message = {"role": "assistant", **openai_tools.message(generation)}
            choices.append({"index": index, "message": message, **end})
        else:
            choices.append({"index": index, "text": generation.text, **end})
    return {
        **reply.head(chunk=False),
        "choices": choices,
        "usage": usage(generations, choices_each),
    }


def text_chunk(reply: Reply, index: int, text: str, *, first: bool = False) -> dict[str, Any]:
    """Return the chunk that adds text to one choice; the first of a chat names the role."""
    if reply.kind == "text":
        choice: dict[str, Any] = {"index": index, "text": text}
    elif first:
        choice = {"index": index, "delta": {"role": "assistant", "content": text, "refusal": None}}
    else:
        choice = {"index": index, "delta": {"content": text}}
    end = {"logprobs": None, "finish_reason": None}
    return {**reply.head(chunk=True), "choices": [{**choice, **end}]}


def calls_chunk(reply: Reply, index: int, generation: Generation) -> dict[str, Any] | None:
    """Return the chunk with the calls of one choice; None where it has none."""
    calls = [
        {"index": place, **call}
        for place, call in enumerate(openai_tools.answered_calls(generation))
    ]
    choice = {"index": index, "delta": {"tool_calls": calls}}
    end = {"logprobs": None, "finish_reason": None}
    return {**reply.head(chunk=True), "choices": [{**choice, **end}]} if calls else None


def last_chunk(reply: Reply, index: int, generation: Generation) -> dict[str, Any]:
    """Return the chunk that ends one choice; it carries the log-probabilities of all of it."""
    choice: dict[str, Any] = {"index": index}
    if reply.kind == "text":
        choice["text"] = ""
    else:
        choice["delta"] = {}
    choice["logprobs"] = logprobs(reply.kind, generation)
    choice["finish_reason"] = REASONS[generation.finish_reason]
    return {**reply.head(chunk=True), "choices": [choice]}


def usage_chunk(
    reply: Reply, generations: Sequence[Generation], choices_each: int
) -> dict[str, Any]:
    """Return the chunk after the last choice's, with the token counts."""
    return {
        **reply.head(chunk=True),
        "choices": [],
        "usage": usage(generations, choices_each),
    }


def usage(generations: Sequence[Generation], choices_each: int) -> dict[str, int]:
    """Return the token counts: each prompt once, however many answers it has."""
    prompt = sum(generation.input_tokens for generation in generations[::choices_each])
    completion = sum(generation.output_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def logprobs(kind: Kind, generation: Generation) -> dict[str, Any] | None:
    """Return the log-probabilities of an answer's tokens; None where they were not asked for."""
    tokens = generation.logprobs
    if tokens is None:
        return None
    if kind == "chat":
        content = [
            {
                **_chat_token(token.text, token.logprob),
                "top_logprobs": [_chat_token(*other) for other in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}
    likeliest = [_likeliest(token) for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": likeliest if any(likeliest) else None,
        "text_offset": _text_offsets(tokens, generation.text),
    }


def _chat_token(text: str, logprob: float | None) -> dict[str, Any]:
    # A token that holds a part of a character has no text of its own.
    spelling = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": spelling}


def _likeliest(token: TokenLogprob) -> dict[str, float] | None:
    """Return the likeliest tokens in a place and the one that stands there, as OpenAI does."""
    if token.logprob is None or not token.top:
        return None
    found: dict[str, float] = {}
    for text, logprob in (*token.top, (token.text, token.logprob)):
        found.setdefault(text, logprob)  # tokens may share a text; the likeliest of them is told
    return found


def _text_offsets(tokens: Sequence[TokenLogprob], text: str) -> list[int]:
    """Return where each token begins in the text.

    A token with a part of a character begins where that character does, or where the first of
    several does that such tokens share. Whole tokens are looked for as far on as those before can
    reach, and one character further: some tokenizers write a token alone without its space.
    """
    offsets, place, reach, shared = [], 0, 1, False
    for token in tokens:
        if shared and not token.text.startswith(REPLACEMENT):
            place, reach, shared = place + 1, reach - 1, False  # past the character
        if REPLACEMENT in token.text:
            offsets.append(place)
            parts = token.text.count(REPLACEMENT)
            place, reach, shared = place + len(token.text) - parts, reach + parts, True
            continue
        found = text.find(token.text, place, place + reach + len(token.text))
        place, reach = max(place, found), 1
        offsets.append(min(place, len(text)))
        place += len(token.text)
    return offsets


def model(model_id: str, created: int, owned_by: str) -> dict[str, Any]:
    """Return a model of the list."""
    return {"id": model_id, "object": "model", "created": created, "owned_by": owned_by}


def error(found: ApiError) -> tuple[int, dict[str, Any]]:
    """Return an error's status and body. No user's mistake has a status of 500 or above."""
    status, kind, code = CODES.get(found.code, (found.http_status, "", None))
    if not kind:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    param = found.members.get("param")
    body = {
        "message": found.message,
        "type": kind,
        "param": param,
        "code": found.members.get("code", code),
    }
    return status, {"error": body}


def error_headers(status: int) -> dict[str, str]:
    """Return what tells a client whether to ask again: a request that took too long does so again,
    and one that came too early waits a little."""
    if status == 408:
        return {"x-should-retry": "false"}
    return {"retry-after": str(RETRY_SECONDS)} if status in (429, 503) else {}


def event(value: dict[str, Any]) -> bytes:
    """Return one server-sent event. It is ASCII, because some clients take U+2028 in a text for the
    end of its line."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n\n"
