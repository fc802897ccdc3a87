"""A Converse request, for any family: the same messages and sampling parameters as its own body's.

What `inferenceConfig` and `additionalModelRequestFields` say is put where the family's body has it,
and checked by the family's own fields, so that ranges and defaults are those of InvokeModel. Three
things differ: an answer whose length is not bounded ends where the model's context does, a
conversation that is too long is refused, not cut, unless its `truncate` says so, and stop sequences
work with every family. Text and tools are read; other content is refused by name.

Source: API reference, "Converse"; the texts of the refusals are those of the live service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NoReturn

from outcrop.data.records import BETWEEN_BLOCKS, Message
from outcrop.errors import ValidationException
from outcrop.models.catalog import BaseModel
from outcrop.serve.prompt_formats import FAMILIES, Family, NativeRequest
from outcrop.serve.prompt_formats.schema import (
    MAX_STOP_SEQUENCES,
    Field,
    Fields,
    check,
    check_takes_messages,
)
from outcrop.serve.prompt_formats.tools import (
    Turn,
    converse_turn,
    speaks_of_tools,
    tool_config,
    tool_messages,
)
from outcrop.serve.request import FinishReason, Generation

REASONS: dict[FinishReason, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "stop_sequence": "stop_sequence",
    "tool_calls": "tool_use",
}
STOP: Fields = {"stopSequences": Field("strings", (), maximum=MAX_STOP_SEQUENCES)}
_INDEX = re.compile("0|[1-9][0-9]{0,8}")
IGNORED = "cachePoint"
"""A block that changes what a prompt costs on Bedrock, never the answer."""


def parse_converse(base: BaseModel, params: Mapping[str, Any]) -> NativeRequest:
    """Read the members of a Converse request that say what to answer and how.

    Args:
        params: `messages`, `system`, `inferenceConfig`, `toolConfig` and
            `additionalModelRequestFields`, as the service model has them; all may be absent.
    Raises:
        ValidationException: the turns are in no order, a block is empty or no text, or a parameter
            is unknown or out of its range; the message names which.
    """
    check_takes_messages(base)
    system = BETWEEN_BLOCKS.join(
        _text(block, f"system.{place}", "SystemContentBlock")
        for place, block in enumerate(params.get("system") or ())
        if IGNORED not in block
    )
    head = (Message("system", system),) if system else ()
    spoken = params.get("messages") or ()
    config = params.get("toolConfig")
    tools = tool_config(config, "toolConfig") if config else None
    if tools is None and not speaks_of_tools(spoken):
        messages = (*head, *_turns(spoken))
    else:
        turns = _tool_turns(spoken)
        if tools is None:
            raise ValidationException(
                "The toolConfig field must be defined when using toolUse and toolResult content "
                "blocks."
            )
        messages = tool_messages(turns, system, "messages")

    family = FAMILIES[base.body_family]
    config = params.get("inferenceConfig") or {}
    additional = params.get("additionalModelRequestFields") or {}
    body = _body(family, config, additional)
    sampling = family.sampling(base, body, base.max_output_tokens)
    if "truncate" not in additional:  # Cohere's default would cut the last turn without a word
        sampling = replace(sampling, truncate="none")
    if "stopSequences" not in family.inference:
        stop = _check({"stopSequences": list(config.get("stopSequences") or ())}, STOP)
        sampling = replace(sampling, stop=tuple(stop["stopSequences"]))
    return NativeRequest(messages, sampling, tool_use=tools)


def response_fields(
    base: BaseModel, request: NativeRequest, generation: Generation, paths: Sequence[str]
) -> dict[str, Any]:
    """Return the fields of the family's own answer that are asked for; absent ones are left out.

    Args:
        paths: JSON pointers, such as `/stop_sequence`. The parts of each name the keys below which
            its value is returned.
    Raises:
        ValidationException: a path is no JSON pointer.
    """
    body = FAMILIES[base.body_family].format(base, request, [generation])
    found: dict[str, Any] = {}
    for place, path in enumerate(paths):
        *parents, last = _pointer(path, place)
        value, is_there = body, True
        for part in (*parents, last):
            value, is_there = _child(value, part)
            if not is_there:
                break
        if not is_there:
            continue
        inner = found
        for part in parents:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):  # a shorter path has returned all of it
                break
        else:
            inner[last] = value
    return found


def check_paths(paths: Sequence[str]) -> None:
    """Refuse what is no JSON pointer.

    Raises:
        ValidationException: names the path and its place.
    """
    for place, path in enumerate(paths):
        _pointer(path, place)


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    turns = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        _refuse_system(message, where)
        blocks = message["content"]
        texts = [
            _text(block, f"{where}.content.{number}", "ContentBlock")
            for number, block in enumerate(blocks)
            if IGNORED not in block
        ]
        if not texts:
            _refuse_empty(where)
        turns.append(Message(message["role"], BETWEEN_BLOCKS.join(texts)))
    _check_order(turns)
    return turns


def _tool_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Read turns of a conversation with tools."""
    turns = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        _refuse_system(message, where)
        blocks = [block for block in message["content"] if IGNORED not in block]
        if not blocks:
            _refuse_empty(where)
        turns.append(
            converse_turn(
                {"role": message["role"], "content": blocks},
                f"{where}.content",
                lambda block, here: _text(block, here, "ContentBlock"),
            )
        )
    _check_order(turns)
    return turns


