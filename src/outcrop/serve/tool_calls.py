"""Find the calls of tools in an answer's text, which comes in pieces.

Text before and between calls is released as soon as it cannot become one. A call is released whole,
once its JSON is complete and names a tool that there is. What only looks like a call stays text.
Where the text was cut into pieces makes no difference. Knows neither tokens nor bodies; imports no
torch.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias

from outcrop.data.records import ToolCall
from outcrop.errors import ApiError
from outcrop.models.templates import ToolFormat
from outcrop.wire.document import read_json

Found: TypeAlias = str | ToolCall
"""What an answer consists of."""

ARGUMENTS = ("arguments", "parameters")
"""Models mix up the two; neither can be taken for anything else."""
BETWEEN = " \t\r\n"
BETWEEN_CALLS = BETWEEN + ";,"
_decoder = json.JSONDecoder()


class CallScanner:
    """Takes an answer apart into text and calls."""

    def __init__(
        self, form: ToolFormat, names: Collection[str], new_id: Callable[[], str] | None = None
    ) -> None:
        """
        Args:
            names: of the tools that there are.
            new_id: makes the id of each call.
        """
        self._form = form
        self._names = frozenset(names)
        self._new_id = new_id or new_call_id
        self._held = ""
        self._opening = ""
        """What began the call that is being read: it is text again if there is none."""
        self._state: Literal["start", "text", "call", "after"] = "start"

    def add(self, text: str) -> list[Found]:
        """Take more of the answer and return what is certain by now."""
        self._held += text
        # JSON that is being read can only be complete where a bracket closes.
        reads_json = self._state == "call" and self._held.lstrip(BETWEEN)[:1] in ("{", "[")
        if reads_json and not any(bracket in text for bracket in "}]"):
            return []
        return joined(self._drain(final=False))

    def finish(self) -> list[Found]:
        """Return the rest; JSON that is not complete is text."""
        return joined(self._drain(final=True))

    def _drain(self, *, final: bool) -> list[Found]:
        found: list[Found] = []
        while self._held:
            steps = {
                "start": self._begin,
                "after": self._begin,
                "text": self._text,
                "call": self._call,
            }
            before = (self._state, len(self._held))
            found += steps[self._state](final)
            if before == (self._state, len(self._held)):
                break
        if final and self._state == "call":
            found.append(self._opening)
            self._opening, self._state = "", "text"
        return found

    def _begin(self, final: bool) -> list[Found]:
        """Look at what an answer, or what follows a call, begins with."""
        is_after = self._state == "after"
        bare = self._held.lstrip(BETWEEN_CALLS if is_after else BETWEEN)
        space = self._held[: len(self._held) - len(bare)]
        form = self._form
        if is_after and form.end and bare.startswith(form.end):
            self._held = bare[len(form.end) :]
        elif bare.startswith(form.marker):
            self._open(space + form.marker, bare[len(form.marker) :])
        elif form.is_bare and bare.startswith("{"):
            self._open(space, bare)
        elif not final and any(
            mark.startswith(bare) for mark in (form.marker, form.end if is_after else "")
        ):
            pass  # it may still become one
        elif not bare and (is_after or not final):
            self._held = "" if final else self._held
        else:
            self._state = "text"
            # Commas are what stands between calls, not the beginning of a text.
            self._held = self._held.lstrip(BETWEEN) if is_after else self._held
        return []

    def _text(self, final: bool) -> list[Found]:
        """Release what comes before a call, and hold back what may begin one."""
        marker = self._form.marker
        place = self._held.find(marker)
        if place < 0:
            keep = 0 if final else _may_begin(self._held, marker)
            head = self._held[: len(self._held) - keep]
            text = head if final else head.rstrip(BETWEEN)
            self._held = self._held[len(text) :]
            return [text] if text else []
        head = self._held[:place]
        text = head.rstrip(BETWEEN)
        self._open(head[len(text) :] + marker, self._held[place + len(marker) :])
        return [text] if text else []

    def _open(self, opening: str, rest: str) -> None:
        self._opening, self._held, self._state = opening, rest, "call"

    def _call(self, final: bool) -> list[Found]:
        bare = self._held.lstrip(BETWEEN)
        if not bare:
            return []
        end = _json_end(bare)
        if end is None and not final and bare[0] in "{[":
            return []
        calls = None if end is None else self._calls(bare[:end])
        if calls is None:  # no call: what began it is text, and what follows is looked at again
            opening, self._opening, self._state = self._opening, "", "text"
            return [opening] if opening else []
        self._held, self._opening, self._state = bare[end:], "", "after"
        return list(calls)

    def _calls(self, text: str) -> list[ToolCall] | None:
        """Return what a complete JSON value asks for; None where it is no call."""
        try:
            value = read_json(text.encode("utf-8"))
        except (ApiError, UnicodeEncodeError, RecursionError):
            return None
        values = value if isinstance(value, list) else [value]
        calls = [self._one(item) for item in values]
        known = [call for call in calls if call is not None]
        return known if known and len(known) == len(calls) else None

    def _one(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        given = next((value[key] for key in ARGUMENTS if key in value), None)
        return ToolCall(self._new_id(), name, given) if isinstance(given, dict) else None


def new_call_id(prefix: str = "tooluse_") -> str:
    """Return an id for a call, in the form of Bedrock's."""
    return prefix + secrets.token_urlsafe(16)


def scan(scanner: CallScanner, text: str) -> tuple[Found, ...]:
    """Take a whole answer apart."""
    return tuple(joined([*scanner.add(text), *scanner.finish()]))


def _json_end(text: str) -> int | None:
    """Return where the JSON value ends that a text begins with; None where it does not end."""
    if text[0] not in "{[":
        return None
    try:
        return _decoder.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def _may_begin(text: str, marker: str) -> int:
    """Length of the longest end of a text that a marker begins with."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


def joined(found: Sequence[Found]) -> list[Found]:
    """Put texts together that follow each other."""
    whole: list[Found] = []
    for item in found:
        last = whole[-1] if whole else None
        if isinstance(item, str) and isinstance(last, str):
            whole[-1] = last + item
        elif item:
            whole.append(item)
    return whole
