"""Near duplicates: who is called a twin, and who never is."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.data import shingles
from outcrop.data.near import MIN_THRESHOLD, NearIndex
from outcrop.errors import SettingsError

WORDS = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("na", "rek", "sol", "tim")]
TEMPLATE = "Read what a customer of our bank wrote and name the intent that fits best of all.\n\n"


def sentence(rng: random.Random, num_words: int = 30) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def twins(texts: list[str], labels: list[str] | None = None, threshold: float = 0.85) -> object:
    with NearIndex(threshold) as index:
        index.add_texts(texts, labels)
        return index.twins()


def wider(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


CHANGES: dict[str, Callable[[str], str]] = {
    "case": lambda text: text.upper(),
    "spaces": lambda text: text.replace(" ", "  "),
    "punctuation": lambda text: text.replace(" ", " , ") + " ??",
    "full width": wider,
    "one word": lambda text: text + " thanks",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_small_change_makes_a_near_duplicate_of_the_earlier_text(change: str) -> None:
    rng = random.Random(change)
    texts = [sentence(rng) for _ in range(60)]
    changed = [CHANGES[change](text) for text in texts[::6]]
    expected = {60 + place: 6 * place for place in range(10)}
    assert twins([*texts, *changed]) == expected


def test_a_change_of_a_japanese_text_is_found_and_another_text_is_not() -> None:
    rng = random.Random(1)
    signs = [chr(0x3042 + place) for place in range(60)] + [
        chr(0x4E00 + place) for place in range(99)
    ]
    texts = ["".join(rng.choices(signs, k=80)) + "。" for _ in range(40)]
    changed = texts[7][:40] + "、" + texts[7][40:] + "です"
    assert twins([*texts, changed]) == {40: 7}


def test_texts_that_only_share_a_long_instruction_are_no_twins() -> None:
    rng = random.Random(2)
    texts = [TEMPLATE * 5 + sentence(rng, 6) for _ in range(200)]
    assert twins(texts) == {}
    assert twins([*texts, texts[3].upper()]) == {200: 3}


def test_another_completion_is_no_duplicate() -> None:
    text = sentence(random.Random(3))
    assert twins([text, text.upper(), text.title()], [" yes", " no", " YES."]) == {2: 0}


def test_what_is_left_out_stands_for_nobody() -> None:
    first = sentence(random.Random(4), 40).split()
    second = [*first, "abc", "def", "ghi", "jkl"]
    third = [*second, "mno", "pqr", "stu", "vwx"]
    found = twins([" ".join(words) for words in (first, second, third)])
    assert found == {1: 0}  # the third is like the second only, and the second is gone


def test_a_group_holds_what_is_like_anything_in_it() -> None:
    rng = random.Random(9)
    first = sentence(rng, 40).split()
    chain = [first + [f"add{place}" for place in range(4 * step)] for step in range(3)]
    with NearIndex() as index:
        index.add_texts([sentence(rng), *(" ".join(words) for words in chain), sentence(rng)])
        assert index.groups().tolist() == [0, 1, 1, 1, 4]


def test_texts_without_words_have_no_twin() -> None:
    assert twins(["", "", "?!", "?!", " "]) == {}


def test_a_leak_is_looked_for_between_two_sets_only() -> None:
    rng = random.Random(5)
    training = [sentence(rng) for _ in range(30)]
    with NearIndex() as index:
        index.add_texts([*training, training[0].upper()])
        index.add_texts([sentence(rng), training[9] + " Thanks.", training[2].title()])
        found = index.twins(of=range(31), among=range(31, 34))
    assert found == {9: 32, 2: 33}


@pytest.mark.parametrize("threshold", [MIN_THRESHOLD, 0.7, 0.85, 1.0])
def test_every_twin_and_no_other_has_the_threshold_in_common(threshold: float) -> None:
    rng = random.Random(6)
    texts = [sentence(rng, 50) for _ in range(40)]
    for place in range(40):
        words = texts[place].split()
        for _ in range(place // 4):
            words[rng.randrange(50)] = "other"
        texts.append(" ".join(words))
    found = twins(texts, threshold=threshold)
    expected = {}
    for place in range(40):
        one, other = (
            {tuple(words[at : at + 3]) for at in range(len(words) - 2)}
            for words in (texts[place].split(), texts[place + 40].split())
        )
        if len(one & other) / len(one | other) >= threshold:
            expected[place + 40] = place
    assert found == expected


def test_many_equal_texts_all_have_the_first_as_twin() -> None:
    text = sentence(random.Random(7))
    assert twins([text] * 300) == dict.fromkeys(range(1, 300), 0)


def test_the_same_texts_have_the_same_twins_however_they_came_in() -> None:
    rng = random.Random(8)
    texts = [sentence(rng, 12) for _ in range(300)]
    texts += [text + " thanks" for text in texts[::3]]
    with NearIndex() as index:
        for text in texts:
            index.add_texts([text])
        assert index.twins() == twins(texts)


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), max_size=12))
def test_any_texts_can_be_compared(texts: list[str]) -> None:
    with NearIndex() as index:
        index.add_texts([*texts, *texts])
        found = index.twins()
    said = [shingles.normalized(text) for text in [*texts, *texts]]
    for text, twin in found.items():
        assert twin < text
        assert twin not in found
    for place in range(len(texts), len(said)):
        assert place in found or not said[place]


@pytest.mark.parametrize("threshold", [0.49, 1.01, float("nan"), -1])
def test_a_threshold_that_says_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(SettingsError, match="threshold"):
        NearIndex(threshold)
