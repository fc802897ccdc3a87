"""Tools in bodies: what may be called, calls and their results in turns, and the choice.

Converse and Nova have one form, Claude another; both become `ToolUse` and messages with calls. A
result is a message of its own, before the text of the turn that it came in.

Source: API reference, "ToolConfiguration", "ToolUseBlock", "ToolResultBlock"; user guide, "Tool
use" for Claude; the texts of the refusals are those of the live service where it has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outcrop.data.records import BETWEEN_BLOCKS, Message, Tool, ToolCall
from outcrop.errors import ValidationException
from outcrop.serve.prompt_formats.native import BlockPart, Choice, ToolUse
from outcrop.serve.prompt_formats.schema import Field, Fields, check, refuse
from outcrop.serve.request import Generation

NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
"""Source: pattern and length of toolSpec.name."""
TOOL_USE, TOOL_RESULT = "toolUse", "toolResult"
ERROR = "Error: "
"""What a result begins with whose tool has failed: templates have no other sign for it."""
_SPEC: Fields = {
    "name": Field("string", required=True),
    "description": Field("string", ""),
    "inputSchema": Field("object", required=True, fields={"json": Field("object", required=True)}),
    "strict": Field("boolean", False),
}
_CONFIG: Fields = {
    "tools": Field("objects", required=True, minimum=1),
    "toolChoice": Field("object"),
}
_CHOICES: Mapping[str, Choice] = {"auto": "auto", "any": "any", "tool": "tool"}
_USE: Fields = {
    "toolUseId": Field("string", required=True, minimum=1),
    "name": Field("string", required=True, minimum=1),
    "input": Field("object", required=True),
}
_RESULT: Fields = {
    "toolUseId": Field("string", required=True, minimum=1),
    "content": Field("objects", required=True),
    "status": Field("string", "success", enum=("success", "error")),
    "type": Field("string"),
}


@dataclass(frozen=True)
class Turn:
    """One turn, with what it says of tools."""

    role: str
    text: str
    calls: tuple[ToolCall, ...] = ()
    results: tuple[Message, ...] = ()


def tool_config(value: Mapping[str, Any], path: str) -> ToolUse:
    """Read the toolConfig of Converse or of a body of Nova.

    Raises:
        ValidationException: names what is wrong, or what a plain model cannot keep.
    """
    checked = check(value, _CONFIG, f"#/{path}")
    tools = []
    for place, item in enumerate(checked["tools"]):
        if set(item) == {"cachePoint"}:
            continue  # it changes what a prompt costs on Bedrock, never the answer
        if set(item) != {"toolSpec"} or not isinstance(item["toolSpec"], dict):
            raise ValidationException(
                f"{path}.tools.{place} has {', '.join(sorted(item)) or 'nothing'}; this model "
                "takes a toolSpec object there."
            )
        spec = check(item["toolSpec"], _SPEC, f"#/toolConfig/tools/{place}/toolSpec")
        if spec["strict"]:
            raise ValidationException(
                f"This model doesn't support the {path}.tools.{place}.toolSpec.strict field. "
                "Remove it and try again."
            )
        schema = spec["inputSchema"]["json"]
        tools.append(Tool(spec["name"], spec["description"], schema))
    choice = checked["toolChoice"] or {"auto": {}}
    name = next(iter(choice))
    if len(choice) != 1 or name not in _CHOICES:
        raise ValidationException(
            f"{path}.toolChoice has {', '.join(sorted(choice))}; it takes one of auto, any and "
            "tool."
        )
    wanted = choice[name].get("name") if isinstance(choice[name], dict) else None
    return tool_use(tools, _CHOICES[name], str(wanted or ""), path)


def tool_use(tools: Sequence[Tool], choice: Choice, wanted: str, path: str) -> ToolUse:
    """Return what is asked with tools, once names fit together.

    Args:
        wanted: the tool that must be called, where the choice is "tool".
    Raises:
        ValidationException: a name is none, or there twice, or the wanted tool is not there.
    """
    names: set[str] = set()
    for tool in tools:
        if not NAME.fullmatch(tool.name):
            raise ValidationException(
                f"{path} has a tool with the name {tool.name[:80]!r}; a name has 1 to 64 letters, "
                "digits, underscores and hyphens."
            )
        if tool.name in names:
            raise ValidationException(
                f"{path} has two tools with the name {tool.name}. Give each a name of its own."
            )
        names.add(tool.name)
    if choice == "tool" and wanted not in names:
        raise ValidationException(
            f"{path} wants the tool {wanted[:80]!r} to be called, which is not among its tools."
        )
    return ToolUse(tuple(tools), choice, wanted if choice == "tool" else "")


def _call(value: Any, path: str) -> ToolCall:
    """Read a toolUse block."""
    if not isinstance(value, dict):
        refuse(f"{path}: expected type: JSONObject")
    use = check(value, _USE, path)
    return ToolCall(use["toolUseId"], use["name"], use["input"])


def _result(value: Any, path: str) -> Message:
    """Read a toolResult block.

    Raises:
        ValidationException: it holds anything but text and JSON.
    """
    if not isinstance(value, dict):
        refuse(f"{path}: expected type: JSONObject")
    result = check(value, _RESULT, path)
    texts = []
    for place, block in enumerate(result["content"]):
        if set(block) == {"text"} and isinstance(block["text"], str):
            texts.append(block["text"])
        elif set(block) == {"json"}:
            texts.append(json.dumps(block["json"], ensure_ascii=False))
        else:
            kind = ", ".join(sorted(block))[:80] or "nothing"
            raise ValidationException(
                f"This model doesn't support the content {kind} of a tool result. It is at "
                f"{path}.content.{place}. Use text or json."
            )
    return result_of(result["toolUseId"], texts, failed=result["status"] == "error")


def speaks_of_tools(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a conversation of Converse or Nova has calls or results."""
    return any(
        TOOL_USE in block or TOOL_RESULT in block
        for message in messages
        for block in message["content"]
    )


