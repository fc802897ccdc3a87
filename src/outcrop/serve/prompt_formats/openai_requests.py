"""Bodies of OpenAI-style requests, to messages or prompts and sampling parameters.

Turns a JSON object into an `Ask`, or refuses it by the name of the field that is wrong. Fields that
ask for what is not offered are refused, unless their value asks for nothing (`"tools": []`): what a
client relies on must not be ignored. Knows neither HTTP nor sockets.

Source: OpenAI API Reference, "Create chat completion" and "Create completion": names, bounds and
defaults of the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from outcrop.data.records import Message, ToolCall
from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats.native import NativeRequest, ToolUse
from outcrop.serve.prompt_formats.openai_tools import join_messages, parse_calls, parse_tools
from outcrop.serve.prompt_formats.schema import (
    MAX_SHOWN,
    MAX_STOP_SEQUENCE,
    MAX_STOP_SEQUENCES,
    check_takes_messages,
)
from outcrop.serve.request import SamplingParams
from outcrop.wire.document import describe, shorten

MAX_CHOICES = 128
"""Answers to one prompt. Source: bound of `n`."""
MAX_ANSWERS = 2048
"""Answers of one request, over all prompts. LIMIT: OpenAI takes up to 2,048 prompts."""
COMPLETION_TOKENS = 16
"""Source: default of `max_tokens` of a completion; a chat's answer has what the context holds."""
MAX_COMPLETION_LOGPROBS = 5
"""Source: bound of `logprobs` of a completion."""
MAX_CHAT_LOGPROBS = 20
"""Source: bound of `top_logprobs` of a chat completion."""
TOKEN_IDS = 2**31
"""More than any vocabulary has; what the model's own has is its server's to say."""
MAX_MODEL_ID = 2048
"""Source: InvokeModel's modelId."""
SEEDS = 2**63

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
ANYTHING = ("user", "safety_identifier", "prompt_cache_key", "metadata")
"""Fields that change no answer: who asks, and what OpenAI files it under."""
NOTHING_ASKED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields that are not supported, and the values with which they ask for nothing. An absent field
and null are the same."""
NOTHING_SAID: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
"""The same for what may stand in a message."""


@dataclass(frozen=True)
class Ask:
    """What one request asks of a model."""

    requests: tuple[NativeRequest, ...]
    """One an answer: all answers to the first prompt, then all to the second, and so on."""
    prompts: tuple[str | None, ...]
    """What each answer begins with: its prompt where that is echoed, else an empty text. None is a
    prompt of token ids, whose text comes with the answer's end."""
    choices_each: int
    """Answers to one prompt."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the token counts."""
    prompt_only: bool = False
    """Whether nothing is wanted but the echoed prompt: what is drawn after it is left out."""


def parse_chat(base: BaseModel, body: Mapping[str, Any]) -> Ask:
    """Read the body of a chat completion.

    Raises:
        ValidationException: a field is missing, unknown, not supported, of a wrong type or out of
            range; `members["param"]` names it.
    """
    check_takes_messages(base)
    left = _given(body)
    messages = _messages(left.pop("messages", None))
    if "max_tokens" in left and "max_completion_tokens" in left:
        _refuse("max_tokens", "cannot stand beside 'max_completion_tokens'; give one of them.")
    name = "max_completion_tokens" if "max_completion_tokens" in left else "max_tokens"
    max_tokens = _max_tokens(left, name, base) if name in left else None
    logprobs = _boolean(left, "logprobs")
    if "top_logprobs" in left and not logprobs:
        _refuse("top_logprobs", "needs 'logprobs': true.")
    top_logprobs = _integer(left, "top_logprobs", 0, 0, MAX_CHAT_LOGPROBS)
    sampling = replace(
        _sampling(left), max_tokens=max_tokens, logprobs=logprobs, top_logprobs=top_logprobs
    )
    tools = parse_tools(left)
    if tools is None and any(message.calls or message.call_id for message in messages):
        tools = ToolUse((), "none")
    return _ask(left, [NativeRequest(messages, sampling, tool_use=tools)], [""])


