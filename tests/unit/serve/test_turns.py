"""The engine under several owners: who is served first and who gives way. No answer changes."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.serve.tiny_chat import stream, write_random_adapter, write_tiny_chat

from outcrop.data.records import Message
from outcrop.errors import ModelErrorException, ThrottlingException
from outcrop.serve.engine import BatchEngine
from outcrop.serve.fairness import ON_DEMAND, PROVISIONED, Limits
from outcrop.serve.plain import PlainBackend
from outcrop.serve.rate import ASSUMED, RateMeter
from outcrop.serve.request import (
    Event,
    Generation,
    GenerationRequest,
    Owner,
    SamplingParams,
    TokenEvent,
)

SECONDS = 60.0
ANNA, BERT = Owner("anna", "base"), Owner("bert", "base")
BOUGHT = Owner("carl", "custom", "t1", 1)


class Narrow(PlainBackend):
    """The torch backend with fewer pages and rows, and a note of who is in each pass."""

    def __init__(self, folder: Path, *, num_pages: int = 0, max_rows: int = 0) -> None:
        super().__init__(folder, threads=1, dtype=torch.float32)
        self.num_pages = num_pages or self.num_pages
        self.max_rows = max_rows or self.max_rows
        self.passes: list[list[int]] = []

    def run(self, parts: object) -> object:  # type: ignore[override]
        self.passes.append([len(part.token_ids) for part in parts])  # type: ignore[attr-defined]
        return super().run(parts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"), ends=False)


Start = Callable[..., BatchEngine]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts engines that are closed at the end."""
    engines: list[BatchEngine] = []

    def begin(*, num_pages: int = 0, max_rows: int = 0, **options: object) -> BatchEngine:
        backend = Narrow(folder, num_pages=num_pages, max_rows=max_rows)
        engines.append(BatchEngine(folder, threads=1, backend=backend, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield begin
    for engine in engines:
        engine.close()


class Notes:
    """Takes the events of many requests; holds the engine's thread at the first until let go."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self.ended: list[str] = []
        self.begun, self._free = threading.Event(), threading.Event()
        self._changed = threading.Condition()

    def of(self, name: str) -> Callable[[Event], None]:
        self.events[name] = []

        def take(event: Event) -> None:
            self.begun.set()
            assert self._free.wait(SECONDS)
            with self._changed:
                self.events[name].append(event)
                if not isinstance(event, TokenEvent):
                    self.ended.append(name)
                self._changed.notify_all()

        return take

    def let_go(self) -> None:
        self._free.set()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ended) >= count, SECONDS)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def request(owner: Owner, text: str = "Hello", tokens: int = 8) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    return GenerationRequest((Message("user", text),), sampling, owner=owner)


def held(engine: BatchEngine, notes: Notes, asked: list[tuple[str, GenerationRequest]]) -> None:
    """Submit a request, and all others while the engine's thread is held at its first token."""
    (name, first), *others = asked
    engine.submit(first, notes.of(name))
    assert notes.begun.wait(SECONDS)
    for name, other in others:
        engine.submit(other, notes.of(name))
    notes.let_go()
    notes.wait_for(len(asked))


def test_who_bought_a_slot_has_it_at_once_and_who_lent_it_goes_on_to_the_same_answer(
    start: Start,
) -> None:
    engine = start(limits=Limits(slots=1))
    texts = {"lent": "Hello", "waits": "Tell me", "bought": "Now then"}
    alone = {
        name: list(stream(engine, request(ANNA, text, 60)))[-1] for name, text in texts.items()
    }
    notes = Notes()
    held(
        *(engine, notes),
        [
            ("lent", request(ANNA, texts["lent"], 60)),
            ("waits", request(ANNA, texts["waits"], 60)),
            ("bought", request(BOUGHT, texts["bought"], 60)),
        ],
    )
    assert notes.ended == ["bought", "lent", "waits"]
    assert engine.stats().num_preempted == 1
    assert {name: events[-1] for name, events in notes.events.items()} == alone


def test_another_accounts_request_does_not_wait_for_a_flood(start: Start) -> None:
    engine = start(limits=Limits(slots=4))
    notes = Notes()
    flood = [(f"flood {number}", request(ANNA, tokens=40)) for number in range(12)]
    held(engine, notes, [*flood, ("other", request(BERT, tokens=40))])
    assert notes.ended.index("other") < 5
    assert all(isinstance(events[-1], Generation) for events in notes.events.values())


def test_where_pages_run_out_requests_on_demand_give_theirs_first(start: Start) -> None:
    engine = start(num_pages=32, limits=Limits(slots=8))
    texts = [f"{number} Hello there" for number in range(6)]
    alone = [list(stream(engine, request(ANNA, text, 100)))[-1] for text in texts]
    notes = Notes()
    owners = [ANNA, ANNA, BERT, BERT, BOUGHT, BOUGHT]
    held(
        *(engine, notes),
        [(text, request(owner, text, 100)) for text, owner in zip(texts, owners, strict=True)],
    )
    assert engine.stats().num_preempted > 0
    assert {"4 Hello there", "5 Hello there"} <= set(notes.ended[:3])
    assert [notes.events[text][-1] for text in texts] == alone


def test_a_huge_prompt_of_one_account_leaves_room_in_each_pass_for_another(
    start: Start, folder: Path
) -> None:
    engine = start(max_rows=32)
    notes = Notes()
    held(
        *(engine, notes),
        [
            ("stream", request(BERT, tokens=40)),
            ("huge", request(ANNA, "All work and no play. " * 20, 2)),
            ("small", request(BERT, "Hello there, you", 2)),
        ],
    )
    assert notes.ended.index("small") < notes.ended.index("huge")
    backend = engine._backend
    assert isinstance(backend, Narrow)
    beside = [rows for rows in backend.passes if max(rows) > 1]
    assert all(1 in rows for rows in beside[2:]), "the stream gets its token in every pass"


def test_prompts_on_demand_take_little_of_a_pass_beside_a_reservation(start: Start) -> None:
    engine = start(max_rows=256, limits=Limits(slots=4))
    notes = Notes()
    held(
        *(engine, notes),
        [
            ("bought", request(BOUGHT, tokens=60)),
            ("huge", request(ANNA, "All work and no play. " * 20, 2)),
        ],
    )
    backend = engine._backend
    assert isinstance(backend, Narrow)
    assert ASSUMED.prompt_cost == 0.25
    assert max(rows for lengths in backend.passes[1:] for rows in lengths) == 16
    assert notes.ended[0] == "huge", "it does not stand still either"


def test_a_waiting_request_that_gives_its_place_up_is_told_so(start: Start) -> None:
    engine = start(limits=Limits(slots=1, max_waiting=3))
    notes = Notes()
    flood = [(f"flood {number}", request(ANNA)) for number in range(4)]
    held(engine, notes, [*flood, ("other", request(BERT))])
    (refusal,) = notes.events["flood 3"]
    assert isinstance(refusal, ThrottlingException)
    assert refusal.members["retryAfterSeconds"] == 1.0
    assert isinstance(notes.events["other"][-1], Generation)
    assert engine.stats().classes[ON_DEMAND].num_throttled == 1


def test_beyond_its_rate_a_throughput_is_refused_and_others_are_not(start: Start) -> None:
    engine = start(meter=RateMeter(fixed=2), limits=Limits(burst_seconds=1))
    list(stream(engine, request(BOUGHT, tokens=30)))
    with pytest.raises(ThrottlingException, match="1 model unit of the provisioned") as caught:
        engine.submit(request(BOUGHT), lambda event: None)
    seconds = caught.value.members["retryAfterSeconds"]
    assert isinstance(seconds, float)
    assert 1 < seconds <= 6.1
    assert isinstance(list(stream(engine, request(ANNA)))[-1], Generation)
    stats = engine.stats()
    assert stats.reservations == {"t1": 1.0}
    assert stats.classes[PROVISIONED].num_throttled == 1
    assert stats.classes[PROVISIONED].served_tokens > 30 < stats.classes[ON_DEMAND].served_tokens


def test_what_is_computed_again_after_giving_way_is_not_charged_again(start: Start) -> None:
    engine = start(num_pages=32)
    notes = Notes()
    asked = [(f"{number}", request(ANNA, f"{number} Hello", 100)) for number in range(5)]
    held(engine, notes, asked)
    wait_until(lambda: engine.stats().num_active == 0)
    stats = engine.stats()
    assert stats.num_preempted > 0
    assert stats.classes[ON_DEMAND].served_tokens == stats.input_tokens + stats.output_tokens


def test_a_model_that_is_deleted_while_it_answers_fails_no_other_request(
    folder: Path, tmp_path: Path
) -> None:
    artifacts = [write_random_adapter(folder, tmp_path / str(seed), seed) for seed in (1, 2)]
    backend = PlainBackend(folder, threads=1, dtype=torch.float32, max_adapter_bytes=1)
    engine = BatchEngine(folder, threads=1, backend=backend)

    def of(artifact: Path) -> GenerationRequest:
        return replace(request(ANNA, tokens=20), adapter=str(artifact))

    try:
        alone = [list(stream(engine, of(artifact)))[-1] for artifact in artifacts]
        # Alone it is in memory, and its files are not needed any more.
        events = stream(engine, of(artifacts[1]))
        next(events)
        shutil.rmtree(artifacts[1])
        assert list(events)[-1] == alone[1]
        # Beside another, for which there is room only once, they are read again.
        notes = Notes()
        held(engine, notes, [("kept", of(artifacts[0])), ("deleted", of(artifacts[1]))])
        assert notes.events["kept"][-1] == alone[0]
        (error,) = notes.events["deleted"]
        assert isinstance(error, ModelErrorException)
        assert str(tmp_path) not in error.message
    finally:
        engine.close()


# --- the rate ------------------------------------------------------------------------------------


def test_the_rate_is_measured_once_while_nobody_asks_and_kept(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outcrop.serve.engine.QUIET_SECONDS", 0.02)
    file = tmp_path / "rates" / "r.json"
    engine = start(meter=RateMeter(file), limits=Limits(slots=4))
    assert engine.stats().full_batch_tokens_per_second == ASSUMED.tokens_per_second
    wait_until(file.exists)
    wait_until(lambda: engine.stats().full_batch_tokens_per_second != ASSUMED.tokens_per_second)
    found = engine.stats()
    assert found.full_batch_tokens_per_second > 0
    assert found.num_requests == found.num_passes == found.input_tokens == 0
    assert engine._pool.num_available == engine._pool.num_pages
    assert isinstance(list(stream(engine, request(ANNA)))[-1], Generation)

    again = start(meter=RateMeter(file), limits=Limits(slots=4))
    assert again.stats().full_batch_tokens_per_second == found.full_batch_tokens_per_second
    backend = again._backend
    assert isinstance(backend, Narrow)
    assert backend.passes == []


def test_a_request_ends_the_measuring_and_is_answered(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outcrop.serve.engine.QUIET_SECONDS", 0.0)
    meter = RateMeter(tmp_path / "r.json")
    engine = start(meter=meter, limits=Limits(slots=4))
    backend = engine._backend
    assert isinstance(backend, Narrow)
    going_on, asked = threading.Event(), threading.Event()
    run = backend.run

    def wait_at_each_pass(parts: object) -> object:
        going_on.set()
        assert asked.wait(SECONDS)
        return run(parts)

    monkeypatch.setattr(backend, "run", wait_at_each_pass)
    assert going_on.wait(SECONDS)
    events = stream(engine, request(ANNA))
    asked.set()
    assert isinstance(list(events)[-1], Generation)
    wait_until(lambda: not meter.can_measure)
    assert meter.rates != ASSUMED


def test_full_batches_of_real_requests_correct_the_rate_upwards_only(tmp_path: Path) -> None:
    meter = RateMeter(tmp_path / "r.json")

    def observe(answers: int, prompts: int, seconds: float, passes: int = 16) -> float:
        for _ in range(passes):
            meter.note(answers, prompts, 64, seconds)
        return meter.rates.tokens_per_second

    assert observe(64, 1, 0.1) == observe(31, 0, 0.1) == observe(64, 0, 10.0) == 100
    assert observe(64, 0, 0.1, passes=15) == 100
    assert observe(64, 0, 0.1, passes=1) == pytest.approx(640)
    assert observe(64, 0, 0.2) == pytest.approx(640)
    assert RateMeter(tmp_path / "r.json").rates == meter.rates
    assert RateMeter(tmp_path / "r.json", fixed=7).rates.tokens_per_second == 7


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"tokens_per_second": 1}', '{"tokens_per_second":0,"prompt_tokens_per_second":0}'],
)
def test_a_file_that_tells_no_rate_is_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    meter = RateMeter(tmp_path / "r.json")
    assert meter.rates == ASSUMED
    assert meter.can_measure
