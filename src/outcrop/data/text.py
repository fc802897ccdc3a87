"""Mend a text: each repair takes out one kind of damage and has the code of that defect.

Pure functions of one text. A repair that finds nothing returns the text as it is. What is repaired
never grows but by composing characters, and never becomes empty: a text of nothing but damage is
left to whoever decides about the record. Repairing twice is repairing once.

Quotes, widths, ligatures, line ends and signs that somebody may have meant are never touched.

Source: ftfy for encodings; Unicode Standard Annex 15 (normalization), 9 (direction marks), and
Unicode Technical Standard 51 (what joiners and tags mean in emoji).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection
from dataclasses import dataclass

import ftfy
from ftfy.badness import is_bad

from outcrop.data.html import remove_html

# Everything but what stands in _encoding is off: ftfy would also straighten quotes and widths.
_FTFY = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_encoding=True,
    restore_byte_a0=True,
    replace_lossy_sequences=True,
    decode_inconsistent_utf8=True,
    fix_c1_controls=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-Z\\-_]")
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
# Fixed spaces stay before French marks, after an opening one, and inside numbers.
_ODD_SPACES = re.compile(
    r"(?<!«)[\u00a0\u202f](?![;:!?»%€$£°])(?!(?<=\d.)\d)|[\u1680\u2000-\u2008\u200a\u205f]"
    r"|\u2009(?!(?<=\d.)\d)"
)
_INVISIBLE = re.compile(
    "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e"
    "\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff]"
)
# A flag such as England's is a black flag and tags; elsewhere tags hide text from people.
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007f]+)|[\U000e0000-\U000e007f]")
# Joiners have a meaning between two emoji and in the scripts that write them.
_JOINED = "[^\x00-\u05ff\u2000-\u206f\ufeff]"
_JOINER = re.compile(f"(?<={_JOINED})[\u200c\u200d](?={_JOINED})|([\u200c\u200d])")
_MAYBE_HIDDEN = re.compile(
    "[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\xa0\u00ad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180e"
    "\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U000e0000-\U000e007f]"
)

_MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Repair:
    """One kind of damage that was mended."""

    code: str
    """As in `defects.KINDS`."""
    before: str
    after: str


def repair_text(
    text: str, codes: Collection[str] | None = None, *, keeps_leading_space: bool = False
) -> tuple[str, list[Repair]]:
    """Mend a text.

    Args:
        codes: the repairs that are made, of CODES; None makes all of them.
        keeps_leading_space: whether one space at the beginning is a convention, as before a
            completion.
    Returns:
        (text, repairs): the repairs in the order they were made, each with the whole text before
        and after it; none where the text came back as it is.
    """
    repairs: list[Repair] = []
    for _ in range(_MAX_ROUNDS):
        before_round = text
        for code, repair in _REPAIRS.items():
            if codes is not None and code not in codes:
                continue
            if code == "stray_whitespace":
                mended = trim(text, keeps_leading_space=keeps_leading_space)
            else:
                mended = repair(text)
            if mended != text and shows_something(mended):
                repairs.append(Repair(code, text, mended))
                text = mended
        if text == before_round:
            break
    return text, repairs


def shows_something(text: str) -> bool:
    """Return whether a reader sees anything of a text."""
    return bool(_MAYBE_HIDDEN.sub("", text.replace("\0", "")).strip())


def join_surrogates(text: str) -> str:
    """Join halves of surrogate pairs that belong together; others become U+FFFD, one for one."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    text = _SURROGATE_PAIR.sub(
        lambda found: found[0].encode("utf-16", "surrogatepass").decode("utf-16"), text
    )
    return _SURROGATE.sub("\ufffd", text)


def remove_nul(text: str) -> str:
    """Take out NUL characters."""
    return text.replace("\0", "")


def mend_encoding(text: str) -> str:
    """Decode anew what was decoded in a wrong encoding, such as `cafÃ©`.

    Only sequences that make no sense in any language are taken for that. Bytes that were lost are
    shown as U+FFFD.
    """
    if text.isascii() or not is_bad(text):
        return text
    mended = ftfy.fix_text(text, _FTFY)
    # Some signs were never in the text: what mends one line must not make another worse.
    return mended if len(mended) <= len(text) else text


def remove_controls(text: str) -> str:
    """Take out characters that do not show: controls, zero-width, direction marks, hidden tags.

    Line and paragraph separators become line ends, fixed spaces ordinary ones but where French and
    numbers have them; the ideographic space stays. So do joiners inside emoji and in scripts that
    need them.
    """
    if not _MAYBE_HIDDEN.search(text):
        return text
    text = _TERMINAL.sub("", text)
    text = _LINE_ENDS.sub("\n", text)
    text = _ODD_SPACES.sub(" ", text)
    text = _INVISIBLE.sub("", text)
    text = _TAGS.sub(lambda found: found[1] or "", text)
    return _JOINER.sub(lambda found: "" if found[1] else found[0], text)


def compose(text: str) -> str:
    """Bring a text into Unicode's form NFC, in which one sign is one character where it can be."""
    if text.isascii() or unicodedata.is_normalized("NFC", text):
        return text
    return unicodedata.normalize("NFC", text)


def trim(text: str, *, keeps_leading_space: bool = False) -> str:
    """Cut white space that begins or ends a text and says nothing.

    What is left is a convention: one space before a completion, one line end or two after a text,
    the ideographic space with which a paragraph begins.
    """
    body = text.strip()
    if not body:
        return text
    lead = text[: len(text) - len(text.lstrip())]
    tail = text[len(text.rstrip()) :]
    kept = "\u3000" if lead.startswith("\u3000") else ""
    if keeps_leading_space and lead.startswith((" ", "\n")):
        kept = lead[0]
    end = tail if tail in ("", " ", "\n", "\n\n") else tail[:0]
    return kept + body + end


_REPAIRS: dict[str, Callable[[str], str]] = {
    "lone_surrogate": join_surrogates,
    "null_byte": remove_nul,
    "mojibake": mend_encoding,
    "html": remove_html,
    "control_characters": remove_controls,
    "unicode_form": compose,
    "stray_whitespace": trim,
}
"""In this order: each may uncover what the next one mends. They are made until nothing changes."""

CODES = tuple(_REPAIRS)