def parse_completion(base: BaseModel, body: Mapping[str, Any]) -> Ask:
    """Read the body of a completion. The model goes on with its prompts as they stand: no template.

    Raises:
        ValidationException: as `parse_chat`.
    """
    left = _given(body)
    prompts = _prompts(left.pop("prompt", None))
    echo = _boolean(left, "echo")
    logprobs = "logprobs" in left
    top_logprobs = _integer(left, "logprobs", 0, 0, MAX_COMPLETION_LOGPROBS)
    max_tokens = _max_tokens(left, "max_tokens", base, 0)
    if max_tokens == 0 and not echo:
        _refuse("max_tokens", "is 0, which is allowed with 'echo': true only.")
    sampling = replace(
        _sampling(left),
        max_tokens=max(1, max_tokens),  # an answer of none is not to be had
        logprobs=logprobs,
        top_logprobs=top_logprobs,
    )
    requests = []
    for prompt in prompts:
        # The text of token ids comes with their log-probabilities, so an echo needs those.
        told = echo and (logprobs or not isinstance(prompt, str))
        requests.append(
            NativeRequest((), replace(sampling, prompt_logprobs=told), raw_prompt=prompt)
        )
    heads = [prompt if isinstance(prompt, str) else None for prompt in prompts]
    found = _ask(left, requests, heads if echo else [""] * len(prompts))
    return replace(found, prompt_only=max_tokens == 0)


