"""Mend the texts of one record, whatever its format, and take out keys that nobody reads.

Works on the JSON object; the object that is given stays as it is. Which damage is mended how is
`text.py`'s business. Bodies of other APIs (batch records, invocation logs) are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from outcrop.data import text
from outcrop.data.clean_log import Change, difference
from outcrop.data.defects import shown
from outcrop.data.formats import (
    BATCH_RECORDS,
    CLAUDE_MESSAGES,
    CONVERSATION,
    INVOCATION_LOGS,
    PROMPT_COMPLETION,
    meant_format,
)
from outcrop.models.catalog import DOCUMENTS

_KNOWN_KEYS: Mapping[str, frozenset[str]] = {
    PROMPT_COMPLETION: frozenset(("prompt", "completion")),
    DOCUMENTS: frozenset(("input",)),
    CONVERSATION: frozenset(("schemaVersion", "system", "messages")),
    CLAUDE_MESSAGES: frozenset(("system", "messages")),
}
"""Of the formats that are trained on; others may carry what only their owner knows."""
_MEANINGFUL: frozenset[str] = frozenset().union(
    *_KNOWN_KEYS.values(), ("image-ref", "recordId", "modelInput")
)
"""Keys by which a record may be meant in another format: then it is not for a cleaner to decide."""
_TEXT_KEYS = ("prompt", "completion", "input", "caption", "referenceResponse")
_OPAQUE = (BATCH_RECORDS, INVOCATION_LOGS)

_Path = tuple[str | int, ...]


def mend_record(
    value: dict[str, Any], formats: Sequence[str], repairs: Collection[str]
) -> tuple[dict[str, Any], list[Change]]:
    """Return the mended object and what was changed; the object itself where nothing was.

    Args:
        value: a line's object, which may break any rule.
        formats: those that are taken.
        repairs: of text.CODES.
    """
    found = meant_format(value, formats) or ""
    if found in _OPAQUE:
        return value, []
    mended = value
    changes: list[Change] = []
    known = _KNOWN_KEYS.get(found)
    if known is not None and known & value.keys():
        extra = [name for name in value if name not in known]
        if extra and not _MEANINGFUL & set(extra):
            mended = {name: held for name, held in value.items() if name in known}
            changes.append(Change("extra_keys", before=shown(", ".join(extra))))
    repaired: list[tuple[_Path, str]] = []
    for path in _text_places(mended):
        fixed, made = text.repair_text(
            _at(mended, path), repairs, keeps_leading_space=path[-1] == "completion"
        )
        for repair in made:
            before, after = difference(repair.before, repair.after)
            changes.append(Change(repair.code, _spelled(path), before, after))
        if made:
            repaired.append((path, fixed))
    if repaired:
        mended = copy.deepcopy(mended)
        for path, fixed in repaired:
            _at(mended, path[:-1])[path[-1]] = fixed
    return mended, changes


def _text_places(value: Mapping[str, Any]) -> Iterator[_Path]:
    """Yield the path of every text that is trained on."""
    for key in _TEXT_KEYS:
        if isinstance(value.get(key), str):
            yield (key,)
    yield from _content(value.get("system"), ("system",))
    messages = value.get("messages")
    for index, turn in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(turn, dict):
            yield from _content(turn.get("content"), ("messages", index, "content"))


def _content(value: object, path: _Path) -> Iterator[_Path]:
    """Yield the paths of a text, or of the texts of content blocks."""
    if isinstance(value, str):
        yield path
    for index, block in enumerate(value if isinstance(value, list) else ()):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            yield (*path, index, "text")


def _at(value: Any, path: _Path) -> Any:
    for step in path:
        value = value[step]
    return value


def _spelled(path: _Path) -> str:
    """Return a path as messages write it: `messages[0].content[1].text`."""
    spelled = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return spelled.removeprefix(".")
