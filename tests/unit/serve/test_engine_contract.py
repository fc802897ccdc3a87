"""What every engine must do, whatever computes in it: our own, and vLLM behind the same seam.

vLLM runs here where its package is installed (on a CPU too, with its build for CPUs); a stand-in of
its interface, with a tiny model behind it, always does.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.unit.serve.tiny_chat import (
    load_reference,
    reference_ids,
    stream,
    write_random_adapter,
    write_tiny_chat,
)
from tests.unit.serve.tool_templates import HERMES, WEATHER, give_template
from tests.unit.serve.vllm_stand_in import StandIn, stand_in_library
from transformers import LlamaForCausalLM

from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.errors import (
    ApiError,
    ModelErrorException,
    ModelTimeoutException,
    ServiceUnavailableException,
    ValidationException,
)
from outcrop.models.artifact import folder_digest
from outcrop.models.lora import load_adapter, set_adapter
from outcrop.serve.engine import BatchEngine
from outcrop.serve.interface import Engine
from outcrop.serve.request import (
    Event,
    Generation,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from outcrop.serve.routed import RoutedEngine
from outcrop.serve.vllm import VllmEngine
from outcrop.serve.vllm_library import is_installed, open_vllm

CONTEXT = 1024
HELLO = (Message("user", "Hello there, what is the weather like?"),)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
LONG = SamplingParams(temperature=0, max_tokens=CONTEXT - 200)
SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """A running engine and what it runs on."""

    engine: Engine
    folder: Path
    adapters: tuple[Path, ...]
    whole: Path
    """A custom model with weights of its own."""

    def ask(
        self,
        sampling: SamplingParams = GREEDY,
        adapter: Path | None = None,
        digest: str | None = None,
        **changes: object,
    ) -> Generation:
        request = GenerationRequest(HELLO, sampling, str(adapter) if adapter else None, digest)
        *pieces, last = stream(self.engine, replace(request, **changes))  # type: ignore[arg-type]
        if isinstance(last, Exception):
            raise last
        assert isinstance(last, Generation)
        told = "".join(piece.text for piece in pieces if isinstance(piece, TokenEvent))
        assert last.text.startswith(told)
        return last

    def expected(self, adapter: Path | None = None, folder: Path | None = None) -> str:
        """What transformers itself answers, greedily."""
        return _expected(self.folder, folder or self.folder, adapter)


@cache
def _expected(templates: Path, folder: Path, adapter: Path | None) -> str:
    renderer = Renderer(templates)
    model = load_reference(folder)
    if adapter is not None:
        set_adapter(model, load_adapter(adapter))
    prompt = renderer.render_prompt(HELLO)
    end = renderer.end_token_ids[0]
    ids = reference_ids(model, prompt, GREEDY.max_tokens or 0, end)
    ends = [place for place, token in enumerate(ids) if token in renderer.end_token_ids]
    return renderer.decode(ids[: min(ends, default=len(ids))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tiny_chat(
        tmp_path_factory.mktemp("model"),
        ends=False,
        hidden_size=128,
        max_position_embeddings=CONTEXT,
    )
    give_template(made, HERMES)
    # One more token ends answers: one that follows a prompt of one token, and not HELLO.
    model = load_reference(made)
    renderer = Renderer(made)
    greedy = reference_ids(model, renderer.render_prompt(HELLO), 24, renderer.end_token_ids[0])
    follows = [(first, int(next_token(model, first))) for first in range(200)]
    end = next((first, token) for first, token in follows if token not in greedy)
    config = {"eos_token_id": [renderer.end_token_ids[0], end[1]]}
    (made / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
    (made / "ends_after.json").write_text(json.dumps(end[0]), encoding="utf-8")
    return made


def next_token(model: LlamaForCausalLM, token: int) -> int:
    found: int = model(input_ids=torch.tensor([[token]])).logits[0, -1].argmax().item()
    return found


def own(folder: Path) -> Engine:
    return BatchEngine(folder, threads=1, dtype=torch.float32)


def stand_in(folder: Path) -> Engine:
    first = VllmEngine(folder, lambda: stand_in_library(StandIn(folder)), max_rank=8)
    return RoutedEngine(first, lambda: own(folder))


def real(folder: Path) -> Engine:
    if not is_installed():
        pytest.skip("vllm is not installed")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    first = VllmEngine(
        folder,
        lambda: open_vllm(folder, max_rank=8, memory_percent=50, dtype="float32", eager=True),
        max_rank=8,
    )
    return RoutedEngine(first, lambda: own(folder))


OPENERS: dict[str, Callable[[Path], Engine]] = {"own": own, "stand-in": stand_in, "vllm": real}


@pytest.fixture(scope="module", params=OPENERS)
def place(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    engine = OPENERS[request.param](folder)
    custom = tmp_path_factory.mktemp("custom")
    adapters = [write_random_adapter(folder, custom / str(seed), seed) for seed in (1, 2, 3)]
    whole = write_tiny_chat(
        custom / "whole", 5, ends=False, hidden_size=128, max_position_embeddings=CONTEXT
    )
    yield Place(engine, folder, tuple(adapters), whole)
    engine.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.005)


def test_a_greedy_answer_is_the_models_own(place: Place) -> None:
    found = place.ask()
    assert found.text == place.expected()
    assert (found.finish_reason, found.output_tokens) == ("length", GREEDY.max_tokens)
    assert found.input_tokens == place.engine.count_tokens(HELLO)


def test_each_adapter_answers_as_itself_in_one_batch_and_the_base_stays(place: Place) -> None:
    events = [
        stream(place.engine, GenerationRequest(HELLO, GREEDY, str(adapter) if adapter else None))
        for adapter in (None, *place.adapters, None)
    ]
    texts = [last.text for *_, last in events if isinstance(last, Generation)]
    wanted = [place.expected(adapter) for adapter in (None, *place.adapters, None)]
    assert texts == wanted
    assert len(set(texts)) == 4


def test_a_model_with_weights_of_its_own_answers(place: Place) -> None:
    shutil.copy(place.folder / "tokenizer_config.json", place.whole)
    assert place.ask(adapter=place.whole).text == place.expected(folder=place.whole)
    assert place.ask().text == place.expected()


def test_an_adapter_that_was_changed_is_refused_and_others_are_not(
    place: Place, tmp_path: Path
) -> None:
    changed = tmp_path / "custom" / "1"
    shutil.copytree(place.adapters[0], changed)
    digest = folder_digest(changed)
    (changed / "adapter_model.safetensors").write_bytes(b"x" * 50)
    with pytest.raises(ModelErrorException, match="cannot be used"):
        place.ask(adapter=changed, digest=digest)
    with pytest.raises(ModelErrorException, match="cannot be used"):
        place.ask(adapter=changed)
    with pytest.raises(ModelErrorException, match="cannot be used"):
        place.ask(adapter=tmp_path / "nowhere")
    good = place.adapters[0]
    assert place.ask(adapter=good, digest=folder_digest(good)).text == place.expected(good)
    shutil.rmtree(changed)
    shutil.copytree(good, changed)
    assert place.ask(adapter=changed, digest=digest).text == place.expected(good)


def test_an_artifact_that_is_deleted_while_it_answers_does_not_cut_the_answer(
    place: Place, tmp_path: Path
) -> None:
    deleted = tmp_path / "custom" / "1"
    shutil.copytree(place.adapters[1], deleted)
    events = stream(place.engine, GenerationRequest(HELLO, GREEDY, str(deleted)))
    next(events)
    shutil.rmtree(deleted)
    *_, last = events
    assert isinstance(last, Generation)
    assert last.text == place.expected(place.adapters[1])


def test_a_stop_sequence_ends_the_answer_and_is_not_part_of_it(place: Place) -> None:
    text = place.expected()
    stop = text[3:6]
    found = place.ask(replace(GREEDY, stop=(stop,)))
    assert (found.finish_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.text == text[: text.index(stop)]


def test_the_models_own_end_ends_the_answer_and_is_not_shown(place: Place) -> None:
    before = json.loads((place.folder / "ends_after.json").read_text(encoding="utf-8"))
    found = place.ask(replace(GREEDY, logprobs=True), messages=(), prompt=(before,))
    assert (found.text, found.finish_reason, found.output_tokens) == ("", "stop", 1)
    assert found.logprobs == ()


def test_what_does_not_fit_is_refused_before_it_begins(place: Place) -> None:
    with pytest.raises(ValidationException, match=f"holds {CONTEXT}"):
        place.ask(SamplingParams(max_tokens=CONTEXT))
    with pytest.raises(ValidationException, match="token 267"):
        place.ask(messages=(), prompt=(1, 262 + 5))
    with pytest.raises(ValidationException, match="surrogate"):
        place.ask(messages=(Message("user", "\ud800"),))


def test_a_seed_repeats_an_answer_whatever_else_is_asked(place: Place) -> None:
    drawn = SamplingParams(temperature=1.0, max_tokens=16, seed=-7)
    first = place.ask(drawn).text
    others = [
        stream(place.engine, GenerationRequest(HELLO, replace(drawn, seed=n))) for n in (1, 2)
    ]
    again = place.ask(drawn).text
    assert first == again
    texts = {last.text for *_, last in others if isinstance(last, Generation)}
    assert len({first, *texts}) == 3


def test_cuts_to_one_token_take_the_likeliest(place: Place) -> None:
    for cut in (SamplingParams(top_k=1), SamplingParams(top_p=0.0)):
        assert place.ask(replace(cut, max_tokens=GREEDY.max_tokens)).text == place.expected()


def test_log_probabilities_are_the_models_before_temperature_and_cuts(place: Place) -> None:
    prompt = tuple(range(40, 60))
    found = place.ask(
        SamplingParams(
            temperature=0.5, top_k=2, max_tokens=4, seed=1,
            logprobs=True, prompt_logprobs=True, top_logprobs=3,
        ),
        messages=(),
        prompt=prompt,
    )  # fmt: skip
    assert found.logprobs is not None
    assert found.prompt_logprobs is not None
    renderer = Renderer(place.folder)
    model: LlamaForCausalLM = load_reference(place.folder)
    scores = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(1)
    assert found.prompt_logprobs[0].logprob is None
    assert [token.text for token in found.prompt_logprobs] == [renderer.decode([t]) for t in prompt]
    for index, token in enumerate(prompt[1:]):
        told = found.prompt_logprobs[index + 1]
        assert told.logprob == pytest.approx(float(scores[index, token]), abs=1e-3)
        best = scores[index].topk(3)
        assert [text for text, _ in told.top] == [renderer.decode([int(t)]) for t in best.indices]
    assert len(found.logprobs) == found.output_tokens == 4
    first = found.logprobs[0]
    assert [logprob for _, logprob in first.top] == pytest.approx(
        scores[-1].topk(3).values.tolist(), abs=1e-3
    )
    assert place.ask().logprobs is None


def test_tools_are_rendered_and_counted(place: Place) -> None:
    found = place.ask(SamplingParams(temperature=0, max_tokens=4), tools=(WEATHER,))
    assert found.input_tokens == place.engine.count_tokens(HELLO, (WEATHER,))
    assert found.input_tokens > place.engine.count_tokens(HELLO)


def test_a_request_that_is_given_up_gets_no_further_event(place: Place) -> None:
    events: list[Event] = []
    begun = threading.Event()

    def deliver(event: Event) -> None:
        events.append(event)
        begun.set()

    number = place.engine.submit(GenerationRequest(HELLO, LONG), deliver)
    assert begun.wait(SECONDS)
    place.engine.cancel(number)
    wait_for(lambda: place.engine.stats().num_active + place.engine.stats().num_waiting == 0)
    count = len(events)
    assert place.ask().text == place.expected()
    assert len(events) == count
    assert not any(isinstance(event, Generation | ApiError) for event in events)
    place.engine.cancel(number)  # one that has ended is left alone


def test_a_request_whose_time_is_up_says_what_it_had(place: Place) -> None:
    with pytest.raises(ModelTimeoutException, match="it had written"):
        place.ask(LONG, timeout_seconds=0.001)
    assert place.ask().text == place.expected()


def test_figures_grow_with_what_was_answered(place: Place) -> None:
    # A request is counted a moment after its last event.
    wait_for(lambda: place.engine.stats().idle_seconds > 0)
    before = place.engine.stats()
    found = place.ask(adapter=place.adapters[0])
    wait_for(lambda: place.engine.stats().idle_seconds > 0)
    after = place.engine.stats()
    assert after.num_requests == before.num_requests + 1
    assert after.input_tokens == before.input_tokens + found.input_tokens
    assert after.output_tokens == before.output_tokens + found.output_tokens
    assert sum(after.first_token_seconds.counts) == sum(before.first_token_seconds.counts) + 1
    assert after.num_adapters >= 1
    assert after.adapter_bytes > 0
    assert after.num_pages > 0
    assert (after.num_active, after.num_waiting) == (0, 0)


@pytest.mark.parametrize("name", ["own", "stand-in"])
def test_an_engine_that_ends_tells_all_requests(folder: Path, name: str) -> None:
    engine = OPENERS[name](folder)
    events: list[Event] = []
    begun = threading.Event()

    def deliver(event: Event) -> None:
        events.append(event)
        begun.set()

    engine.submit(GenerationRequest(HELLO, LONG), deliver)
    assert begun.wait(SECONDS)
    engine.close()
    assert isinstance(events[-1], ServiceUnavailableException)
    with pytest.raises(ServiceUnavailableException):
        engine.submit(GenerationRequest(HELLO, GREEDY), deliver)
