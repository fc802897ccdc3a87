"""Tokens to text, one at a time: stop sequences and ends across tokens and characters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.serve.test_stop import first_complete
from tests.unit.serve.tiny_chat import write_tiny_chat

from outcrop.models.tokenizer import Tokenizer
from outcrop.serve.backend import Scores
from outcrop.serve.request import Generation, SamplingParams, TokenEvent
from outcrop.serve.sequence import TokenSequence

NO_SCORES = torch.empty(0)
PIECES = st.sampled_from(["a", "the", "é", "😀", "ß", "\n", "漢字", " "])
TEXTS = st.lists(PIECES, min_size=1, max_size=12).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes: a character that is not ASCII is two to four tokens."""
    return Tokenizer(write_tiny_chat(tmp_path_factory.mktemp("model")))


def answer(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], Generation]:
    """Return the texts that were released on the way, and the whole answer."""
    sequence = TokenSequence([1], SamplingParams(stop=stop), len(ids), [], tokenizer)
    released: list[str] = []
    for token in ids:
        event = sequence.accept(Scores(NO_SCORES, [token]))
        if isinstance(event, Generation):
            return released, event
        if isinstance(event, TokenEvent):
            released.append(event.text)
    raise AssertionError("an answer ends after its last token at the latest")


@given(text=TEXTS, stop=st.lists(TEXTS.map(lambda found: found[:4]), max_size=3))
def test_a_stop_sequence_is_found_across_tokens_and_characters(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    released, found = answer(tokenizer, tokenizer.encode(text), tuple(stop))
    assert (found.text, found.stop_sequence) == first_complete(text, stop)
    assert found.text.startswith("".join(released))
    assert all("\ufffd" not in piece for piece in released)


@given(text=TEXTS, cut=st.integers(1, 3))
def test_an_answer_that_ends_inside_a_character_shows_that_and_loses_nothing(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    ids = tokenizer.encode(text + "😀")[:-cut]
    released, found = answer(tokenizer, ids)
    assert found.text == tokenizer.decode(ids)
    assert found.text.startswith(text)
    assert found.text.startswith("".join(released))
    assert found.finish_reason == "length"


def test_a_stop_sequence_that_is_half_of_a_character_is_never_found(tokenizer: Tokenizer) -> None:
    _, found = answer(tokenizer, tokenizer.encode("a😀b"), ("\ufffd",))
    assert (found.text, found.finish_reason) == ("a😀b", "length")


def test_the_longest_stop_sequences_there_may_be_are_looked_for(tokenizer: Tokenizer) -> None:
    long = "ab" * 500
    _, found = answer(tokenizer, tokenizer.encode("x" + long + "y"), (long,) * 2500)
    assert (found.text, found.stop_sequence) == ("x", long)
