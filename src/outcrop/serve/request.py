"""What a model server is asked and answers, and the JSON lines in which both cross a socket.

An answer is a stream of events: any number of TokenEvents, then one Generation, or an ApiError at
any point instead. Knows neither body formats nor weights; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from outcrop import errors
from outcrop.data.records import Message, Tool, ToolCall
from outcrop.errors import ApiError

FinishReason = Literal["stop", "length", "stop_sequence", "tool_calls"]
Truncate = Literal["none", "start", "end"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn and when to stop."""

    temperature: float = 1.0
    """0 takes the likeliest token each time, and is repeatable."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities sum to this; 1 draws from all."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; None draws from all."""
    max_tokens: int | None = None
    """Tokens to answer with at most; None means as many as the context has room for."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they appear; they are not part of it. None is empty."""
    seed: int | None = None
    """Makes the draws repeatable; None draws anew each time."""
    logprobs: bool = False
    """Whether the log-probability of each token of the answer is wanted."""
    prompt_logprobs: bool = False
    """Whether that of each token of the prompt is wanted too."""
    top_logprobs: int = 0
    """Likeliest tokens that are told beside each of those."""
    truncate: Truncate = "none"
    """Which end of a prompt that is too long is cut off; "none" refuses it."""


@dataclass(frozen=True)
class Owner:
    """Whose request it is: decides when it is served, never what is answered."""

    account: str = ""
    model: str = ""
    """ARN of the model that was asked."""
    reservation: str | None = None
    """Id of the provisioned throughput that it came by; None is on demand."""
    units: int = 0
    """Model units of that throughput."""
    batch: bool = False
    """Whether nobody waits for the answer: it is of a batch job, and on demand."""


@dataclass(frozen=True)
class GenerationRequest:
    """One answer that is wanted."""

    messages: tuple[Message, ...]
    """Rendered by the model's template; none where `prompt` is given."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    """Folder of the custom model's artifact; None asks the base."""
    adapter_digest: str | None = None
    """What the artifact's `folder_digest` must be when it is read; None takes it as it is."""
    timeout_seconds: float | None = None
    """Counted from the arrival at the model server; None means the server's own limit."""
    prompt: str | tuple[int, ...] | None = None
    """What the model goes on with as it stands, as text or as tokens, instead of messages."""
    owner: Owner = field(default_factory=Owner)
    tools: tuple[Tool, ...] = ()
    """What the model may call; its template must know of tools."""
    start: str = ""
    """With tools, what the answer begins with; it is no part of the answer's text."""
    shown: tuple[str, ...] = ()
    """Control tokens that the answer's text shows; all others are left out of it."""
    spells_control: bool = False
    """Whether the control tokens that a text of `prompt` spells are those tokens."""


