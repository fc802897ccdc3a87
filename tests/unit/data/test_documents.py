"""Raw text becomes examples: every token but the first is predicted, and exactly once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.assets import tiny_tokenizer as tiny
from tests.assets.smollm2 import smollm2_folder

from outcrop.data.documents import render_document
from outcrop.data.records import Document, Example
from outcrop.errors import DataError, ModelError
from outcrop.models.tokenizer import Tokenizer

TEXT = " the user asks and the assistant answers:\n\n\tyes <|im_end|> \n"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer(smollm2_folder())


def render(tokenizer: Tokenizer, text: str = TEXT, max_tokens: int = 8192) -> list[Example]:
    return render_document(Document(text, "s3://bucket/train.jsonl", 3), tokenizer, max_tokens)


def predicted(example: Example) -> list[int]:
    pairs = zip(example.input_ids, example.loss_mask, strict=True)
    return [token for token, carries in pairs if carries]


def with_bos(folder: Path) -> Tokenizer:
    """As Llama 3's: the tokenizer itself puts the token before a text."""
    tiny.write_tokenizer(
        folder,
        tiny.LLAMA3_TEMPLATE,
        tiny.LLAMA3_TOKENS,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    )
    file = folder / "tokenizer.json"
    description = json.loads(file.read_text())
    bos = "<|begin_of_text|>"
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": bos, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [0], "tokens": [bos]}},
    }
    file.write_text(json.dumps(description))
    return Tokenizer(folder)


def test_a_document_is_its_text_and_the_token_that_ends_texts(smollm2: Tokenizer) -> None:
    (example,) = render(smollm2)
    end = smollm2.token_id("<|endoftext|>")
    assert example.input_ids == [*smollm2.encode(TEXT), end]
    assert smollm2.decode(example.input_ids) == TEXT, "its white space and spellings are kept"
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


def test_the_beginning_token_stands_where_the_tokenizer_puts_one(tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path)
    (example,) = render(tokenizer)
    assert example.input_ids == [
        tokenizer.token_id("<|begin_of_text|>"),
        *tokenizer.encode(TEXT),
        tokenizer.token_id("<|end_of_text|>"),
    ]
    assert example.loss_mask == [False] + [True] * (len(example.input_ids) - 1)


@pytest.mark.parametrize(("adds", "begins"), [(True, True), (False, False), (None, False)])
def test_the_tokenizers_configuration_says_whether_a_text_has_a_beginning_token(
    tmp_path: Path, adds: bool | None, begins: bool
) -> None:
    extra = {} if adds is None else {"add_bos_token": adds}
    folder = tiny.write_tokenizer(
        tmp_path, tiny.MISTRAL_TEMPLATE, tiny.MISTRAL_TOKENS, bos="<s>", eos="</s>", **extra
    )
    tokenizer = Tokenizer(folder)
    (example,) = render(tokenizer)
    assert (example.input_ids[0] == tokenizer.token_id("<s>")) is begins
    assert example.input_ids[-1] == tokenizer.token_id("</s>")


@given(st.text(min_size=1, max_size=300), st.integers(3, 60))
def test_every_token_but_the_first_is_predicted_once_however_it_is_cut(
    smollm2: Tokenizer, text: str, max_tokens: int
) -> None:
    pieces = render(smollm2, text, max_tokens)
    (whole,) = render(smollm2, text, 10_000)
    assert [token for piece in pieces for token in predicted(piece)] == predicted(whole)
    lengths = [len(piece.input_ids) for piece in pieces]
    assert max(lengths) <= max_tokens
    assert max(lengths) - min(lengths) <= 2, "about the same length"
    assert len(pieces) == max(1, -(-(len(whole.input_ids) - 1) // (max_tokens - 1)))
    for before, after in itertools.pairwise(pieces):
        assert after.input_ids[0] == before.input_ids[-1]
        assert after.loss_mask[0] is False


def test_every_piece_has_the_beginning_token(tmp_path: Path) -> None:
    tokenizer = with_bos(tmp_path)
    (whole,), pieces = render(tokenizer), render(tokenizer, max_tokens=9)
    assert len(pieces) > 2
    assert {piece.input_ids[0] for piece in pieces} == {tokenizer.token_id("<|begin_of_text|>")}
    assert all(len(piece.input_ids) <= 9 for piece in pieces)
    assert [token for piece in pieces for token in predicted(piece)] == predicted(whole)


def test_a_text_that_cannot_be_encoded_is_refused_at_its_line(smollm2: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl, line 3: the text cannot be encoded"):
        render(smollm2, "\ud83d")


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny.write_tokenizer(tmp_path, None, ("<s>",)))
    with pytest.raises(ModelError, match="no token that ends a text"):
        render(tokenizer)
