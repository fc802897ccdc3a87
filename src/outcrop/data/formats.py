"""Turn the JSON object of one line into a record of messages, or a document of raw text.

Formats are named as in the catalogue: `prompt-completion`, `conversation` (Converse),
`claude-messages`, and `continued-pre-training` for documents. All are text only. A line in a format
that the job does not take is refused under its own name. Each rule is a function and has one code.

Source: Bedrock user guide, "Prepare data for fine-tuning"; its error texts come first in messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outcrop.data.markup import parse_prompt
from outcrop.data.read import kind_of
from outcrop.data.records import BETWEEN_BLOCKS, Document, Message, Record
from outcrop.errors import DataError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, DOCUMENTS, FINE_TUNING

PROMPT_COMPLETION = "prompt-completion"
CONVERSATION = "conversation"
CLAUDE_MESSAGES = "claude-messages"
SCHEMA_VERSION = "bedrock-conversation-2024"

_FORMS = {
    PROMPT_COMPLETION: '{"prompt": "<input text>", "completion": "<output text>"}',
    CONVERSATION: (
        '{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "..."}], "messages": '
        '[{"role": "user", "content": [{"text": "..."}]}, '
        '{"role": "assistant", "content": [{"text": "..."}]}]}'
    ),
    CLAUDE_MESSAGES: (
        '{"system": "...", "messages": [{"role": "user", "content": "..."}, '
        '{"role": "assistant", "content": "..."}]}'
    ),
    DOCUMENTS: '{"input": "<raw text>"}',
}
_NAMES = {
    PROMPT_COMPLETION: "a prompt/completion record",
    CONVERSATION: "a Converse conversation",
    CLAUDE_MESSAGES: "a Claude conversation",
    DOCUMENTS: "continued pre-training data",
    "image-caption": "image-caption data",
    "open-ai-chat": "reinforcement fine-tuning data in OpenAI's chat form",
}
_FOREIGN_KEYS = {"input", "messages", "schemaVersion", "image-ref"}
"""What belongs to the other formats."""

# White space to Unicode, and what shows as nothing: zero-width characters and the byte-order mark.
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"


@dataclass(frozen=True)
class _Place:
    """Where a value stands, for messages."""

    file: str
    line: int
    format: str

    def refuse(self, code: str, reason: str) -> DataError:
        return DataError(
            f"Input data at {self.file} must follow '{_FORMS[self.format]}' format. "
            f"Line {self.line}: {reason}",
            code=code,
            file=self.file,
            line=self.line,
        )


def parse_record(
    value: Mapping[str, Any],
    formats: Sequence[str],
    file: str,
    line: int,
    *,
    body_family: str = "",
) -> Record:
    """Understand one line of labelled data.

    Args:
        formats: those the model takes, the preferred first; at least one.
        body_family: whose mark-up a prompt may be written in, as in `markup.parse_prompt`.
    Raises:
        DataError: the line is in another format or breaks a rule of its own.
    """
    found = _recognize(value)
    if found is None:
        raise _wrong_keys(value, _Place(file, line, formats[0]))
    if found not in formats:
        hint = (
            f" Raw text is for jobs of customizationType {CONTINUED_PRE_TRAINING}."
            if found == DOCUMENTS
            else ""
        )
        raise _Place(file, line, formats[0]).refuse(
            "mixed_schema", f"This looks like {_NAMES[found]}.{hint}"
        )
    place = _Place(file, line, found)
    if found == PROMPT_COMPLETION:
        messages = _pair(value, place, body_family)
    elif found == CONVERSATION:
        messages = _conversation(value, place)
    else:
        messages = _claude(value, place)
    return Record(messages, file, line)


def parse_document(value: Mapping[str, Any], file: str, line: int) -> Document:
    """Understand one line of raw text.

    Raises:
        DataError: the line is in another format or breaks a rule of its own.
    """
    place = _Place(file, line, DOCUMENTS)
    found = _recognize(value)
    if found is None:
        raise _wrong_keys(value, place)
    if found != DOCUMENTS:
        raise place.refuse(
            "mixed_schema",
            f"This looks like {_NAMES[found]}. Labelled records are for jobs of customizationType "
            f"{FINE_TUNING}.",
        )
    _refuse_extra_keys(value, {"input"}, place)
    return Document(_text(value["input"], "input", place, empty_code="empty_input"), file, line)


def _recognize(value: Mapping[str, Any]) -> str | None:
    """Return the format a line is meant in, by its keys."""
    keys = set(value)
    if keys & {"prompt", "completion"}:
        return PROMPT_COMPLETION
    if "messages" in keys:
        return _recognize_messages(value)
    if "schemaVersion" in keys:
        return CONVERSATION
    if "input" in keys:
        return DOCUMENTS
    if "image-ref" in keys:
        return "image-caption"
    return None


def _recognize_messages(value: Mapping[str, Any]) -> str:
    if "schemaVersion" in value or isinstance(value.get("system"), list):
        return CONVERSATION
    if "reference_answer" in value:
        return "open-ai-chat"
    messages = value["messages"]
    first = messages[0] if isinstance(messages, list) and messages else None
    content = first.get("content") if isinstance(first, dict) else None
    return CONVERSATION if isinstance(content, list) else CLAUDE_MESSAGES


def _wrong_keys(value: Mapping[str, Any], place: _Place) -> DataError:
    names = ", ".join(ascii(name[:40]) for name in list(value)[:5]) or "none"
    return place.refuse("wrong_keys", f"Its keys are {names}.")


def _pair(value: Mapping[str, Any], place: _Place, body_family: str) -> tuple[Message, ...]:
    others = _FOREIGN_KEYS & set(value)
    if others:
        raise place.refuse(
            "mixed_schema", f"It mixes prompt/completion with {', '.join(sorted(others))}."
        )
    known = ("prompt", "completion")
    for key in known:
        if key not in value:
            if not set(value) <= set(known):
                raise _wrong_keys(value, place)
            raise place.refuse(f"missing_{key}", f"It has no {key}.")
    _refuse_extra_keys(value, set(known), place)
    prompt = _text(value["prompt"], "prompt", place, empty_code="empty_prompt")
    completion = _text(value["completion"], "completion", place, empty_code="empty_completion")
    messages = parse_prompt(body_family, prompt)
    if messages[-1].role == "assistant":
        # The prompt begins the answer itself; what the model shall write still starts after it.
        raise place.refuse(
            "role_order", "The prompt's mark-up ends inside an answer, not with a user's turn."
        )
    return (*messages, Message("assistant", completion))


def _conversation(value: Mapping[str, Any], place: _Place) -> tuple[Message, ...]:
    if "schemaVersion" not in value:
        raise place.refuse("missing_schema_version", "It has no schemaVersion.")
    version = value["schemaVersion"]
    if version != SCHEMA_VERSION:
        shown = ascii(version[:60]) if isinstance(version, str) else kind_of(version)
        raise place.refuse("bad_schema_version", f"schemaVersion is {shown}.")
    _refuse_extra_keys(value, {"schemaVersion", "system", "messages"}, place)
    messages = []
    if "system" in value:
        messages.append(Message("system", _blocks(value["system"], "system", place)))
    for index, turn in enumerate(_turns(value, place)):
        where = f"messages[{index}].content"
        messages.append(Message(turn["role"], _blocks(turn["content"], where, place)))
    return tuple(messages)


def _claude(value: Mapping[str, Any], place: _Place) -> tuple[Message, ...]:
    _refuse_extra_keys(value, {"system", "messages"}, place)
    messages = []
    if "system" in value:
        messages.append(Message("system", _text(value["system"], "system", place)))
    for index, turn in enumerate(_turns(value, place)):
        where = f"messages[{index}].content"
        messages.append(Message(turn["role"], _text(turn["content"], where, place)))
    return tuple(messages)


def _turns(value: Mapping[str, Any], place: _Place) -> list[dict[str, Any]]:
    """Return the turns, which begin with the user's, alternate, and end with the assistant's."""
    if "messages" not in value:
        raise place.refuse("missing_messages", "It has no messages.")
    turns = value["messages"]
    if not isinstance(turns, list):
        raise place.refuse("wrong_type", f"messages must be an array, not {kind_of(turns)}.")
    if not turns:
        raise place.refuse("empty_messages", "messages is empty.")
    for index, turn in enumerate(turns):
        _check_turn(turn, f"messages[{index}]", place)
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn["role"] != expected:
            raise place.refuse(
                "role_order",
                f"messages[{index}] is the {turn['role']}'s. Turns alternate from the user's on, "
                f"so it must be the {expected}'s.",
            )
    if turns[-1]["role"] != "assistant":
        raise place.refuse("role_order", "The last message is not the assistant's.")
    return turns


def _check_turn(turn: object, where: str, place: _Place) -> None:
    if not isinstance(turn, dict):
        raise place.refuse("wrong_type", f"{where} must be an object, not {kind_of(turn)}.")
    if "role" not in turn:
        raise place.refuse("missing_role", f"{where} has no role.")
    if turn["role"] not in ("user", "assistant"):
        role = turn["role"]
        shown = ascii(role[:40]) if isinstance(role, str) else kind_of(role)
        raise place.refuse("bad_role", f"{where}.role is {shown}; it is user or assistant.")
    if "content" not in turn:
        raise place.refuse("missing_content", f"{where} has no content.")
    _refuse_extra_keys(turn, {"role", "content"}, place, where)


def _blocks(value: object, where: str, place: _Place) -> str:
    """Return the text of content blocks; several are joined by an empty line."""
    if not isinstance(value, list):
        raise place.refuse("wrong_type", f"{where} must be an array, not {kind_of(value)}.")
    if not value:
        code = "empty_system" if where == "system" else "empty_content"
        raise place.refuse(code, f"{where} is empty.")
    return BETWEEN_BLOCKS.join(
        _block(block, f"{where}[{index}]", place) for index, block in enumerate(value)
    )


def _block(block: object, where: str, place: _Place) -> str:
    if not isinstance(block, dict):
        raise place.refuse("wrong_type", f"{where} must be an object, not {kind_of(block)}.")
    if "text" not in block:
        names = ", ".join(ascii(name[:40]) for name in list(block)[:5]) or "nothing"
        raise place.refuse(
            "unsupported_block", f"{where} holds {names}; only text is taken for this model."
        )
    _refuse_extra_keys(block, {"text"}, place, where)
    return _text(block["text"], f"{where}.text", place)


def _text(value: object, where: str, place: _Place, *, empty_code: str = "empty_content") -> str:
    """Return a text that shows something and can be encoded."""
    if not isinstance(value, str):
        raise place.refuse("wrong_type", f"{where} must be a string, not {kind_of(value)}.")
    if not value.translate(_NOTHING).strip():
        raise place.refuse(empty_code, f"{where} is empty.")
    if "\0" in value:
        raise place.refuse("null_byte", f"{where} holds a NUL character.")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise place.refuse("lone_surrogate", f"{where} holds half of a surrogate pair.")
    return value


def _refuse_extra_keys(
    value: Mapping[str, Any], known: set[str], place: _Place, where: str = "It"
) -> None:
    extra = [name for name in value if name not in known]
    if extra:
        names = ", ".join(ascii(name[:40]) for name in extra[:5])
        raise place.refuse("extra_keys", f"{where} has further keys: {names}. Take them out.")


_NOTHING = str.maketrans(dict.fromkeys(_INVISIBLE, ""))