@dataclass(frozen=True)
class TokenEvent:
    """Text that is now certain to be part of the answer."""

    text: str
    input_tokens: int
    output_tokens: int
    """Tokens drawn so far; text that may still become a stop sequence is held back."""


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a prompt or an answer."""

    text: str
    logprob: float | None
    """Natural logarithm of its probability under the model, before temperature and cuts; None of
    the first token of a prompt."""
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place and theirs, the likeliest first."""


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    input_tokens: int
    output_tokens: int
    """Tokens drawn: the end token and those of a stop sequence count too."""
    finish_reason: FinishReason
    """The model's own end token, `max_tokens` or the context reached, or a stop sequence. That it
    ended by itself after calls of tools is the gateway's to say."""
    stop_sequence: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    """None unless they were asked for; of all tokens drawn but the end token."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """None unless they were asked for; of all tokens of the prompt."""
    content: tuple[str | ToolCall, ...] = ()
    """Texts and calls that the gateway finds in it, where it was asked with tools."""


_LOGPROBS = ("logprobs", "prompt_logprobs")

Event: TypeAlias = TokenEvent | Generation | ApiError


def request_to_json(request: GenerationRequest) -> bytes:
    """Return the request as one JSON object."""
    sampling = {**vars(request.sampling), "stop": list(request.sampling.stop)}
    return _encode(
        {
            "messages": _messages(request.messages),
            "sampling": sampling,
            "adapter": request.adapter,
            "adapter_digest": request.adapter_digest,
            "timeout_seconds": request.timeout_seconds,
            "prompt": request.prompt,
            "owner": vars(request.owner),
            "tools": [vars(tool) for tool in request.tools],
            "start": request.start,
            "shown": request.shown,
            "spells_control": request.spells_control,
        }
    )


def request_from_json(body: bytes) -> GenerationRequest:
    """Read what `request_to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: the body is something else.
    """
    value = json.loads(body)
    sampling, prompt = SamplingParams(**value["sampling"]), value["prompt"]
    return GenerationRequest(
        messages=_read_messages(value["messages"]),
        sampling=replace(sampling, stop=tuple(sampling.stop)),
        adapter=value["adapter"],
        adapter_digest=value["adapter_digest"],
        timeout_seconds=value["timeout_seconds"],
        prompt=tuple(prompt) if isinstance(prompt, list) else prompt,
        owner=Owner(**value.get("owner", {})),
        tools=_read_tools(value["tools"]),
        start=value["start"],
        shown=tuple(value["shown"]),
        spells_control=value.get("spells_control", False),
    )


def messages_to_json(
    messages: tuple[Message, ...], tools: tuple[Tool, ...] = (), prompt: str | None = None
) -> bytes:
    """Return the messages, and the tools, as one JSON object; or a prompt as it stands."""
    told = [vars(tool) for tool in tools]
    return _encode({"messages": _messages(messages), "tools": told, "prompt": prompt})


def messages_from_json(body: bytes) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
    """Read what `messages_to_json` wrote; raises as `request_from_json` does."""
    value = json.loads(body)
    return _read_messages(value["messages"]), _read_tools(value["tools"])


def prompt_from_json(body: bytes) -> str | None:
    """Read the prompt that `messages_to_json` wrote; None where there is none."""
    prompt = json.loads(body).get("prompt")
    return None if prompt is None else str(prompt)


def event_to_json(event: Event) -> bytes:
    """Return the event as one line of JSON, with its line end."""
    if isinstance(event, TokenEvent):
        value: dict[str, Any] = {"event": "token", **vars(event)}
    elif isinstance(event, Generation):
        value = {"event": "done", **vars(event)}
        del value["content"]  # that is found by who reads it
        for name in _LOGPROBS:
            if (tokens := value[name]) is not None:
                value[name] = [[token.text, token.logprob, token.top] for token in tokens]
    else:
        value = {
            "event": "error",
            "code": event.code,
            "http_status": event.http_status,
            "message": event.message,
            "members": event.members,
        }
    return _encode(value) + b"\n"


def event_from_json(line: bytes | str) -> Event:
    """Read what `event_to_json` wrote; an error comes back as an instance of its own class.

    Raises:
        ValueError, KeyError, TypeError: the line is something else.
    """
    value = json.loads(line)
    kind = value.pop("event")
    if kind == "token":
        return TokenEvent(**value)
    if kind == "done":
        for name in _LOGPROBS:
            if (tokens := value[name]) is not None:
                value[name] = tuple(
                    TokenLogprob(text, logprob, tuple((word, other) for word, other in top))
                    for text, logprob, top in tokens
                )
        return Generation(**value)
    if kind == "error":
        return _read_error(value)
    raise ValueError(f"an event cannot be {kind!r}")


def _read_error(value: Mapping[str, Any]) -> ApiError:
    code = value["code"]
    found = getattr(errors, code, ApiError)
    cls = found if isinstance(found, type) and issubclass(found, ApiError) else ApiError
    return cls(
        value["message"],
        code=code,
        http_status=value["http_status"],
        members=dict(value["members"]),
    )


def _messages(messages: tuple[Message, ...]) -> list[list[Any]]:
    return [
        [message.role, message.text, [vars(call) for call in message.calls], message.call_id]
        for message in messages
    ]


def _read_messages(value: Any) -> tuple[Message, ...]:
    return tuple(
        Message(role, text, tuple(ToolCall(**call) for call in calls), call_id)
        for role, text, calls, call_id in value
    )


def _read_tools(value: Any) -> tuple[Tool, ...]:
    return tuple(Tool(**tool) for tool in value)


def _encode(value: dict[str, Any]) -> bytes:
    # ASCII only, so that no text, lone surrogates included, can break the encoding or the line.
    return json.dumps(value, separators=(",", ":")).encode("ascii")
