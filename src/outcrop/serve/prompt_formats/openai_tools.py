"""Tools in OpenAI-style chats: the functions that there are, calls in messages, calls in answers.

Knows neither HTTP nor templates.

Source: OpenAI API Reference, "Create chat completion": `tools`, `tool_choice`, `tool_calls`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NoReturn

from outcrop.data.records import Message, Tool, ToolCall
from outcrop.errors import ApiError, ValidationException
from outcrop.serve.prompt_formats.native import ToolUse
from outcrop.serve.prompt_formats.tools import tool_use
from outcrop.serve.request import Generation
from outcrop.wire.document import describe, read_json_object, shorten

ID_PREFIX = "call_"
CHOICES = {"none": "none", "auto": "auto", "required": "any"}


def parse_tools(left: dict[str, Any]) -> ToolUse | None:
    """Take `tools`, `tool_choice` and `parallel_tool_calls` out of a body; None without tools.

    Raises:
        ValidationException: one of them is not understood, or cannot be kept; names it.
    """
    if not left.get("tools"):
        return None  # what is left of them is refused where it asks for something
    listed = left.pop("tools")
    if not isinstance(listed, list):
        _refuse("tools", f"must be a list, not {describe(listed)}.")
    tools = [_tool(item, f"tools[{place}]") for place, item in enumerate(listed)]
    if left.pop("parallel_tool_calls", True) is not True:
        _refuse("parallel_tool_calls", "can only be true: an answer may have several calls.")
    choice, wanted = _choice(left.pop("tool_choice", "auto"))
    try:
        found = tool_use(tools, choice, wanted, "tools")
    except ValidationException as error:
        raise ValidationException(error.message, members=_members("tools")) from None
    return ToolUse(found.tools, found.choice, found.tool, ID_PREFIX)


def parse_calls(value: Any, path: str) -> tuple[ToolCall, ...]:
    """Read the `tool_calls` of an assistant's message.

    Raises:
        ValidationException: they are not calls of functions with an object in JSON each.
    """
    if not isinstance(value, list):
        _refuse(path, f"must be a list, not {describe(value)}.")
    calls = []
    for place, item in enumerate(value):
        here = f"{path}[{place}]"
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict) or item.get("type", "function") != "function":
            _refuse(here, "must be an object with id, type 'function' and function.")
        texts = (item.get("id"), function.get("name"), function.get("arguments"))
        if not all(isinstance(text, str) for text in texts) or not texts[0]:
            _refuse(here, "must have the strings id, function.name and function.arguments.")
        try:
            given = read_json_object(str(texts[2]).encode("utf-8", "surrogatepass"))
        except ApiError as error:
            _refuse(f"{here}.function.arguments", f"must be an object in JSON. {error.message}")
        calls.append(ToolCall(str(texts[0]), str(texts[1]), given))
    return tuple(calls)


def join_messages(said: Sequence[Message]) -> tuple[Message, ...]:
    """Join texts of one role that follow each other, and check that each call has its result.

    Raises:
        ValidationException: a result belongs to no call before it, or a call has none.
    """
    joined: list[Message] = []
    waiting: list[str] = []
    for (role, is_plain), group in groupby(said, key=lambda one: (one.role, not one.calls)):
        messages = list(group)
        if role == "tool":
            for message in messages:
                if message.call_id not in waiting:
                    _refuse(
                        "messages",
                        f"have a result of {message.call_id!r}, which was not "
                        "called in the assistant's message before.",
                    )
                waiting.remove(str(message.call_id))
            joined += messages
            continue
        if waiting:
            _refuse(
                "messages",
                f"lack the result of {waiting[0]!r}, in a message of the role "
                "'tool' after the assistant's.",
            )
        if is_plain:
            joined.append(Message(role, "\n".join(message.text for message in messages)))
            continue
        if len(messages) > 1:
            _refuse("messages", "have calls in two messages that follow each other.")
        waiting = [call.id for call in messages[0].calls]
        joined += messages
    if waiting:
        _refuse("messages", f"lack the result of {waiting[0]!r}.")
    return tuple(joined)


def message(generation: Generation) -> dict[str, Any]:
    """Return the members of an answer's message besides its role."""
    calls = answered_calls(generation)
    found: dict[str, Any] = {
        "content": generation.text if generation.text or not calls else None,
        "refusal": None,
    }
    return {**found, "tool_calls": calls} if calls else found


def answered_calls(generation: Generation) -> list[dict[str, Any]]:
    """Return the calls of an answer."""
    return [
        {
            "id": item.id,
            "type": "function",
            "function": {
                "name": item.name,
                "arguments": json.dumps(item.arguments, ensure_ascii=False),
            },
        }
        for item in generation.content
        if not isinstance(item, str)
    ]


def _tool(item: Any, path: str) -> Tool:
    if not isinstance(item, dict) or item.get("type") != "function":
        _refuse(path, "must be an object of the type 'function'.")
    function = item.get("function")
    if not isinstance(function, dict):
        _refuse(f"{path}.function", f"must be an object, not {describe(function)}.")
    known = {"name", "description", "parameters", "strict"}
    for name in sorted(function.keys() - known):
        _refuse(f"{path}.function.{shorten(name)}", "is not known.")
    if function.get("strict"):
        _refuse(f"{path}.function.strict", "can only be false: nothing is drawn by a schema.")
    name, description = function.get("name"), function.get("description") or ""
    parameters = function.get("parameters")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    if not isinstance(name, str) or not isinstance(description, str):
        _refuse(f"{path}.function", "must have a string name; its description is a string too.")
    if not isinstance(parameters, dict):
        _refuse(f"{path}.function.parameters", f"must be an object, not {describe(parameters)}.")
    return Tool(name, description, parameters)


def _choice(value: Any) -> tuple[Any, str]:
    if isinstance(value, str) and value in CHOICES:
        return CHOICES[value], ""
    function = value.get("function") if isinstance(value, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return "tool", function["name"]
    _refuse("tool_choice", "must be 'none', 'auto', 'required' or name one function.")


def _members(param: str) -> dict[str, Any]:
    return {"param": param, "code": "invalid_value"}


def _refuse(param: str, what: str) -> NoReturn:
    raise ValidationException(f"'{param}' {what}", members=_members(param))
