"""Counting gives the number of ids that encoding makes, for every tokenizer and every text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.assets import tiny_tokenizer as tiny
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Library

from outcrop.models.counting import TokenCounter
from outcrop.models.tokenizer import Tokenizer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
RULES = {
    "byte level": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits apart": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama 3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated", invert=False), BYTES]
    ),
}
UNKNOWN = {
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "other classes": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{Lu}?\p{L}+|."), "isolated", invert=False), BYTES]
    ),
    "metaspace": pre_tokenizers.Metaspace(),
}
ASCII = st.text(st.sampled_from("ab Zs'tl09.,-\n\t\r\x1c!(") | st.characters(max_codepoint=127))


def counter(
    folder: Path,
    rule: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
) -> TokenCounter:
    tiny.write_tokenizer(folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, eos="<|im_end|>")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.pre_tokenizer = rule
    if normalizer is not None:
        library.normalizer = normalizer
    library.save(str(folder / "tokenizer.json"))
    return TokenCounter(Tokenizer(folder))


@pytest.fixture(scope="module", params=sorted(RULES))
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenCounter:
    return counter(tmp_path_factory.mktemp("tokenizer"), RULES[request.param])


def test_the_usual_rules_are_understood(fast: TokenCounter) -> None:
    assert fast.is_fast


@given(text=ASCII | st.text())
def test_a_count_is_the_number_of_ids(fast: TokenCounter, text: str) -> None:
    assert fast.count(text) == len(fast.tokenizer.encode(text))


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_a_rule_that_is_not_understood_encodes_the_whole_text(name: str, tmp_path: Path) -> None:
    slow = counter(tmp_path, UNKNOWN[name])
    assert not slow.is_fast
    assert slow.count("the user asks 12") == len(slow.tokenizer.encode("the user asks 12"))


def test_a_tokenizer_that_changes_texts_first_encodes_the_whole_text(tmp_path: Path) -> None:
    assert not counter(tmp_path, RULES["byte level"], normalizers.Lowercase()).is_fast


def test_the_words_that_are_kept_are_bounded(fast: TokenCounter) -> None:
    small = TokenCounter(fast.tokenizer, max_cached_words=10)
    for number in range(30):
        small.count(f"word{number:x} other")
    assert 0 < small.num_known <= 15


def test_half_of_a_surrogate_pair_is_refused(fast: TokenCounter) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        fast.count("a \ud83d b")
