"""Agreement of answers with the answers that were wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.evaluate.generation import exact_match, rouge_l, words


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("The patient's BP is 120/80, \"stable\".") == [
        "the", "patient", "s", "bp", "is", "120", "80", "stable",
    ]  # fmt: skip


def test_scripts_without_spaces_count_by_character() -> None:
    assert words("東京タワー 3階") == ["東", "京", "タ", "ワ", "ー", "3", "階"]
    assert words("서울 타워") == ["서울", "타워"]


def test_rouge_l_of_the_papers_example() -> None:
    # Lin 2004, section 3.1: "police the gunman kill" shares a subsequence of two words with it,
    # so precision and recall are 2/4; "police kill the gunman" shares three.
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(0.5)


def test_rouge_l_weighs_both_lengths() -> None:
    assert rouge_l("a b c d e f", "a c") == pytest.approx(2 * 2 / 8)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [("", "", 1.0), ("...", "", 1.0), ("", "word", 0.0), ("word", " \n", 0.0)],
)
def test_rouge_l_of_texts_without_words(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, reference) == expected


@given(st.text(alphabet="ab c", max_size=12), st.text(alphabet="ab c", max_size=12))
def test_rouge_l_is_a_symmetric_share(left: str, right: str) -> None:
    assert 0.0 <= rouge_l(left, right) <= 1.0
    assert rouge_l(left, right) == rouge_l(right, left)
    assert rouge_l(left, left) == 1.0


def test_exact_match_overlooks_only_white_space_around() -> None:
    assert exact_match(" card_arrival\n", "card_arrival")
    assert not exact_match("Card_arrival", "card_arrival")
    assert not exact_match("card_arrival.", "card_arrival")