def model_id(body: Mapping[str, Any]) -> str:
    """Return the model that is asked.

    Raises:
        ValidationException: it is not named.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model:
        _refuse("model", f"must name a model, not be {_kind(model)}. GET /v1/models lists them.")
    if len(model) > MAX_MODEL_ID:
        _refuse("model", f"has {len(model):,} characters; {MAX_MODEL_ID:,} are allowed.")
    return model


def _ask(left: dict[str, Any], requests: list[NativeRequest], prompts: Sequence[str | None]) -> Ask:
    """Make the Ask of what is left once the fields of one kind of request are read."""
    choices = _integer(left, "n", 1, 1, MAX_CHOICES)
    if choices * len(requests) > MAX_ANSWERS:
        _refuse(
            "prompt",
            f"and 'n' ask for {choices * len(requests):,} answers; one request may ask for "
            f"{MAX_ANSWERS:,}.",
        )
    stream = _boolean(left, "stream")
    include_usage = _include_usage(left, stream)
    _refuse_the_rest(left)
    return Ask(
        tuple(_one_of(request, index) for request in requests for index in range(choices)),
        tuple(prompt for prompt in prompts for _ in range(choices)),
        choices,
        stream,
        include_usage,
    )


def _one_of(request: NativeRequest, index: int) -> NativeRequest:
    """Return the request of one of several answers: with a seed, each has one that follows from
    it."""
    seed = request.sampling.seed
    if seed is None or index == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + index))


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None and name != "model"}


def _sampling(left: dict[str, Any]) -> SamplingParams:
    seed = _integer(left, "seed", 0, -SEEDS, SEEDS - 1) if "seed" in left else None
    return SamplingParams(
        temperature=_number(left, "temperature", 1.0, 0, 2),
        top_p=_number(left, "top_p", 1.0, 0, 1),
        stop=_stop(left.pop("stop", ())),
        seed=seed,
    )


def _messages(value: Any) -> tuple[Message, ...]:
    """Read turns; those of one role that follow each other are joined, as in InvokeModel bodies."""
    if not isinstance(value, list) or not value:
        _refuse("messages", f"must be a list of at least one message, not {_kind(value)}.")
    turns = [_message(item, f"messages[{place}]") for place, item in enumerate(value)]
    # An empty system text is what many programs send that have none to send.
    said = [turn for turn in turns if turn.text or turn.role != "system"]
    if all(turn.role == "system" for turn in said):
        _refuse("messages", "must have a message of the user.")
    return join_messages(said)


def _message(item: Any, path: str) -> Message:
    if not isinstance(item, dict):
        _refuse(path, f"must be an object, not {_kind(item)}.")
    left = _given(item)
    role = left.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        _refuse(f"{path}.role", f"is {_shown(role)}; supported are {', '.join(map(repr, ROLES))}.")
    calls: tuple[ToolCall, ...] = ()
    call_id = None
    if role == "assistant" and left.get("tool_calls"):
        calls = parse_calls(left.pop("tool_calls"), f"{path}.tool_calls")
        left.setdefault("content", "")
    if left.get("tool_calls") == []:
        del left["tool_calls"]
    if role == "tool":
        call_id = left.pop("tool_call_id", None)
        if not isinstance(call_id, str):
            _refuse(f"{path}.tool_call_id", f"must be a string, not {_kind(call_id)}.")
    text = _content(left.pop("content", None), f"{path}.content")
    if not text and not calls and role in ("user", "assistant"):
        _refuse(f"{path}.content", "must not be empty.")
    for name, content in left.items():
        if content not in NOTHING_SAID.get(name, ()):
            _refuse(f"{path}.{shorten(name)}", "is not supported by this service.")
    return Message(ROLES[role], text, calls, call_id)


def _content(value: Any, path: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _refuse(path, f"must be a string or a list of parts, not {_kind(value)}.")
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict):
            _refuse(f"{path}[{place}]", f"must be an object, not {_kind(part)}.")
        if part.get("type") != "text":
            _refuse(f"{path}[{place}].type", f"is {_shown(part.get('type'))}; only 'text' is read.")
        text = part.get("text")
        if not isinstance(text, str):
            _refuse(f"{path}[{place}].text", f"must be a string, not {_kind(text)}.")
        texts.append(text)
    return "\n".join(texts)


def _prompts(value: Any) -> list[str | tuple[int, ...]]:
    """Read a text, a list of texts, a list of token ids or a list of such lists."""
    if not isinstance(value, list):
        return [_prompt(value, "prompt", "a string or an array")]
    if not value:
        _refuse("prompt", "must not be empty.")
    if _is_number(value[0]):
        return [_prompt(value, "prompt", "")]
    if len(value) > MAX_ANSWERS:
        _refuse("prompt", f"has {len(value):,} prompts; {MAX_ANSWERS:,} are allowed.")
    wanted = "a string or an array of token ids"
    return [_prompt(item, f"prompt[{place}]", wanted) for place, item in enumerate(value)]


def _prompt(value: Any, path: str, wanted: str) -> str | tuple[int, ...]:
    if not isinstance(value, str | list):
        _refuse(path, f"must be {wanted}, not {_kind(value)}.")
    if not value:
        _refuse(path, "must not be empty.")
    if isinstance(value, str):
        return value
    for place, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int):
            _refuse(f"{path}[{place}]", f"must be a token id, a whole number, not {_kind(token)}.")
        if not 0 <= token < TOKEN_IDS:
            _refuse(f"{path}[{place}]", f"is {_shown(token)}, which is no token id of any model.")
    return tuple(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        _refuse("stop", f"must be a string or a list of strings, not {_kind(value)}.")
    if len(texts) > MAX_STOP_SEQUENCES:
        _refuse("stop", f"has {len(texts):,} texts; {MAX_STOP_SEQUENCES:,} are allowed.")
    for text in texts:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_SEQUENCE:
            what = f"a text of {len(text):,} characters" if isinstance(text, str) else _kind(text)
            _refuse("stop", f"holds {what}; each has 1 to {MAX_STOP_SEQUENCE:,} characters.")
    return tuple(texts)


def _max_tokens(left: dict[str, Any], name: str, base: BaseModel, least: int = 1) -> int:
    limit = base.max_output_tokens
    return _integer(left, name, min(COMPLETION_TOKENS, limit), least, limit)


def _include_usage(left: dict[str, Any], stream: bool) -> bool:
    if "stream_options" not in left:
        return False
    options = left.pop("stream_options")
    if not stream:
        _refuse("stream_options", "is allowed with 'stream': true only.")
    if not isinstance(options, dict):
        _refuse("stream_options", f"must be an object, not {_kind(options)}.")
    known = _given(options)
    include = _boolean(known, "include_usage", "stream_options.")
    known.pop("include_obfuscation", None)  # padding against eavesdroppers changes no answer
    for name in known:
        _refuse(f"stream_options.{shorten(name)}", "is not known.")
    return include


def _number(left: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = left.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(name, f"must be a number, not {_kind(value)}.")
    if not least <= value <= most:
        _refuse(name, f"is {_shown(value)}; it must be between {least:g} and {most:g}.")
    return float(value)


def _integer(left: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = left.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        _refuse(name, f"must be a whole number, not {_kind(value)}.")
    if not least <= value <= most:
        _refuse(name, f"is {_shown(value)}; it must be between {least:,} and {most:,}.")
    return value


def _boolean(left: dict[str, Any], name: str, path: str = "") -> bool:
    value = left.pop(name, False)
    if not isinstance(value, bool):
        _refuse(path + name, f"must be true or false, not {_kind(value)}.")
    return value


def _refuse_the_rest(left: dict[str, Any]) -> None:
    for name, value in left.items():
        if name in ANYTHING:
            continue
        if name not in NOTHING_ASKED:
            _refuse(name, "is not known.", code="unknown_parameter")
        if value not in NOTHING_ASKED[name]:
            allowed = " or ".join(map(repr, NOTHING_ASKED[name]))
            remedy = f"; leave it out, or send {allowed}." if allowed else "; leave it out."
            _refuse(name, "is not supported by this service" + remedy, code="unsupported_parameter")


def _kind(value: Any) -> str:
    if isinstance(value, list) and not value:
        return "an empty array"
    return f"the number {_shown(value)}" if _is_number(value) else describe(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    return shorten(repr(value), MAX_SHOWN) if isinstance(value, str | int | float) else _kind(value)


def _refuse(param: str, what: str, *, code: str = "invalid_value") -> NoReturn:
    """Refuse a field: `'temperature' is 3; it must be between 0 and 2.`"""
    shown = shorten(param)
    raise ValidationException(f"'{shown}' {what}", members={"param": shown, "code": code})
