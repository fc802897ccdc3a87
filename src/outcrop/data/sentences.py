"""Cut a long text into pieces that a model takes, at ends of paragraphs and sentences.

The pieces put together are the text, to the character. Knows nothing of tokens: it is given a
function that counts. Works for scripts with and without spaces.

Source: Unicode Standard Annex 29, section 5, for where sentences end; only what needs no
dictionary.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

# From the best place to cut to the worst; each keeps what ends a piece with that piece.
_ENDS = (
    re.compile(r"\n[ \t]*\n\s*"),  # paragraphs
    re.compile(r"\n\s*"),
    # Sentences: a full stop of Latin script only before a space, so 3.14 and example.com stay.
    re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？｡][」』）”]*\s*|[।۔]\s*"),
    re.compile(r"[;:]\s+|[,，、；：]\s*|\s[-–—]\s"),
    re.compile(r"\s+"),
)


def split_text(text: str, max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Return pieces of at most `max_tokens` each; "".join of them is the text.

    About as few as can be, and of about the same length: a last piece of three words teaches
    nothing. A word that is too long by itself is cut between characters, but never inside one:
    combining marks stay with what they are put on.

    Args:
        max_tokens: of one piece; at least 4, as one character can be four tokens.
        count: tokens of a text; more for a longer text.
    """
    total = count(text)
    if total <= max_tokens:
        return [text]
    num_pieces = -(-total // max_tokens)
    wanted = max(-(-total // num_pieces), max_tokens // 2)
    pieces: list[str] = []
    held = ""
    size = 0
    for part in _parts(text, max_tokens, count, 0):
        tokens = count(part)
        if held and (size >= wanted or size + tokens > max_tokens):
            # Tokens can reach over the seam, either way: what is kept is counted as it is.
            if size + tokens > max_tokens and size < wanted and count(held + part) <= max_tokens:
                held += part
                size = count(held)
                continue
            pieces += _fitting(held, max_tokens, count)
            held, size = "", 0
        held += part
        size += tokens
    if held:
        pieces += _fitting(held, max_tokens, count)
    return pieces


def _parts(text: str, max_tokens: int, count: Callable[[str], int], level: int) -> list[str]:
    """Cut a text at every end of a kind, and finer where a part is still too long."""
    if level == len(_ENDS):
        return _characters(text, max_tokens, count)
    parts: list[str] = []
    start = 0
    ends = [found.end() for found in _ENDS[level].finditer(text)]
    for end in [*ends, len(text)]:
        part = text[start:end]
        start = end
        if not part:
            continue
        if count(part) <= max_tokens:
            parts.append(part)
        else:
            parts += _parts(part, max_tokens, count, level + 1)
    return parts


def _characters(text: str, max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Cut a text without any end in it: as many characters as fit, again and again."""
    parts = []
    while text:
        low, high = 1, min(len(text), max_tokens * 64)
        while low < high:
            middle = (low + high + 1) // 2
            if count(text[:middle]) <= max_tokens:
                low = middle
            else:
                high = middle - 1
        end = low
        while 1 < end < len(text) and unicodedata.combining(text[end]):
            end -= 1
        end = low if end == 1 else end
        parts.append(text[:end])
        text = text[end:]
    return parts


def _fitting(text: str, max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Return the piece, or in the rare case that joining its parts made tokens, two."""
    if count(text) <= max_tokens:
        return [text]
    return _characters(text, max_tokens, count)
