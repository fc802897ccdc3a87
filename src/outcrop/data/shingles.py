"""Turn texts into hashes of their runs of words, to find texts that say nearly the same.

Case, white space, punctuation and the width of characters make no difference. A run is
SHINGLE_WORDS words; where a script writes no spaces, a character counts as a word. All texts of a
call are hashed together: an array operation costs what a few words cost one by one.

Source: Broder, "On the resemblance and containment of documents" (1997), for shingles.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 3

_NO_WORD = re.compile(r"[\W_]+")
# Kana, ideographs, hangul and their extensions: what is written without spaces, or nearly.
_UNSPACED = re.compile(
    r"([\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff])"
)
_ASCII = {place: chr(place).lower() if chr(place).isalnum() else " " for place in range(128)}
_SPACE, _END = 0x20, 0x0A

_PRIME = np.uint64(0x100000001B3)
_MIX = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_PLACES = tuple(map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))


def normalized(text: str) -> str:
    """Return the words of a text in lower case, one space between them."""
    if text.isascii():
        return " ".join(text.translate(_ASCII).split())
    text = _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(" ".join(_UNSPACED.split(text)).split())


def shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hash the runs of words of normalized texts.

    A text of fewer words than a run has is one run; one without words has none.

    Args:
        texts: as `normalized` returns them.
    Returns:
        (hashes, ends): the hashes of all texts, one after the other, in the order of the words; and
        for each text where its hashes end.
    """
    data = np.frombuffer("".join(f"{text}\n" for text in texts).encode(), dtype=np.uint8)
    if not len(data):
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    is_gap = (data == _SPACE) | (data == _END)
    gaps = np.flatnonzero(is_gap)
    starts = np.concatenate(([0], gaps[:-1] + 1))
    is_word = gaps > starts  # a text without words has an end and nothing before it
    words = _word_hashes(data, is_gap, starts[is_word], gaps[is_word])
    text_of_gap = np.cumsum(data[gaps] == _END) - (data[gaps] == _END)
    text_of_word = text_of_gap[is_word]
    num_words = np.bincount(text_of_word, minlength=len(texts))
    ends = np.cumsum(num_words)
    if not len(words):
        return words, ends.astype(np.int64)

    place = np.arange(len(words))
    left = ends[text_of_word] - place  # words from here to the end of the text
    run = words * _PLACES[0]
    for ahead in range(1, SHINGLE_WORDS):
        following = np.zeros_like(words)
        following[:-ahead] = words[ahead:]
        run += np.where(left > ahead, following * _PLACES[ahead], np.uint64(0))
    first = ends[text_of_word] - num_words[text_of_word]
    kept = (left >= SHINGLE_WORDS) | (place == first)
    num_kept = np.bincount(text_of_word[kept], minlength=len(texts))
    return _mixed(run[kept]), np.cumsum(num_kept).astype(np.int64)


def text_of(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each hash the number of its text."""
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))


def _word_hashes(
    data: NDArray[np.uint8],
    is_gap: NDArray[np.bool_],
    starts: NDArray[np.int64],
    ends: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """Hash each word: the sum of its bytes, each times a power for its place in the word."""
    if not len(starts):
        return np.empty(0, np.uint64)
    lengths = ends - starts
    powers = np.cumprod(np.full(int(lengths.max()), _PRIME), dtype=np.uint64)
    place = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    weighted = (data[~is_gap].astype(np.uint64) + np.uint64(1)) * powers[place]
    return _mixed(np.add.reduceat(weighted, np.cumsum(lengths) - lengths))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread the bits. Source: MurmurHash3's finalizer."""
    shift = np.uint64(33)
    values = (values ^ (values >> shift)) * _MIX[0]
    values = (values ^ (values >> shift)) * _MIX[1]
    mixed: NDArray[np.uint64] = values ^ (values >> shift)
    return mixed