def _refuse_system(message: Mapping[str, Any], where: str) -> None:
    if message["role"] == "system":
        raise ValidationException(
            f"This model doesn't support the role system at {where}. Put the text into the "
            "system field and try again."
        )


def _refuse_empty(where: str) -> NoReturn:
    raise ValidationException(
        f"The content field in the Message object at {where} is empty. Add a ContentBlock "
        "object to the content field and try again."
    )


def _check_order(turns: Sequence[Message | Turn]) -> None:
    if not turns or turns[0].role != "user":
        raise ValidationException(
            "A conversation must start with a user message. Try again with a conversation that "
            "starts with a user message."
        )
    for before, turn in pairwise(turns):
        if before.role == turn.role:
            raise ValidationException(
                "A conversation must alternate between user and assistant roles. Make sure the "
                "conversation alternates between user and assistant roles and try again."
            )


def _text(block: Mapping[str, Any], where: str, kind: str) -> str:
    for name in block:
        if name != "text":
            raise ValidationException(
                f"This model doesn't support the {name} content block that you provided. Update "
                f"the content block and try again. It is at {where}."
            )
    text: str = block["text"]
    if not text.strip():
        raise ValidationException(
            f"The text field in the {kind} object at {where} is blank. Add text to the text "
            "field, and try again."
        )
    return text


def _body(
    family: Family, config: Mapping[str, Any], additional: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the family's own body would say, checked, without its prompt."""
    if not isinstance(additional, dict):
        _refuse_additional("additionalModelRequestFields must be a JSON object")
    body = dict(additional)
    for name, path in family.inference.items():
        if name not in config:
            continue
        inner = body
        for key in path[:-1]:
            below = inner.get(key, {})
            if not isinstance(below, dict):
                break  # the check of the fields says what is wrong with it
            inner[key] = inner = dict(below)
        else:
            if path[-1] in inner:
                _refuse_additional(
                    f"The additional field {'.'.join(path)} conflicts with inferenceConfig.{name}"
                )
            inner[path[-1]] = config[name]
    return _check(body, _without_prompt(family))


def _without_prompt(family: Family) -> dict[str, Field]:
    """Return the fields of a body, none required, with no bound to the answer by default."""
    fields = {
        name: replace(field, required=False)
        for name, field in family.fields.items()
        if name not in family.prompt_keys
    }
    *parents, last = family.inference["maxTokens"]
    inner = fields
    for key in parents:
        below = dict(inner[key].fields or {})
        inner[key] = replace(inner[key], fields=below)
        inner = below
    inner[last] = replace(inner[last], default=None)
    return fields


def _check(value: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    try:
        return check(value, fields)
    except ValidationException as error:
        raise ValidationException(
            f"The model returned the following errors: {error.message}"
        ) from None


def _refuse_additional(reason: str) -> NoReturn:
    raise ValidationException(f"{reason}. Change additionalModelRequestFields and try again.")


def _pointer(path: str, place: int) -> list[str]:
    """Return the parts of a JSON pointer. Source: RFC 6901."""
    rest = path.replace("~0", "").replace("~1", "")
    if not path.startswith("/") or len(path) < 2 or "~" in rest:
        raise ValidationException(
            f"additionalModelResponseFieldPaths.{place} is {path[:100]!r}, which is not a JSON "
            "pointer such as /stop_sequence."
        )
    return [part.replace("~1", "/").replace("~0", "~") for part in path[1:].split("/")]


def _child(value: Any, part: str) -> tuple[Any, bool]:
    if isinstance(value, dict) and part in value:
        return value[part], True
    if isinstance(value, list) and _INDEX.fullmatch(part) and int(part) < len(value):
        return value[int(part)], True
    return None, False
