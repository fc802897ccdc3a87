"""Prompts that fit their context, and those that are cut or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.serve.tiny_chat import END, START, write_tiny_chat

from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.errors import ValidationException
from outcrop.serve.prompt import check_prompt, encode_prompt, fit_prompt, fit_request
from outcrop.serve.request import (
    GenerationRequest,
    SamplingParams,
    Truncate,
    messages_to_json,
    prompt_from_json,
    request_from_json,
    request_to_json,
)

CONTEXT = 120
LONG = (Message("system", "Be brief."), Message("user", "START " + "abc " * 200 + " END"))


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(write_tiny_chat(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("truncate", "kept", "lost"), [("start", "END", "START"), ("end", "START", "END")]
)
def test_the_wanted_end_of_the_last_message_is_cut_off(
    renderer: Renderer, truncate: Truncate, kept: str, lost: str
) -> None:
    sampling = SamplingParams(max_tokens=20, truncate=truncate)
    ids, max_tokens = fit_prompt(renderer, LONG, sampling, CONTEXT)
    text = renderer.decode(ids)
    assert (len(ids), max_tokens) == (CONTEXT - 20, 20)
    assert "Be brief." in text
    assert kept in text
    assert lost not in text


def test_a_prompt_that_fits_is_not_cut(renderer: Renderer) -> None:
    short = (Message("user", "Hello"),)
    sampling = SamplingParams(max_tokens=20, truncate="end")
    ids, _ = fit_prompt(renderer, short, sampling, CONTEXT)
    assert ids == renderer.render_prompt(short)


def test_a_character_that_is_cut_apart_does_not_make_the_prompt_too_long(
    renderer: Renderer,
) -> None:
    messages = (Message("user", "\u3042\U0001f600" * 60),)
    for max_tokens in range(20, 30):
        sampling = SamplingParams(max_tokens=max_tokens, truncate="end")
        ids, _ = fit_prompt(renderer, messages, sampling, CONTEXT)
        assert len(ids) <= CONTEXT - max_tokens


def test_what_cannot_fit_by_cutting_the_last_message_is_refused(renderer: Renderer) -> None:
    messages = (Message("system", "x" * CONTEXT), Message("user", "Hello"))
    with pytest.raises(ValidationException, match=str(CONTEXT)):
        fit_prompt(renderer, messages, SamplingParams(max_tokens=5, truncate="end"), CONTEXT)


def test_an_answer_as_long_as_the_context_is_refused(renderer: Renderer) -> None:
    with pytest.raises(ValidationException, match="in all"):
        fit_prompt(renderer, LONG, SamplingParams(max_tokens=CONTEXT, truncate="end"), CONTEXT)


def test_what_no_context_holds_is_refused_without_being_encoded(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(renderer.tokenizer, "encode", encode)
    endless = (Message("user", "w" * (CONTEXT * renderer.tokenizer.longest_token + 1)),)
    for sampling in (SamplingParams(max_tokens=5), SamplingParams(max_tokens=None)):
        with pytest.raises(ValidationException, match=f"{len(endless[0].text):,} characters"):
            fit_prompt(renderer, endless, sampling, CONTEXT)


@pytest.mark.parametrize(("truncate", "kept"), [("start", "END"), ("end", "START")])
def test_what_no_context_holds_is_cut_where_that_is_asked_for(
    renderer: Renderer, truncate: Truncate, kept: str
) -> None:
    endless = (Message("system", "Be brief."), Message("user", "START" + "w" * 50_000 + "END"))
    sampling = SamplingParams(max_tokens=20, truncate=truncate)
    ids, _ = fit_prompt(renderer, endless, sampling, CONTEXT)
    assert len(ids) == CONTEXT - 20
    assert kept in renderer.decode(ids)


def test_a_text_that_is_taken_as_it_stands_begins_as_the_models_texts_do(
    renderer: Renderer, tmp_path: Path
) -> None:
    folder = write_tiny_chat(tmp_path)
    config = {"eos_token": END, "bos_token": START, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    begins = Renderer(folder)
    text = renderer.tokenizer.encode("Hello")
    sampling = SamplingParams(max_tokens=5)
    assert check_prompt(renderer, "Hello", sampling, CONTEXT, 262)[0] == text
    with_start = [begins.tokenizer.token_id(START), *text]
    assert check_prompt(begins, "Hello", sampling, CONTEXT, 262)[0] == with_start
    assert check_prompt(begins, tuple(text), sampling, CONTEXT, 262)[0] == text
    with pytest.raises(ValidationException, match="empty"):
        check_prompt(begins, "", sampling, CONTEXT, 262)


def test_a_text_that_may_spell_control_tokens_has_them(renderer: Renderer) -> None:
    text = f"{START}user\nHello{END}"
    plain = encode_prompt(renderer, text, CONTEXT, spells_control=False)
    spelt = encode_prompt(renderer, text, CONTEXT, spells_control=True)
    assert set(spelt) & renderer.tokenizer.special_token_ids
    assert not set(plain) & renderer.tokenizer.special_token_ids
    assert len(spelt) < len(plain)
    request = GenerationRequest((), SamplingParams(max_tokens=5), prompt=text, spells_control=True)
    assert fit_request(renderer, request, CONTEXT, 10_000)[0] == spelt
    assert request_from_json(request_to_json(request)) == request
    assert prompt_from_json(messages_to_json((), (), text)) == text
