"""What vLLM is asked, and what becomes of its answers and faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.unit.serve.tiny_chat import stream, write_random_adapter, write_tiny_chat
from tests.unit.serve.vllm_stand_in import StandIn, stand_in_library

from outcrop.data.records import Message
from outcrop.errors import (
    ModelError,
    ModelErrorException,
    SettingsError,
    ThrottlingException,
)
from outcrop.serve import vllm_library
from outcrop.serve.interface import EngineStats
from outcrop.serve.request import Event, Generation, GenerationRequest, Owner, SamplingParams
from outcrop.serve.routed import RoutedEngine
from outcrop.serve.server import open_engine
from outcrop.serve.vllm import VllmEngine, sampling_arguments
from outcrop.settings import Settings

HELLO = (Message("user", "Hello"),)
GREEDY = SamplingParams(temperature=0, max_tokens=3)
LONG = SamplingParams(temperature=0, max_tokens=400)
SECONDS = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"), ends=False)


@pytest.fixture
def client(folder: Path) -> StandIn:
    return StandIn(folder)


@pytest.fixture
def deaths() -> list[str]:
    return []


@pytest.fixture
def engine(folder: Path, client: StandIn, deaths: list[str]) -> Iterator[VllmEngine]:
    made = VllmEngine(
        folder,
        lambda: stand_in_library(client),
        max_rank=4,
        max_waiting=2,
        on_death=lambda: deaths.append("died"),
    )
    yield made
    made.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


def last(engine: VllmEngine, request: GenerationRequest) -> Event:
    *_, found = stream(engine, request)
    return found


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (SamplingParams(), {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": None}),
        (SamplingParams(temperature=0.5, top_p=0.9, top_k=7), {"top_p": 0.9, "top_k": 7}),
        (SamplingParams(top_p=0.0), {"temperature": 0.0, "top_p": 1.0}),
        (SamplingParams(top_k=1), {"temperature": 0.0, "top_k": 0}),
        (SamplingParams(seed=-1), {"seed": 2**63 - 1}),
        (SamplingParams(logprobs=True), {"logprobs": 0, "prompt_logprobs": None}),
        (
            SamplingParams(prompt_logprobs=True, top_logprobs=3),
            {"logprobs": None, "prompt_logprobs": 3},
        ),
        (
            SamplingParams(stop=("a",)),
            {"max_tokens": 9, "stop_token_ids": [5, 6], "ignore_eos": True, "detokenize": False},
        ),
    ],
)
def test_sampling_is_said_in_vllms_words(sampling: SamplingParams, wanted: dict[str, Any]) -> None:
    found = sampling_arguments(sampling, 9, (5, 6))
    assert found.items() >= wanted.items()
    assert "stop" not in found


def test_an_adapter_is_read_once_and_named_by_its_folder(
    engine: VllmEngine, client: StandIn, folder: Path, tmp_path: Path
) -> None:
    adapters = [write_random_adapter(folder, tmp_path / str(seed), seed) for seed in (1, 2)]
    for adapter in (adapters[0], adapters[1], adapters[0], None):
        name = str(adapter) if adapter else None
        assert isinstance(last(engine, GenerationRequest(HELLO, GREEDY, name)), Generation)
    named = [asked["lora"] and (asked["lora"].number, asked["lora"].path) for asked in client.asked]
    one, two = (str(adapter) for adapter in adapters)
    assert named == [(1, one), (2, two), (1, one), None]
    assert engine.stats().num_adapter_loads == 2


def test_provisioned_requests_come_first(engine: VllmEngine, client: StandIn) -> None:
    for owner in (Owner(), Owner(reservation="fast", units=1)):
        assert isinstance(last(engine, GenerationRequest(HELLO, GREEDY, owner=owner)), Generation)
    on_demand, provisioned = (asked["priority"] for asked in client.asked)
    assert provisioned < on_demand


def test_many_first_requests_read_an_adapter_once(
    engine: VllmEngine, folder: Path, tmp_path: Path
) -> None:
    adapter = str(write_random_adapter(folder, tmp_path / "1", 1))
    both = [stream(engine, GenerationRequest(HELLO, GREEDY, adapter)) for _ in range(2)]
    texts = [found.text for *_, found in both if isinstance(found, Generation)]
    assert len(texts) == 2
    assert engine.stats().num_adapter_loads == 1


def test_an_answer_that_is_over_or_given_up_is_aborted(engine: VllmEngine, client: StandIn) -> None:
    found = last(engine, GenerationRequest(HELLO, SamplingParams(0, max_tokens=12)))
    assert isinstance(found, Generation)
    stop = found.text[2:5]
    ended = last(engine, GenerationRequest(HELLO, SamplingParams(0, max_tokens=400, stop=(stop,))))
    assert isinstance(ended, Generation)
    assert ended.finish_reason == "stop_sequence"
    wait_for(lambda: len(client.aborted) == 1)
    begun = threading.Event()
    number = engine.submit(GenerationRequest(HELLO, LONG), lambda event: begun.set())
    assert begun.wait(SECONDS)
    engine.cancel(number)
    wait_for(lambda: len(client.aborted) == 2)
    wait_for(lambda: engine.stats().num_requests == 3)


def test_too_many_that_wait_are_refused(engine: VllmEngine) -> None:
    begun, held = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        begun.set()
        held.wait(SECONDS)  # the loop stands still, so nobody else gets a first token

    engine.submit(GenerationRequest(HELLO, GREEDY), hold)
    assert begun.wait(SECONDS)
    try:
        for _ in range(2):
            engine.submit(GenerationRequest(HELLO, GREEDY), lambda event: None)
        with pytest.raises(ThrottlingException, match="2 are waiting for this model"):
            engine.submit(GenerationRequest(HELLO, GREEDY), lambda event: None)
    finally:
        held.set()
    wait_for(lambda: engine.stats().num_active + engine.stats().num_waiting == 0)


def test_a_fault_of_vllm_fails_its_request_and_says_no_more_than_that(
    engine: VllmEngine, client: StandIn, deaths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    client.fault = RuntimeError("secret detail")
    found = last(engine, GenerationRequest(HELLO, GREEDY))
    assert isinstance(found, ModelErrorException)
    assert "secret" not in found.message
    assert "secret detail" in caplog.text
    assert deaths == []
    client.fault = None
    assert isinstance(last(engine, GenerationRequest(HELLO, GREEDY)), Generation)


def test_the_death_of_vllms_process_is_told_once(
    engine: VllmEngine, client: StandIn, deaths: list[str]
) -> None:
    client.fault, client.errored = RuntimeError("dead"), True
    for _ in range(2):
        assert isinstance(last(engine, GenerationRequest(HELLO, GREEDY)), ModelErrorException)
    assert deaths == ["died"]


def test_its_own_metrics_are_told(engine: VllmEngine) -> None:
    found: EngineStats = engine.stats()
    assert (found.num_pages, found.num_pages_free, found.num_preempted) == (100, 75, 2)
    assert found.num_passes == 5
    assert found.pass_tokens.bounds == (1.0, 8.0)
    assert found.pass_tokens.counts == (1, 2, 2)


def test_what_it_cannot_hold_goes_to_the_other_engine(
    engine: VllmEngine, folder: Path, tmp_path: Path
) -> None:
    adapter = write_random_adapter(folder, tmp_path / "1", 1)  # of rank 4
    assert engine.takes(None)
    assert engine.takes(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for change in ({"r": 5}, {"fan_in_fan_out": True}):
        text = json.dumps({**config, **change})
        (adapter / "adapter_config.json").write_text(text, encoding="utf-8")
        assert not engine.takes(str(adapter))
    assert not engine.takes(str(folder))
    with pytest.raises(ModelError):
        engine.takes(str(tmp_path))


def test_the_other_engine_is_started_when_it_is_needed(
    folder: Path, client: StandIn, tmp_path: Path
) -> None:
    opened: list[VllmEngine] = []

    def open_other() -> VllmEngine:
        opened.append(VllmEngine(folder, lambda: stand_in_library(client), max_rank=64))
        return opened[-1]

    first = VllmEngine(folder, lambda: stand_in_library(client), max_rank=2)
    both = RoutedEngine(first, open_other)
    adapter = str(write_random_adapter(folder, tmp_path / "1", 1))
    try:
        numbers = []
        for name in (None, adapter, adapter):
            done = threading.Event()

            def deliver(event: Event, done: threading.Event = done) -> None:
                if isinstance(event, Generation):
                    done.set()

            numbers.append(both.submit(GenerationRequest(HELLO, GREEDY, name), deliver))
            assert done.wait(SECONDS)
            assert len(opened) == (name is not None)
        assert [number % 2 for number in numbers] == [0, 1, 1]
        wait_for(lambda: both.stats().num_requests == 3)
        assert both.stats().num_pages == 200
        for number in numbers:
            both.cancel(number)
    finally:
        both.close()
    assert client.is_down


def test_vllm_that_does_not_start_is_told_with_what_to_do(folder: Path) -> None:
    def fail() -> vllm_library.Library:
        raise RuntimeError("no device")

    with pytest.raises(ModelError, match=r"no device\. Set serve_engine to own"):
        VllmEngine(folder, fail, max_rank=4)


def test_vllm_is_refused_where_it_is_not_installed_and_auto_does_without(folder: Path) -> None:
    if vllm_library.is_installed():
        pytest.skip("vllm is installed")
    with pytest.raises(SettingsError, match=r"pip install 'outcrop\[vllm\]'"):
        open_engine(folder, "tiny", Settings(serve_engine="vllm"))
    assert not vllm_library.wants_vllm("auto")
    assert not vllm_library.wants_vllm("own")
