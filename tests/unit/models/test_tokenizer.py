"""Text to ids and back: control tokens stay apart, and no piece of a stream cuts a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.assets import tiny_tokenizer as tiny
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers

from outcrop.errors import ModelError
from outcrop.models.tokenizer import MAX_HELD_TOKENS, IncrementalDecoder, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(
        tiny.write_tokenizer(
            folder, tiny.CHATML_TEMPLATE, tiny.CHATML_TOKENS, bos="<|im_start|>", eos="<|im_end|>"
        )
    )


def stream(tokenizer: Tokenizer, ids: list[int], step: int = 1) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(ids[place : place + step]) for place in range(0, len(ids), step)]
    return [*pieces, decoder.finish()]


def test_control_tokens_are_recognized_in_scaffold_only(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user"
    assert tokenizer.encode_scaffold(text)[0] == 1
    assert not tokenizer.special_token_ids & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_answers_do_not_show_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("yes"), 2, *tokenizer.encode(" no")]) == "yes no"


def test_named_tokens_are_read(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.special_tokens == tiny.CHATML_TOKENS
    assert tokenizer.chat_template == tiny.CHATML_TEMPLATE


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.integers(1, 4))
def test_a_stream_gives_the_same_text_in_whole_characters(
    tokenizer: Tokenizer, text: str, step: int
) -> None:
    pieces = stream(tokenizer, tokenizer.encode(text), step)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 399), max_size=80))
def test_a_stream_of_any_ids_gives_what_decode_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_garbage_is_let_go_and_the_character_after_it_stays_whole(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("\U0001f600")[:1] * (3 * MAX_HELD_TOKENS)
    ids = [*broken, *tokenizer.encode("\U0001f600")]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces[: len(broken)]).startswith("\ufffd")
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).endswith("\U0001f600")


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a\u6771")
    assert stream(tokenizer, ids[:-1]) == ["a", *[""] * (len(ids) - 2), "\ufffd"]


def test_a_tokenizer_that_drops_the_first_space_keeps_those_within_a_stream(tmp_path: Path) -> None:
    """As Llama 2's and Mistral's: the space belongs to the word, and the first is taken off."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁one": 3, "▁two": 4, "s": 5}
    raw = RawTokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    raw.add_special_tokens(["<s>", "</s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [1, 3, 4, 5, 4]
    assert stream(tokenizer, ids) == ["", "one", " two", "s", " two", ""]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_half_a_surrogate_pair_cannot_be_encoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.encode("\udc00")


def test_a_tokenizer_never_cuts_or_fills_up(tmp_path: Path) -> None:
    folder = tiny.write_tokenizer(tmp_path, None, ("</s>",), eos="</s>")
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    raw.save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).encode("\x01\x02\x03") == [
        Tokenizer(folder).encode(byte)[0] for byte in "\x01\x02\x03"
    ]


def test_indentation_tokens_stay_ordinary_text(tmp_path: Path) -> None:
    folder = tiny.write_tokenizer(tmp_path, None, ("</s>",), eos="</s>")
    raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
    raw.add_tokens(["    ", "<tool>"])
    raw.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("    ") == [tokenizer.token_id("    ")]
    assert tokenizer.token_id("<tool>") not in tokenizer.encode("<tool>")
    assert tokenizer.token_id("<tool>") in tokenizer.encode_scaffold("<tool>")


@pytest.mark.parametrize("where", ["file", "named", "list"])
def test_a_chat_template_is_found_wherever_hugging_face_puts_it(where: str, tmp_path: Path) -> None:
    template = "{{ messages[0]['content'] }}"
    listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    inside = {"file": None, "named": template, "list": listed}[where]
    folder = tiny.write_tokenizer(tmp_path, None, ("</s>",), eos="</s>")
    config = {"eos_token": {"content": "</s>"}, "chat_template": inside}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if where == "file":
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(folder)
    assert tokenizer.chat_template == template
    assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"model": {"type": "nothing"}}', "cannot be loaded"),
    ],
)
def test_a_broken_tokenizer_is_refused_by_name(
    content: str | None, says: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=says) as raised:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(raised.value)
