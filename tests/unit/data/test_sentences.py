"""Cutting long texts: nothing is lost, nothing is too long, and cuts are where a reader pauses."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data.sentences import split_text


def words(text: str) -> int:
    return len(text.split())


def num_bytes(text: str) -> int:
    """Count as a byte-level tokenizer without merges does."""
    return len(text.encode("utf-8", "surrogatepass"))


TEXT = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            [
                "\n\n",
                "\n",
                ". ",
                "。",
                "！",
                "? ",
                "「はい。」",
                ", ",
                " ",
                "e\u0301",
                "word ",
                "3.14",
                "😀",
            ]
        ),
    ),
    max_size=30,
).map("".join)


@settings(deadline=None)
@given(TEXT, st.integers(4, 40))
def test_pieces_are_the_text_and_none_is_too_long(text: str, limit: int) -> None:
    pieces = split_text(text, limit, num_bytes)
    assert "".join(pieces) == text
    assert all(num_bytes(piece) <= limit for piece in pieces)
    assert all(pieces) or not text


def test_a_text_that_fits_stays_whole() -> None:
    assert split_text("One. Two.", 9, len) == ["One. Two."]
    assert split_text("", 4, len) == [""]


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One two. Three four. Five six.", 4, ["One two. Three four. ", "Five six."]),
        ("One two\n\nthree four\n\nfive six", 4, ["One two\n\nthree four\n\n", "five six"]),
        (
            "It costs 3.14 at example.com today. Yes.",
            6,
            ["It costs 3.14 at example.com today. ", "Yes."],
        ),
        ('He said "no." Then he left.', 3, ['He said "no." ', "Then he left."]),
    ],
)
def test_cuts_are_at_ends_of_sentences_and_paragraphs(
    text: str, limit: int, expected: list[str]
) -> None:
    assert split_text(text, limit, words) == expected


def test_japanese_is_cut_after_its_full_stops() -> None:
    text = "これは文です。「はい。」と答えた。" * 6
    pieces = split_text(text, 40, len)
    assert "".join(pieces) == text
    assert all(piece.endswith(("。", "」")) for piece in pieces)


def test_pieces_are_of_about_the_same_length() -> None:
    text = "".join(f"Sentence number {place:03}. " for place in range(101))
    lengths = [len(piece) for piece in split_text(text, 1000, len)]
    assert max(lengths) <= 1000
    assert min(lengths) >= 400


def test_a_long_word_is_cut_and_no_mark_loses_its_letter() -> None:
    text = "e\u0301" * 50
    pieces = split_text(text, 9, len)
    assert "".join(pieces) == text
    assert not any(unicodedata.combining(piece[0]) for piece in pieces)
