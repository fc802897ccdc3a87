"""The engine, on a tiny model: answers, limits, turns, cancellation, adapters."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
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

from outcrop.data.records import Message
from outcrop.errors import (
    ModelErrorException,
    ModelTimeoutException,
    ServiceUnavailableException,
    ThrottlingException,
    ValidationException,
)
from outcrop.models.artifact import folder_digest
from outcrop.models.lora import load_adapter, set_adapter
from outcrop.serve.adapters import Adapters
from outcrop.serve.engine import MAX_ACTIVE, BatchEngine
from outcrop.serve.fairness import Limits
from outcrop.serve.forward import is_compiled
from outcrop.serve.network import load_network
from outcrop.serve.paged import PagedBackend
from outcrop.serve.plain import MAX_ROWS, PlainBackend
from outcrop.serve.request import (
    Event,
    Generation,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)

CONTEXT = 512
HELLO = (Message("user", "Hello there, what is the weather like?"),)
GREEDY = SamplingParams(temperature=0, max_tokens=60)
SECONDS = 60.0
Start = Callable[..., BatchEngine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifacts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("artifacts")
    return [write_random_adapter(folder, place / str(seed), seed) for seed in range(1, 4)]


@pytest.fixture(scope="module", params=["compiled", "torch"])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts an engine on either backend. The compiled one holds its weights in bfloat16."""
    if request.param == "torch":
        return partial(BatchEngine, threads=1, dtype=torch.float32)
    if not is_compiled():
        pytest.skip("there is no C compiler")
    return partial(BatchEngine, threads=2)


@pytest.fixture(scope="module")
def shared(folder: Path, start: Start) -> Iterator[BatchEngine]:
    yield from running(start(folder))


@pytest.fixture
def engine(folder: Path, start: Start) -> Iterator[BatchEngine]:
    yield from running(start(folder))


def running(engine: BatchEngine) -> Iterator[BatchEngine]:
    yield engine
    engine.close()


def ask(
    engine: BatchEngine,
    sampling: SamplingParams = GREEDY,
    messages: tuple[Message, ...] = HELLO,
    adapter: Path | None = None,
) -> Generation:
    request = GenerationRequest(messages, sampling, str(adapter) if adapter else None)
    *pieces, last = stream(engine, request)
    if isinstance(last, Exception):
        raise last
    assert isinstance(last, Generation)
    told = "".join(piece.text for piece in pieces if isinstance(piece, TokenEvent))
    assert last.text.startswith(told)
    return last


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


def computes_in_float32(engine: BatchEngine) -> bool:
    return isinstance(engine._backend, PlainBackend)


