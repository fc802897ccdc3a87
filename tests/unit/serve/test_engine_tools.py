"""The engine with tools: what the model is told, and control tokens that its answer shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.unit.serve import tool_templates
from tests.unit.serve.tiny_chat import END, START, stream, write_tiny_chat
from tests.unit.serve.tool_templates import WEATHER, give_template

from outcrop.data.records import Message, Tool
from outcrop.errors import ValidationException
from outcrop.models.tokenizer import IncrementalDecoder, Tokenizer
from outcrop.serve.engine import BatchEngine
from outcrop.serve.request import Generation, GenerationRequest, SamplingParams

ASK = (Message("user", "Warm?"),)
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchEngine]:
    folder = give_template(
        write_tiny_chat(tmp_path_factory.mktemp("model"), max_position_embeddings=2048),
        tool_templates.HERMES,
    )
    made = BatchEngine(folder, threads=1, dtype=torch.float32)
    yield made
    made.close()


def answer(engine: BatchEngine, request: GenerationRequest) -> Generation:
    *_, last = stream(engine, request)
    assert isinstance(last, Generation)
    return last


def test_tools_are_counted_as_they_are_asked_with(engine: BatchEngine) -> None:
    plain = answer(engine, GenerationRequest(ASK, GREEDY))
    told = answer(engine, GenerationRequest(ASK, GREEDY, tools=(WEATHER,)))
    assert told.input_tokens == engine.count_tokens(ASK, (WEATHER,))
    assert told.input_tokens > plain.input_tokens + len(WEATHER.description)
    start = answer(engine, GenerationRequest(ASK, GREEDY, tools=(WEATHER,), start="abc"))
    assert start.input_tokens == told.input_tokens + 3


def test_a_prompt_with_tools_that_does_not_fit_is_refused(engine: BatchEngine) -> None:
    long = Tool("long", "x" * 10**6, {})
    with pytest.raises(ValidationException, match="Shorten the prompt"):
        engine.count_tokens(ASK, (long,))
    long = Tool("long", "x y " * 700, {})
    with pytest.raises(ValidationException, match="context holds 2048"):
        engine.submit(GenerationRequest(ASK, GREEDY, tools=(long,)), lambda event: None)


def test_what_the_template_refuses_is_the_requests_fault(engine: BatchEngine) -> None:
    turns = (Message("tool", "\ud800", call_id="1"), *ASK)
    with pytest.raises(ValidationException, match="surrogate"):
        engine.submit(GenerationRequest(turns, GREEDY, tools=(WEATHER,)), lambda event: None)


def test_control_tokens_are_shown_where_they_are_wanted_and_only_there(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tiny_chat(tmp_path))
    ids = tokenizer.encode_scaffold(f"a é{START}b{END}")
    shown = tokenizer.token_id(START)
    assert shown is not None

    def decoded(*wanted: int) -> str:
        decoder = IncrementalDecoder(tokenizer, wanted)
        return "".join(decoder.push([token]) for token in ids) + decoder.finish()

    assert decoded() == "a éb"
    assert decoded(shown) == f"a é{START}b"
