"""Rules that look at the texts of one record: what is in them that should not be.

A rule takes a record's texts and returns what it found, or None. None changes anything.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from ftfy.badness import badness

from outcrop.data.defects import Finding, Severity, shown
from outcrop.data.html import find_html


@dataclass(frozen=True, slots=True)
class Texts:
    """What a record says, as text."""

    prompt: str
    """All before the answer to be learnt; the whole text of a document."""
    completion: str | None
    """The answer to be learnt; None for a document, and for a prompt without an answer."""
    is_document: bool = False

    @property
    def named(self) -> tuple[tuple[str, str], ...]:
        """(what it is, text), for messages."""
        if self.is_document:
            return (("input", self.prompt),)
        if self.completion is None:
            return (("prompt", self.prompt),)
        return (("prompt", self.prompt), ("completion", self.completion))


# -- html


def html(texts: Texts) -> Finding | None:
    """HTML tags, comments or entities."""
    for name, text in texts.named:
        found = find_html(text)
        if found is not None:
            start, end = found
            value = shown(text[start:end])
            message = f"{name} holds HTML at character {start + 1}: {value}."
            return Finding("html", Severity.REPAIR, message, value)
    return None


# -- encodings

REPLACEMENT = "\ufffd"


def mojibake(texts: Texts) -> Finding | None:
    """Text that was read in a wrong encoding, or from which bytes were lost."""
    for name, text in texts.named:
        if text.isascii():
            continue
        if badness(text.replace(REPLACEMENT, " ")):
            return Finding(
                "mojibake",
                Severity.REPAIR,
                f"{name} looks as if it had been read in a wrong encoding.",
                shown(_around_first(text, _NOT_ASCII)),
            )
        place = text.find(REPLACEMENT)
        if place >= 0:
            return Finding(
                "mojibake",
                Severity.REVIEW,
                f"{name} holds U+FFFD at character {place + 1}: what stood there is lost.",
                shown(text[max(place - 20, 0) : place + 20]),
            )
    return None


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _around_first(text: str, pattern: re.Pattern[str]) -> str:
    found = pattern.search(text)
    place = found.start() if found else 0
    return text[max(place - 10, 0) : place + 30]


# -- characters that do not show

_ASCII_CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
# The characters of a zero-width joiner's scripts: there it has a meaning, as between two emoji.
_JOINING = "\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff\u200d\u2600-\u27bf\ufe0f"
_JOINING += "\U0001f000-\U0001faff"
_ALSO_OF_MOJIBAKE = frozenset(map(chr, (*range(0x80, 0xA1), 0xAD)))
"""What a wrong encoding makes of bytes; where it did, that is the defect."""
_HIDDEN = re.compile(
    r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u180e\u200b\u200e\u200f\u2028\u2029\u202a-\u202e"
    r"\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]"
    rf"|(?<![{_JOINING}])[\u200c\u200d]|[\u200c\u200d](?![{_JOINING}])"
    # Fixed spaces: right before French marks, after an opening one, and inside numbers.
    r"|(?<!«)[\u00a0\u202f](?![;:!?»%€$£°])(?!(?<=\d.)\d)|[\u1680\u2000-\u2008\u200a\u205f]"
    r"|\u2009(?!(?<=\d.)\d)"
)


def control_characters(texts: Texts) -> Finding | None:
    """Characters that do not show: controls, zero-width, direction marks, separators."""
    for name, text in texts.named:
        if text.isascii():
            found = _ASCII_CONTROL.search(text)
        else:
            found = _HIDDEN.search(text)
            if found and found[0] in _ALSO_OF_MOJIBAKE and badness(text):
                found = None
        if found:
            character = found[0]
            called = unicodedata.name(character, "a control character")
            return Finding(
                "control_characters",
                Severity.REPAIR,
                f"{name} holds U+{ord(character):04X} ({called}) at character {found.start() + 1}.",
                f"U+{ord(character):04X}",
            )
    return None


def stray_whitespace(texts: Texts) -> Finding | None:
    """White space that begins or ends a text and says nothing.

    One space or one line end is a convention: before a completion, after a prompt, at the end of a
    document. So is the wide space with which a Japanese paragraph begins.
    """
    for name, text in texts.named:
        start = len(text) - len(text.removeprefix("\u3000").lstrip())
        start -= text.startswith("\u3000")
        end = len(text) - len(text.rstrip())
        # Two line ends before or after are a separator; more than one kind is chance.
        if start > (1 if name == "completion" else 0) or (end > 1 and not _is_separator(text, end)):
            which = "begins" if start > 1 or (start and name != "completion") else "ends"
            return Finding(
                "stray_whitespace",
                Severity.REPAIR,
                f"{name} {which} with {start if which == 'begins' else end} characters of white "
                "space.",
            )
    return None


def _is_separator(text: str, end: int) -> bool:
    return end == 2 and text.endswith("\n\n")


# -- completions

# What people write where an answer is still to come; in any case, with any punctuation.
_PLACEHOLDERS = frozenset(
    (
        *("n/a", "na", "tbd", "tba", "tbc", "todo", "to do", "fixme", "xxx", "null", "nil"),
        *("undefined", "placeholder", "to be done", "to be determined", "lorem ipsum"),
        *("insert text here", "your text here", "nan"),
    )
)
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm", "qwertzuiop", "azertyuiop", "1234567890")
_RUNS = frozenset(
    row[start : start + 4] for row in _ROWS for start in range(len(row) - 3) if row.isalpha()
)
MAX_NOISE_CHARACTERS = 200


def low_information(texts: Texts) -> Finding | None:
    """A completion that says nothing: punctuation, a placeholder, keyboard noise."""
    text = texts.completion
    if text is None or len(text) > MAX_NOISE_CHARACTERS:
        return None
    bare = text.strip()
    what = ""
    if bare.casefold().strip(".!:[]<>(){}*_ ") in _PLACEHOLDERS:
        what = "a placeholder"
    elif not any(character.isalnum() for character in bare) and not _has_symbol(bare):
        what = "punctuation only"
    elif _is_noise(bare.casefold()):
        what = "keyboard noise"
    if not what:
        return None
    return Finding(
        "low_information", Severity.REVIEW, f"completion is {what}: {shown(bare)}.", shown(bare)
    )


def _has_symbol(text: str) -> bool:
    """Return whether an emoji or another sign is there that can be an answer."""
    return any(unicodedata.category(character)[0] == "S" for character in text)


def _is_noise(text: str) -> bool:
    words = text.split()
    if len(words) >= 3 and len(set(words)) == 1:
        return words[0].isalpha()
    return bool(words) and all(
        any(word[place : place + 4] in _RUNS for place in range(len(word) - 3)) for word in words
    )


MIN_REPEATED_CHARACTERS = 20
"""A shorter prompt may well begin its own answer."""


def completion_repeats_prompt(texts: Texts) -> Finding | None:
    """A completion that begins with the whole prompt, or is the prompt."""
    if texts.completion is None:
        return None
    prompt, completion = texts.prompt.strip(), texts.completion.strip()
    long_enough = len(prompt) >= MIN_REPEATED_CHARACTERS
    if completion == prompt or (long_enough and completion.startswith(prompt)):
        return Finding(
            "completion_repeats_prompt",
            Severity.REVIEW,
            "completion begins with the whole prompt.",
            shown(completion),
        )
    return None


# -- grounding

_OPEN, _CLOSE = "<context>", "</context>"
_LONG_WORD = re.compile(r"[^\W\d_]{5,}|\d{2,}")
MIN_SHARED_WORDS = 0.2
MIN_ANSWER_WORDS = 4


def ungrounded_answer(texts: Texts) -> Finding | None:
    """An answer that shares next to no words with the context its prompt gives."""
    if texts.completion is None or _OPEN not in texts.prompt:
        return None
    context = _contexts(texts.prompt).casefold()
    answer = set(_LONG_WORD.findall(texts.completion.casefold()))
    if not context.strip() or len(answer) < MIN_ANSWER_WORDS:
        return None
    shared = len(answer & set(_LONG_WORD.findall(context))) / len(answer)
    if shared >= MIN_SHARED_WORDS:
        return None
    return Finding(
        "ungrounded_answer",
        Severity.ADVICE,
        f"{shared:.0%} of the answer's longer words stand in its <context>; at least "
        f"{MIN_SHARED_WORDS:.0%} are expected.",
        shown(texts.completion.strip()),
    )


def _contexts(prompt: str) -> str:
    """Return what stands between the marks; in one pass, however many are never closed."""
    found, start = [], prompt.find(_OPEN)
    while start >= 0:
        end = prompt.find(_CLOSE, start)
        if end < 0:
            break
        found.append(prompt[start + len(_OPEN) : end])
        start = prompt.find(_OPEN, end)
    return " ".join(found)


RULES = (
    html,
    mojibake,
    control_characters,
    stray_whitespace,
    low_information,
    completion_repeats_prompt,
    ungrounded_answer,
)