class Held:
    """Takes events and holds the engine's thread at the first one until it is let go."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.begun, self._free = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.begun.set()
        assert self._free.wait(SECONDS)

    def let_go(self) -> None:
        self._free.set()


@pytest.mark.parametrize("with_adapter", [False, True])
def test_greedy_answers_are_those_of_transformers(
    shared: BatchEngine, folder: Path, artifacts: list[Path], with_adapter: bool
) -> None:
    if not computes_in_float32(shared):
        pytest.skip("in bfloat16 the likeliest of near ones may be another: see test_forward.py")
    reference = load_reference(folder)
    if with_adapter:
        set_adapter(reference, load_adapter(artifacts[0]))
    renderer = shared.renderer
    prompt = renderer.render_prompt(HELLO)
    ids = reference_ids(reference, prompt, 60, end=renderer.end_token_ids[0])
    found = ask(shared, adapter=artifacts[0] if with_adapter else None)
    assert found.text == renderer.decode(ids)
    assert (found.input_tokens, found.output_tokens) == (len(prompt), len(ids))


def test_the_base_answers_byte_for_byte_as_before_an_adapter(
    shared: BatchEngine, artifacts: list[Path]
) -> None:
    before = ask(shared)
    custom = [ask(shared, adapter=artifact).text for artifact in artifacts]
    assert len({before.text, *custom}) == 4
    assert ask(shared) == before
    assert [ask(shared, adapter=artifact).text for artifact in artifacts] == custom


def test_requests_of_many_adapters_at_once_do_not_mix(
    engine: BatchEngine, artifacts: list[Path]
) -> None:
    kinds = [None, *artifacts] * 3
    alone = [ask(engine, adapter=kind) for kind in kinds]
    held = Held()
    engine.submit(GenerationRequest(HELLO, GREEDY), held)
    assert held.begun.wait(SECONDS)
    streams = [
        stream(engine, GenerationRequest(HELLO, GREEDY, str(kind) if kind else None))
        for kind in kinds
    ]
    held.let_go()
    assert [list(events)[-1] for events in streams] == alone


def test_adapters_are_kept_up_to_a_bound_and_read_again(
    folder: Path, artifacts: list[Path], start: Start
) -> None:
    engine = start(folder, max_adapter_bytes=1)
    try:
        first = ask(engine, adapter=artifacts[0])
        for artifact in artifacts[1:]:
            ask(engine, adapter=artifact)
        assert engine.stats().num_adapters == 1
        assert ask(engine, adapter=artifacts[0]) == first
        assert engine.stats().num_adapter_loads == 4
    finally:
        engine.close()


def test_an_adapter_is_read_once_while_there_is_room(
    engine: BatchEngine, artifacts: list[Path]
) -> None:
    for artifact in [*artifacts, *artifacts]:
        ask(engine, adapter=artifact)
    stats = engine.stats()
    assert (stats.num_adapters, stats.num_adapter_loads) == (3, 3)
    assert stats.adapter_bytes > 0
    assert (stats.num_own, stats.own_bytes) == (0, 0)
    # What ended requests left may be taken over: their pages are of use.
    used = stats.num_pages - stats.num_pages_free
    assert stats.page_bytes == used * engine._backend.page_bytes
    assert stats.base_bytes > 0


def test_a_model_with_weights_of_its_own_is_served_beside_the_base(
    engine: BatchEngine, tmp_path: Path, start: Start
) -> None:
    own = write_tiny_chat(tmp_path / "own", seed=9)
    alone = start(own)
    try:
        wanted = ask(alone)
    finally:
        alone.close()
    base = ask(engine)
    assert ask(engine, adapter=own) == wanted != base
    assert ask(engine) == base


def test_an_adapter_over_own_weights_answers_with_both(
    engine: BatchEngine, tmp_path: Path, start: Start
) -> None:
    both = write_tiny_chat(tmp_path / "both", seed=9)
    whole = ask(engine, adapter=write_tiny_chat(tmp_path / "whole", seed=9))
    write_random_adapter(both, both / "adapter", seed=2)
    alone = start(tmp_path / "whole")
    try:
        wanted = ask(alone, adapter=both / "adapter")
    finally:
        alone.close()
    assert ask(engine, adapter=both) == wanted != whole


def test_models_with_own_weights_that_take_turns_are_read_once_each(
    engine: BatchEngine, tmp_path: Path
) -> None:
    owns = [write_tiny_chat(tmp_path / str(seed), seed=seed) for seed in (7, 8)]
    answers = [ask(engine, adapter=own) for own in (*owns, *owns)]
    assert answers[:2] == answers[2:]
    assert engine.stats().num_adapter_loads == 2


def test_what_is_over_the_bytes_for_own_weights_is_read_again(folder: Path, tmp_path: Path) -> None:
    owns = [write_tiny_chat(tmp_path / str(seed), seed=seed) for seed in (7, 8)]
    adapters = Adapters(load_network(folder, torch.float32), dtype=torch.float32, max_own_bytes=0)
    networks = [adapters.use(str(own)) for own in (owns[0], owns[0], owns[1], owns[0])]
    assert networks[0] is networks[1]
    assert networks[0] is not networks[3]
    assert adapters.num_loaded == 3


def test_a_damaged_adapter_fails_its_requests_only(
    engine: BatchEngine, artifacts: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(artifacts[0], broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    base = ask(engine)
    for adapter in (broken, tmp_path / "absent"):
        with pytest.raises(ModelErrorException, match="cannot be used") as caught:
            ask(engine, adapter=adapter)
        assert str(tmp_path) not in caught.value.message
    assert ask(engine) == base
    assert ask(engine, adapter=artifacts[0]) != base


def test_an_artifact_that_changed_since_it_was_published_fails_its_requests_only(
    engine: BatchEngine, artifacts: list[Path], tmp_path: Path
) -> None:
    changed, same = (shutil.copytree(artifacts[0], tmp_path / name) for name in ("1", "2"))
    digest = folder_digest(artifacts[0])
    weights = changed / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one number: it is still an adapter
    weights.write_bytes(content)
    wanted = ask(engine, adapter=artifacts[0])
    for adapter, is_whole in ((same, True), (changed, False), (same, True)):
        request = GenerationRequest(HELLO, GREEDY, str(adapter), digest)
        last = list(stream(engine, request))[-1]
        if is_whole:
            assert last == wanted
        else:
            assert isinstance(last, ModelErrorException)
            assert "changed or damaged" in last.message


def test_an_adapter_of_another_model_is_refused(engine: BatchEngine, tmp_path: Path) -> None:
    other = write_tiny_chat(tmp_path / "other", hidden_size=32)
    adapter = write_random_adapter(other, tmp_path / "adapter")
    base = ask(engine)
    with pytest.raises(ModelErrorException, match="do not fit"):
        ask(engine, adapter=adapter)
    assert ask(engine) == base


def test_a_stop_sequence_ends_the_text_before_it(shared: BatchEngine) -> None:
    whole = ask(shared)
    stop = whole.text[20:24]
    found = ask(shared, SamplingParams(temperature=0, max_tokens=60, stop=("\0", stop)))
    assert found.text == whole.text[: whole.text.index(stop)]
    assert (found.finish_reason, found.stop_sequence) == ("stop_sequence", stop)
    assert found.output_tokens < whole.output_tokens


def test_no_piece_of_a_stop_sequence_is_ever_released(shared: BatchEngine) -> None:
    whole = ask(shared)
    stop = whole.text[20:26]
    sampling = SamplingParams(temperature=0, max_tokens=60, stop=(stop,))
    *pieces, last = stream(shared, GenerationRequest(HELLO, sampling))
    told = "".join(piece.text for piece in pieces if isinstance(piece, TokenEvent))
    assert isinstance(last, Generation)
    assert told == last.text == whole.text[: whole.text.index(stop)]


def test_text_held_back_for_a_stop_sequence_is_not_lost(shared: BatchEngine) -> None:
    whole = ask(shared)
    stop = whole.text[-3:] + "and more"
    found = ask(shared, SamplingParams(temperature=0, max_tokens=60, stop=(stop,)))
    assert found == whole


def test_a_seed_repeats_an_answer(shared: BatchEngine) -> None:
    def drawn(seed: int | None) -> str:
        return ask(shared, SamplingParams(temperature=1.0, max_tokens=40, seed=seed)).text

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_max_tokens_ends_an_answer_with_length(shared: BatchEngine) -> None:
    whole = ask(shared)
    for count in (1, 2, 5):
        found = ask(shared, SamplingParams(temperature=0, max_tokens=count))
        assert (found.finish_reason, found.output_tokens) == ("length", count)
        assert whole.text.startswith(found.text.rstrip("\ufffd"))


def test_the_end_token_ends_an_answer_with_stop(
    tmp_path: Path, shared: BatchEngine, folder: Path, start: Start
) -> None:
    prompt = shared.renderer.render_prompt(HELLO)
    end = shared.renderer.end_token_ids[0]
    ids = reference_ids(load_reference(folder), prompt, 60, end=end)
    place = ids.index(ids[3])
    engine = start(write_tiny_chat(tmp_path / "ended", eos_token_id=ids[3]))
    try:
        found = ask(engine)
    finally:
        engine.close()
    assert (found.finish_reason, found.output_tokens) == ("stop", place + 1)
    assert found.text == shared.renderer.decode(ids[:place])


def test_log_probabilities_belong_to_the_tokens_of_the_text(
    shared: BatchEngine, folder: Path
) -> None:
    found = ask(shared, SamplingParams(temperature=0, max_tokens=8, logprobs=True))
    assert found.logprobs is not None
    assert len(found.logprobs) == found.output_tokens
    prompt = shared.renderer.render_prompt(HELLO)
    reference = load_reference(folder)
    scores = torch.log_softmax(reference(input_ids=torch.tensor([prompt])).logits[0, -1], 0)
    assert found.logprobs[0].logprob == pytest.approx(
        float(scores.max()), abs=1e-4 if computes_in_float32(shared) else 0.05
    )
    assert ask(shared, SamplingParams(temperature=0, max_tokens=8)).logprobs is None


@pytest.mark.parametrize("length", [1, 2, 40, 700])
def test_log_probabilities_of_a_prompt_are_those_of_the_model(
    folder: Path, tmp_path: Path, start: Start, length: int
) -> None:
    long = write_tiny_chat(tmp_path / "long", max_position_embeddings=1024)
    engine = start(long)
    prompt = tuple((7 * place) % 250 for place in range(length))
    sampling = SamplingParams(
        temperature=0, max_tokens=2, prompt_logprobs=True, logprobs=True, top_logprobs=3
    )
    try:
        for _ in range(2):  # nothing of it is taken over from the first time
            request = GenerationRequest((), sampling, prompt=prompt)
            found = list(stream(engine, request))[-1]
            assert isinstance(found, Generation)
            assert found.prompt_logprobs is not None
            assert found.logprobs is not None
            told = found.prompt_logprobs
            assert (len(told), told[0].logprob) == (length, None)
            with torch.no_grad():
                logits = load_reference(long)(input_ids=torch.tensor([prompt])).logits[0]
            scores = torch.log_softmax(logits, -1)
            close = 1e-3 if computes_in_float32(engine) else 0.25
            for place, token in enumerate(told[1:]):
                assert token.logprob == pytest.approx(
                    float(scores[place, prompt[place + 1]]), abs=close
                )
                assert token.top[0][1] == pytest.approx(float(scores[place].max()), abs=close)
                assert [of for _, of in token.top] == sorted((of for _, of in token.top))[::-1]
            assert found.logprobs[0].logprob == found.logprobs[0].top[0][1]
            assert found.input_tokens == length
    finally:
        engine.close()


def test_a_prompt_is_taken_as_it_stands_as_text_or_as_tokens(shared: BatchEngine) -> None:
    text = "Hello there, what"
    ids = tuple(shared.renderer.tokenizer.encode(text))
    answers = []
    for prompt in (text, ids):
        request = GenerationRequest((), GREEDY, prompt=prompt)
        answers.append(list(stream(shared, request))[-1])
    assert answers[0] == answers[1]
    assert isinstance(answers[0], Generation)
    assert answers[0].input_tokens == len(ids)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ((), "empty"),
        ((1, 400), "the token 400"),
        ((-1,), "the token -1"),
        ((1,) * CONTEXT, f"{CONTEXT} tokens"),
        ("x" * 100_000, "100,000 characters"),
    ],
)
def test_a_prompt_that_cannot_be_taken_is_refused_with_the_reason(
    shared: BatchEngine, prompt: str | tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValidationException, match=says):
        shared.submit(GenerationRequest((), GREEDY, prompt=prompt), lambda event: None)


def test_a_prompt_longer_than_a_step_is_answered_as_a_whole(
    folder: Path, tmp_path: Path, start: Start
) -> None:
    long = write_tiny_chat(tmp_path / "long", max_position_embeddings=2048)
    messages = (Message("user", "All work and no play. " * 60),)
    engine = start(long)
    try:
        found = ask(engine, SamplingParams(temperature=0, max_tokens=10), messages)
        prompt = engine.renderer.render_prompt(messages)
    finally:
        engine.close()
    assert found.input_tokens == len(prompt) > 2 * MAX_ROWS
    end = engine.renderer.end_token_ids[0]
    ids = reference_ids(load_reference(long), prompt, 10, end=end)
    if computes_in_float32(engine):
        assert found.text == engine.renderer.decode(ids)
    assert engine.stats().num_passes >= found.input_tokens // MAX_ROWS + found.output_tokens


def test_a_prompt_and_answer_beyond_the_context_are_refused_with_both_numbers(
    shared: BatchEngine,
) -> None:
    length = shared.count_tokens(HELLO)
    fits = SamplingParams(temperature=0, max_tokens=CONTEXT - length)
    assert ask(shared, fits).output_tokens <= CONTEXT - length
    with pytest.raises(ValidationException) as caught:
        ask(shared, SamplingParams(max_tokens=CONTEXT - length + 1))
    for number in (length, CONTEXT - length + 1, CONTEXT):
        assert str(number) in caught.value.message


def test_without_max_tokens_the_answer_may_fill_the_context(shared: BatchEngine) -> None:
    found = ask(shared, SamplingParams(temperature=0))
    assert found.finish_reason == "stop" or found.input_tokens + found.output_tokens == CONTEXT
    with pytest.raises(ValidationException, match="Shorten the prompt"):
        ask(shared, SamplingParams(), (Message("user", "x" * CONTEXT),))


def test_messages_the_template_cannot_show_are_refused(shared: BatchEngine) -> None:
    with pytest.raises(ValidationException):
        ask(shared, messages=())
    with pytest.raises(ValidationException):
        shared.count_tokens((Message("user", "\ud800"),))


def test_a_cancelled_request_gets_no_further_event_and_frees_its_place(
    engine: BatchEngine,
) -> None:
    held = Held()
    number = engine.submit(GenerationRequest(HELLO, SamplingParams(temperature=0)), held)
    assert held.begun.wait(SECONDS)
    engine.cancel(number)
    held.let_go()
    wait_for(lambda: engine.stats().num_requests == 1)
    assert len(held.events) == 1
    assert isinstance(held.events[0], TokenEvent)
    engine.cancel(number)
    assert engine.stats().num_active == 0


def test_a_request_that_takes_too_long_times_out(engine: BatchEngine) -> None:
    request = GenerationRequest(HELLO, GREEDY, timeout_seconds=0)
    (event,) = stream(engine, request)
    assert isinstance(event, ModelTimeoutException)
    assert ask(engine).output_tokens > 0


def test_a_full_queue_is_throttled_and_then_works_again(folder: Path, start: Start) -> None:
    engine = start(folder, limits=Limits(max_waiting=2))
    held = Held()
    try:
        engine.submit(GenerationRequest(HELLO, GREEDY), held)
        assert held.begun.wait(SECONDS)
        waiting = [stream(engine, GenerationRequest(HELLO, GREEDY)) for _ in range(2)]
        with pytest.raises(ThrottlingException, match="2 are waiting"):
            stream(engine, GenerationRequest(HELLO, GREEDY))
        held.let_go()
        assert all(isinstance(list(events)[-1], Generation) for events in waiting)
        assert ask(engine).output_tokens > 0
    finally:
        held.let_go()
        engine.close()


def test_a_short_request_does_not_wait_for_a_long_one(engine: BatchEngine) -> None:
    held = Held()
    engine.submit(GenerationRequest(HELLO, SamplingParams(temperature=0, max_tokens=400)), held)
    assert held.begun.wait(SECONDS)
    short = stream(engine, GenerationRequest(HELLO, SamplingParams(temperature=0, max_tokens=2)))
    held.let_go()
    assert isinstance(list(short)[-1], Generation)
    assert not any(isinstance(event, Generation) for event in held.events)


def test_waiting_requests_are_answered_in_their_order(engine: BatchEngine) -> None:
    held = Held()
    engine.submit(GenerationRequest(HELLO, GREEDY), held)
    assert held.begun.wait(SECONDS)
    order: list[int] = []

    def note(number: int) -> Callable[[Event], None]:
        return lambda event: order.append(number) if isinstance(event, Generation) else None

    sampling = SamplingParams(temperature=0, max_tokens=1)
    for number in range(3 * MAX_ACTIVE):
        engine.submit(GenerationRequest(HELLO, sampling), note(number))
    held.let_go()
    wait_for(lambda: len(order) == 3 * MAX_ACTIVE)
    assert order == sorted(order)


def test_closing_ends_what_is_being_answered_with_an_error(folder: Path, start: Start) -> None:
    engine = start(folder)
    held = Held()
    engine.submit(GenerationRequest(HELLO, SamplingParams(temperature=0)), held)
    assert held.begun.wait(SECONDS)
    waiting = stream(engine, GenerationRequest(HELLO, GREEDY))
    closing = threading.Thread(target=engine.close)
    closing.start()
    wait_for(lambda: engine._closing)
    held.let_go()
    closing.join(SECONDS)
    assert isinstance(held.events[-1], ServiceUnavailableException)
    assert isinstance(list(waiting)[-1], ServiceUnavailableException)
    with pytest.raises(ServiceUnavailableException):
        ask(engine)


@pytest.mark.parametrize("kind", [TokenEvent, object], ids=["a token", "every event"])
def test_a_failure_nobody_foresaw_ends_one_request_only(engine: BatchEngine, kind: type) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, kind):
            raise ZeroDivisionError

    before = ask(engine)
    engine.submit(GenerationRequest(HELLO, GREEDY), fail)
    wait_for(lambda: engine.stats().num_requests == 2)
    assert ask(engine) == before


def test_scores_that_are_not_numbers_fail_the_request(
    engine: BatchEngine, folder: Path, tmp_path: Path
) -> None:
    adapter = write_random_adapter(folder, tmp_path / "nan", size=float("inf"))
    with pytest.raises(ModelErrorException, match="not finite"):
        ask(engine, adapter=adapter)
    assert ask(engine).output_tokens > 0


def test_figures_count_what_was_done(engine: BatchEngine) -> None:
    assert engine.stats().num_requests == 0
    found = ask(engine)
    wait_for(lambda: engine.stats().num_requests == 1)
    stats = engine.stats()
    assert (stats.input_tokens, stats.output_tokens) == (found.input_tokens, found.output_tokens)
    assert (stats.num_active, stats.num_waiting) == (0, 0)
    assert 0 <= stats.idle_seconds < SECONDS


@pytest.fixture
def paged(folder: Path) -> Callable[..., BatchEngine]:
    """Starts an engine on the compiled pass with so many bytes for pages."""
    if not is_compiled():
        pytest.skip("there is no C compiler")

    def begin(max_page_bytes: int) -> BatchEngine:
        backend = PagedBackend(folder, threads=1, max_page_bytes=max_page_bytes)
        return BatchEngine(folder, threads=1, backend=backend)

    return begin


def test_where_pages_run_out_the_youngest_waits_and_all_answers_are_as_alone(
    paged: Callable[..., BatchEngine], artifacts: list[Path]
) -> None:
    kinds = [None, *artifacts] * 2
    sampling = SamplingParams(temperature=0, max_tokens=CONTEXT // 2)
    engine = paged(1)  # which is as many as one request of the whole context needs
    try:
        alone = [ask(engine, sampling, adapter=kind) for kind in kinds]
        held = Held()
        engine.submit(GenerationRequest(HELLO, sampling), held)
        assert held.begun.wait(SECONDS)
        requests = [GenerationRequest(HELLO, sampling, str(k) if k else None) for k in kinds]
        streams = [stream(engine, request) for request in requests]
        held.let_go()
        assert [list(events)[-1] for events in streams] == alone
        assert engine.stats().num_preempted > 0
        wait_for(lambda: engine.stats().num_active == 0)
        assert engine._pool.num_available == engine._pool.num_pages
    finally:
        engine.close()


def test_prompts_that_begin_alike_are_computed_once_and_answered_as_before(
    paged: Callable[..., BatchEngine], artifacts: list[Path]
) -> None:
    engine = paged(2**20)
    told = "Answer in one word. " * 8
    prompts = [(Message("user", told + question),) for question in ("Why?", "How so?", "Who?")]
    try:
        first = [ask(engine, GREEDY, prompt) for prompt in prompts]
        shared_tokens = engine.stats().prefix_tokens
        assert shared_tokens >= 2 * (len(told) // 32 * 16)
        ask(engine, GREEDY, prompts[0], artifacts[0])
        assert engine.stats().prefix_tokens == shared_tokens  # another model's are not taken
        fresh = paged(2**20)
        try:
            assert [ask(fresh, GREEDY, prompt) for prompt in reversed(prompts)] == first[::-1]
        finally:
            fresh.close()
    finally:
        engine.close()


def test_of_prompts_that_come_together_the_common_beginning_is_computed_once(
    paged: Callable[..., BatchEngine],
) -> None:
    engine = paged(2**20)
    told = "Answer in one word. " * 8
    held = Held()
    try:
        engine.submit(GenerationRequest(HELLO, GREEDY), held)
        assert held.begun.wait(SECONDS)
        streams = [
            stream(engine, GenerationRequest((Message("user", f"{told}{n}"),), GREEDY))
            for n in range(6)
        ]
        held.let_go()
        answers = [list(events)[-1] for events in streams]
        assert all(isinstance(answer, Generation) for answer in answers)
        assert engine.stats().prefix_tokens >= 5 * (len(told) // 32 * 16)
    finally:
        engine.close()


def test_an_adapter_waits_where_those_in_use_leave_no_room(
    folder: Path, artifacts: list[Path], start: Start
) -> None:
    engine = start(folder, max_adapter_bytes=1)
    held = Held()
    try:
        alone = [ask(engine, adapter=artifact) for artifact in artifacts]
        engine.submit(GenerationRequest(HELLO, GREEDY, str(artifacts[0])), held)
        assert held.begun.wait(SECONDS)
        streams = [stream(engine, GenerationRequest(HELLO, GREEDY, str(a))) for a in artifacts]
        held.let_go()
        assert [list(events)[-1] for events in streams] == alone
        assert engine.stats().num_adapters == 1
    finally:
        engine.close()
