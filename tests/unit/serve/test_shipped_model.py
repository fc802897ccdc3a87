"""The engine on the model that ships."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.assets.smollm2 import smollm2_folder
from tests.unit.serve.tiny_chat import stream

from outcrop.data.records import Message
from outcrop.models.load import load_base
from outcrop.serve.engine import BatchEngine
from outcrop.serve.network import load_network
from outcrop.serve.request import Generation, GenerationRequest, SamplingParams

pytestmark = pytest.mark.slow
FRANCE = (Message("user", "What is the capital of France?"),)


@pytest.fixture(scope="module")
def engine() -> Iterator[BatchEngine]:
    engine = BatchEngine(smollm2_folder(), threads=1)
    yield engine
    engine.close()


def ask(engine: BatchEngine, sampling: SamplingParams) -> Generation:
    *_, last = stream(engine, GenerationRequest(FRANCE, sampling))
    assert isinstance(last, Generation)
    return last


def test_it_answers_a_question_and_ends_by_itself(engine: BatchEngine) -> None:
    found = ask(engine, SamplingParams(temperature=0, max_tokens=32))
    assert found.text == "The capital of France is Paris."
    assert (found.finish_reason, found.output_tokens) == ("stop", 8)


def test_the_likeliest_words_are_drawn_most(engine: BatchEngine) -> None:
    answers = [
        ask(engine, SamplingParams(temperature=0.3, top_p=0.9, max_tokens=8, seed=seed)).text
        for seed in range(5)
    ]
    assert sum("Paris" in answer for answer in answers) >= 4


def test_its_scores_are_those_of_transformers(engine: BatchEngine) -> None:
    prompt = engine.renderer.render_prompt(FRANCE)
    network = load_network(smollm2_folder(), torch.float32)
    found = network.forward(prompt, network.new_cache())[0]
    reference = load_base(smollm2_folder(), torch.float32)
    with torch.inference_mode():
        wanted = reference(input_ids=torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=1e-3)