def converse_turn(
    turn: Mapping[str, Any], path: str, text_of: Callable[[Mapping[str, Any], str], str]
) -> Turn:
    """Read a turn of Converse or Nova that may have calls of an assistant or results of a user.

    Args:
        text_of: (block, where it is) -> its text, or refuses it.
    """
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for place, block in enumerate(turn["content"]):
        here = f"{path}.{place}"
        if TOOL_USE in block and turn["role"] == "assistant":
            calls.append(_call(block[TOOL_USE], here))
        elif TOOL_RESULT in block and turn["role"] == "user":
            results.append(_result(block[TOOL_RESULT], here))
        elif TOOL_USE in block or TOOL_RESULT in block:
            raise ValidationException(
                f"The {next(iter(block))} block at {here} cannot be in a message of the role "
                f"{turn['role']}. Calls are the assistant's, results the user's."
            )
        else:
            texts.append(text_of(block, here))
    return Turn(turn["role"], BETWEEN_BLOCKS.join(texts), tuple(calls), tuple(results))


def converse_content(generation: Generation) -> list[dict[str, Any]]:
    """Return the content blocks of an answer in Converse's form."""
    return [
        {"text": item}
        if isinstance(item, str)
        else {
            TOOL_USE: {
                "toolUseId": item.id,
                "name": item.name,
                "input": dict(item.arguments),
            }
        }
        for item in generation.content or (generation.text,)
    ]


def converse_block_events(parts: Sequence[BlockPart]) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, value) of the events that show more of an answer in Converse's form."""
    found: list[tuple[str, dict[str, Any]]] = []
    for part in parts:
        index = {"contentBlockIndex": part.index}
        if part.call is not None:
            start = {TOOL_USE: {"toolUseId": part.call.id, "name": part.call.name}}
            given = json.dumps(part.call.arguments, ensure_ascii=False)
            found.append(("contentBlockStart", {"start": start, **index}))
            delta: dict[str, Any] = {TOOL_USE: {"input": given}}
            found.append(("contentBlockDelta", {"delta": delta, **index}))
        elif part.text:
            found.append(("contentBlockDelta", {"delta": {"text": part.text}, **index}))
        if part.is_end:
            found.append(("contentBlockStop", index))
    return found


def result_of(call_id: str, texts: Sequence[str], *, failed: bool) -> Message:
    """Return the message of a call's result."""
    text = BETWEEN_BLOCKS.join(texts)
    return Message("tool", ERROR + text if failed else text, call_id=call_id)


def tool_messages(turns: Sequence[Turn], system: str, path: str) -> tuple[Message, ...]:
    """Return the messages of a conversation in which tools were called.

    Args:
        turns: of which no two that follow each other are of one role, from the user's on.
    Raises:
        ValidationException: results do not belong to the calls of the turn before, a turn is empty,
            or the last turn is a call.
    """
    messages = [Message("system", system)] if system else []
    waiting: dict[str, ToolCall] = {}
    for place, turn in enumerate(turns):
        here = f"{path}.{place}.content"
        given = [result.call_id for result in turn.results]
        missing = [name for name in waiting if name not in given]
        if missing:
            raise ValidationException(
                f"Expected toolResult blocks at {here} for the following Ids: {', '.join(missing)}"
            )
        if len(given) != len(waiting) or set(given) != set(waiting):
            raise ValidationException(
                f"The number of toolResult blocks at {here} exceeds the number of toolUse blocks "
                "of previous turn."
            )
        waiting = {call.id: call for call in turn.calls}
        if len(waiting) != len(turn.calls):
            raise ValidationException(f"Two toolUse blocks at {here} have one toolUseId.")
        messages += turn.results
        if turn.text or turn.calls:
            messages.append(Message(turn.role, turn.text, turn.calls))
        elif not turn.results:
            raise ValidationException(f"The content at {here} is empty. Add a text or a tool's.")
    if waiting:
        raise ValidationException(
            f"The conversation ends with toolUse blocks for the following Ids: "
            f"{', '.join(waiting)}. Add a user message with their toolResult blocks."
        )
    return tuple(messages)


def join_tool_turns(turns: Sequence[Turn]) -> list[Turn]:
    """Join turns of one role that follow each other, as Anthropic's API does."""
    joined: list[Turn] = []
    for turn in turns:
        if joined and joined[-1].role == turn.role:
            before = joined.pop()
            text = "\n".join(text for text in (before.text, turn.text) if text)
            turn = Turn(turn.role, text, before.calls + turn.calls, before.results + turn.results)
        joined.append(turn)
    return joined
