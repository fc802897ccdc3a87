"""A batch job answers every record once, in order, whatever ends its attempts on the way."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, REGION, claimed, new_batch, status_of

from outcrop.errors import (
    DataError,
    LeaseLost,
    ModelErrorException,
    ServiceQuotaExceededException,
    ServingError,
    StopRequested,
    ThrottlingException,
    ValidationException,
)
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, role_arn
from outcrop.jobs import artifacts
from outcrop.jobs.attempt import StopFlag, run_attempt
from outcrop.jobs.batch import asking, running, stages
from outcrop.jobs.batch.journal import FILE, Answer, Journal, read_answers, to_line
from outcrop.models.catalog import shipped_models
from outcrop.serve.client import ModelClient
from outcrop.serve.request import Generation, GenerationRequest
from outcrop.settings import Settings
from outcrop.store import batches, jobs, servers, usage
from outcrop.store.database import transaction
from outcrop.store.rows import Job, TokenUsage

MODEL = next(model for model in shipped_models() if model.body_family == "titan")
MODEL_ARN = f"arn:aws:bedrock:{REGION}::foundation-model/{MODEL.model_id}"
INPUT, OUTPUT = S3Uri(BUCKET, "in/a.jsonl"), S3Uri(BUCKET, "out")
PID = 17


class Model(ModelClient):
    """A model server's client that says back what it was told, and what a test wants instead."""

    def __init__(self) -> None:
        super().__init__(Path("unused"))
        self.asked: list[str] = []
        self.in_place_of: dict[str, list[BaseException]] = {}
        """By what a record says: what is raised, one after the other, before it is answered."""
        self.before: Callable[[int], None] = lambda count: None
        """Called with the number of answers before each."""
        self.pid: int | None = PID
        self.seconds = 0.001
        """That an answer takes."""
        self.never: set[str] = set()
        """Records that are not answered."""
        self.requests: list[GenerationRequest] = []
        self.num_under_way = self.most_under_way = 0

    def __call__(self, socket: Path) -> ModelClient:
        return self

    async def generate(self, request: GenerationRequest) -> Generation:
        text = request.messages[-1].text
        self.requests.append(request)
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        try:
            # Every other one is slower: answers come out of order.
            await anyio.sleep(self.seconds * (1 + len(self.asked) % 2))
            self.before(len(self.asked))
            if text in self.never:
                raise ThrottlingException("wait", members={"retryAfterSeconds": 0.01})
            if errors := self.in_place_of.get(text):
                raise errors.pop(0)
        finally:
            self.num_under_way -= 1
        self.asked.append(text)
        return Generation(f"echo of {text}", 5, 3, "stop")

    async def stats(self) -> dict[str, Any]:
        if self.pid is None:
            raise ServingError("nobody listens")
        return {"pid": self.pid}


def record(text: str, **more: Any) -> dict[str, Any]:
    return {"modelInput": {"inputText": text}, **more}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in records)


RECORDS = [record(f"text {number}", recordId=f"id-{number}") for number in range(20)]


@pytest.fixture
def place(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def engine(place: Settings) -> Iterator[Engine]:
    for engine in bootstrapped(place):
        with transaction(engine) as connection:
            servers.want(connection, MODEL.weights)
            servers.mark_starting(connection, MODEL.weights, "model.sock")
            servers.mark_ready(connection, MODEL.weights, PID)
        yield engine


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore(**{INPUT.key: lines(*RECORDS)})


@pytest.fixture
def model() -> Model:
    return Model()


def held(engine: Engine, place: S3Uri = INPUT, **changes: Any) -> Job:
    """A batch job that was just claimed."""
    fields = {name: changes.pop(name) for name in ("expires_at",) if name in changes}
    spec = {
        "modelId": MODEL.model_id,
        "baseModelId": MODEL.model_id,
        "weights": MODEL.weights,
        "modelArn": MODEL_ARN,
        "inputDataConfig": {"s3InputDataConfig": {"s3Uri": str(place)}},
        "outputDataConfig": {"s3OutputDataConfig": {"s3Uri": str(OUTPUT)}},
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "timeoutDurationInHours": 24,
        **changes,
    }
    with transaction(engine) as connection:
        name = f"job-{len(jobs.live_jobs(connection))}-{datetime.now(UTC).timestamp()}"
        return claimed(
            connection, jobs.create_job(connection, new_batch(name, spec=spec, **fields))
        )


def again(engine: Engine, job: Job) -> Job:
    """The same job in its next attempt."""
    with transaction(engine) as connection:
        assert jobs.requeue(connection, job.id, job.fence, "killed")
        return claimed(connection, job)


def now(engine: Engine, job: Job) -> Job:
    with engine.connect() as connection:
        found = jobs.get_job_by_id(connection, job.id)
    assert found is not None
    return found


def output_of(objects: MemoryStore, job: Job, name: str = "a.jsonl") -> list[dict[str, Any]]:
    content = objects.content[OUTPUT.join(job.id).join(f"{name}.out")]
    return [json.loads(line) for line in content.splitlines()]


def manifest_of(objects: MemoryStore, job: Job) -> dict[str, int]:
    found: dict[str, int] = json.loads(
        objects.content[OUTPUT.join(job.id).join("manifest.json.out")]
    )
    return found


def used(engine: Engine) -> dict[bool, TokenUsage]:
    """What was counted, by whether a batch job asked."""
    day = timedelta(days=1)
    with engine.connect() as connection:
        found = usage.list_usage(
            *(connection, ACCOUNT, REGION),
            since=datetime.now(UTC) - day, until=datetime.now(UTC) + day,
        )  # fmt: skip
    return {key.batch: value for key, value in found.items() if key.model_arn == MODEL_ARN}


class Killed(BaseException):
    """Ends an attempt as a signal would: nothing is tidied up."""


def test_every_record_has_one_line_in_the_order_of_the_input(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert output_of(objects, job) == [
        {
            **item,
            "modelOutput": {
                "inputTextTokenCount": 5,
                "results": [
                    {
                        "tokenCount": 3,
                        "outputText": f"echo of {item['modelInput']['inputText']}",
                        "completionReason": "FINISH",
                    }
                ],
            },
        }
        for item in RECORDS
    ]
    assert manifest_of(objects, job) == {
        "totalRecordCount": 20, "processedRecordCount": 20, "successRecordCount": 20,
        "errorRecordCount": 0, "inputTokenCount": 100, "outputTokenCount": 60,
    }  # fmt: skip
    ended = now(engine, job)
    assert (ended.status, ended.phase) == ("completed", "InProgress")
    assert used(engine) == {True: TokenUsage(20, 100, 60)}
    assert all(request.owner.batch for request in model.requests)
    assert all((request.timeout_seconds or 0) > 24 * 3600 for request in model.requests)


def test_a_record_s_error_is_its_line_and_the_job_completes(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    objects.write(
        INPUT,
        lines(
            record("good"),
            {"modelInput": {"prompt": "of another family"}},
            record("too long"),
            record("spoilt", recordId="s"),
        ),
    )
    model.in_place_of["too long"] = [ValidationException("It does not fit.")]
    model.in_place_of["spoilt"] = [ModelErrorException("It failed.") for _ in range(9)]
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    found = output_of(objects, job)
    assert [item["recordId"] for item in found] == [
        "R0000000001",
        "R0000000002",
        "R0000000003",
        "s",
    ]
    assert "extraneous key [prompt]" in found[1]["error"]["errorMessage"]
    assert found[1]["error"]["errorCode"] == 400
    assert found[2]["error"] == {"errorCode": 400, "errorMessage": "It does not fit."}
    assert found[3]["error"] == {"errorCode": 424, "errorMessage": "It failed."}
    assert len(model.in_place_of["spoilt"]) == 9 - asking.MAX_FAILURES
    assert [set(item) for item in found[1:]] == [{"recordId", "modelInput", "error"}] * 3
    counts = manifest_of(objects, job)
    assert (counts["successRecordCount"], counts["errorRecordCount"]) == (1, 3)
    assert now(engine, job).status == "completed"
    assert used(engine) == {True: TokenUsage(1, 5, 3)}


def test_records_of_converse_are_read_and_answered_as_converse_is(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    message = {"role": "user", "content": [{"text": "hello"}]}
    objects.write(
        INPUT,
        lines(
            {"modelInput": {"messages": [message], "inferenceConfig": {"maxTokens": 9}}},
            {"modelInput": {"messages": [{"role": "nobody", "content": []}]}},
            {"modelInput": {"messages": [message], "guardrailConfig": {
                "guardrailIdentifier": "abcdefghijkl", "guardrailVersion": "1"}}},
        ),
    )  # fmt: skip
    job = held(engine, modelInvocationType="Converse")
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    good, *bad = output_of(objects, job)
    answer = good["modelOutput"]
    assert answer["output"]["message"]["content"] == [{"text": "echo of hello"}]
    assert answer["stopReason"] == "end_turn"
    assert answer["usage"] == {"inputTokens": 5, "outputTokens": 3, "totalTokens": 8}
    assert model.requests[0].sampling.max_tokens == 9
    assert "enum value set: [user, assistant" in bad[0]["error"]["errorMessage"]
    assert bad[1]["error"]["errorMessage"] == "Guardrails are not offered by this service."


def test_a_folder_s_files_have_an_output_each_and_other_objects_are_left_alone(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    objects.write(S3Uri(BUCKET, "in/sub/b.jsonl"), lines(record("of b")))
    objects.write(S3Uri(BUCKET, "in/empty.jsonl"), b"\n")
    objects.write(S3Uri(BUCKET, "in/readme.txt"), b"not a record")
    job = held(engine, S3Uri(BUCKET, "in"))
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    written = {uri.key for uri in objects.content if uri.key.startswith(f"out/{job.id}/")}
    names = ("a.jsonl.out", "empty.jsonl.out", "sub/b.jsonl.out", "manifest.json.out")
    assert written == {f"out/{job.id}/{name}" for name in names}
    assert len(output_of(objects, job)) == 20
    assert output_of(objects, job, "empty.jsonl") == []
    (of_b,) = output_of(objects, job, "sub/b.jsonl")
    assert of_b["modelOutput"]["results"][0]["outputText"] == "echo of of b"


def test_as_many_requests_are_under_way_as_the_engine_has_slots_and_a_few_that_wait(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    objects.write(INPUT, lines(*(record(f"text {number}") for number in range(200))))
    model.seconds = 0.05
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert len(output_of(objects, job)) == 200
    assert model.most_under_way == running.NUM_UNDER_WAY


def test_throttles_are_waited_out_and_not_reported(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    throttled = ThrottlingException("Too many requests.", members={"retryAfterSeconds": 0.001})
    model.in_place_of["text 3"] = [throttled] * 5
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert manifest_of(objects, job)["errorRecordCount"] == 0
    assert Counter(model.asked) == Counter(f"text {number}" for number in range(20))


def test_a_model_server_that_ends_costs_no_record(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    model.pid = None  # what was asked is not there any more
    cut_off = ModelErrorException("The model server ended before the answer was complete.")
    for text in ("text 2", "text 9"):
        model.in_place_of[text] = [cut_off, ServingError("nobody listens"), cut_off, cut_off]
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert manifest_of(objects, job)["successRecordCount"] == 20


def test_a_model_server_that_cannot_be_started_fails_the_job_with_the_reason(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(asking, "RETRY_SECONDS", 0.0)
    with transaction(engine) as connection:
        servers.mark_failed(connection, MODEL.weights, "the weights are damaged")
    job = held(engine)
    with pytest.raises(ModelErrorException, match="the weights are damaged"):
        stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert now(engine, job).phase == "Scheduled"


def kill_after(model: Model, count: int) -> None:
    def kill(answered: int) -> None:
        if answered >= count:
            raise Killed

    model.before = kill


def killed(
    place: Settings, engine: Engine, job: Job, objects: MemoryStore, model: Model, count: int
) -> None:
    kill_after(model, count)
    with pytest.raises(Killed):
        stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    model.before = lambda answered: None


def journal_of(place: Settings, job: Job) -> Path:
    return artifacts.work_folder(place, job.id, job.fence) / FILE


@settings(
    max_examples=7, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.integers(0, 20), st.floats(0, 1))
def test_a_job_goes_on_from_wherever_its_journal_was_cut(
    place: Settings, engine: Engine, objects: MemoryStore, count: int, part: float
) -> None:
    job, first, second = held(engine), Model(), Model()
    journal = Journal(journal_of(place, job).parent, 20, ())
    answered = [(7 * number) % 20 for number in range(count)]
    content = b'{"results":[]}'
    journal.add(Answer(number, content, False, 5, 3) for number in answered)
    journal.close()
    path = journal_of(place, job)
    size = int(part * path.stat().st_size)
    with path.open("r+b") as file:
        file.truncate(size)
    kept = [answer.number for answer in read_answers(path)]
    assert kept == answered[: len(kept)]
    assert size - sum(len(to_line(answer)) for answer in read_answers(path)) < len(
        to_line(Answer(19, content, False, 5, 3))
    )
    following = again(engine, job)
    stages.run(place, engine, following, lambda: False, objects=objects, connect=second)
    asked = {f"text {number}" for number in range(20)} - {f"text {number}" for number in kept}
    assert Counter(second.asked) == Counter(asked)
    assert [item["recordId"] for item in output_of(objects, job)] == [
        item["recordId"] for item in RECORDS
    ]
    assert manifest_of(objects, job)["successRecordCount"] == 20
    assert not first.asked


@given(st.data())
def test_damage_anywhere_in_a_journal_costs_only_what_it_hits(data: st.DataObject) -> None:
    answers = [Answer(number, b'"\\n %d"' % number, number % 3 == 0) for number in range(9)]
    whole = b"".join(to_line(answer) for answer in answers)
    place = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    damaged = whole[:place] + bytes([byte]) + whole[place + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.write_bytes(damaged)
        found = list(read_answers(path))
    assert all(answer in answers for answer in found)
    assert len(found) >= len(answers) - 2, "a line, and the next where their end was hit"


def test_kills_repeat_and_lose_no_record_and_count_each_token_once(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(running, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(running, "TELL_SECONDS", 0.0)
    monkeypatch.setattr(running, "NUM_UNDER_WAY", 2)
    model.seconds = 0.02
    job = held(engine)
    kept: set[int] = set()
    for count in (6, 13):
        asked_before = Counter(model.asked)
        killed(place, engine, job, objects, model, count)
        assert not {f"text {number}" for number in kept} & set(Counter(model.asked) - asked_before)
        now_kept = {answer.number for answer in read_answers(journal_of(place, job))}
        assert kept < now_kept, "an attempt begins with what the one before it had"
        kept = now_kept
        job = again(engine, job)
        assert now(engine, job).phase == "InProgress"
    before = len(model.asked)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert len(model.asked) - before == 20 - len(kept), "what was kept is not asked again"
    assert set(model.asked) == {f"text {number}" for number in range(20)}
    assert [item["recordId"] for item in output_of(objects, job)] == [
        item["recordId"] for item in RECORDS
    ]
    assert used(engine) == {True: TokenUsage(20, 100, 60)}


def test_an_attempt_without_the_lease_writes_nothing(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    job = held(engine)
    again(engine, job)
    with pytest.raises(LeaseLost):
        stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert not [uri for uri in objects.content if job.id in uri.key]


def test_the_next_attempt_asks_of_the_same_bytes_or_fails(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    job = held(engine)
    killed(place, engine, job, objects, model, 3)
    objects.write(INPUT, lines(record("another")))
    copy = artifacts.work_folder(place, job.id, job.fence) / "input" / "0.jsonl"
    job = again(engine, job)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert len(output_of(objects, job)) == 20, "its copy is what it was"

    objects.write(INPUT, lines(*RECORDS))
    other = held(engine)
    killed(place, engine, other, objects, model, 3)
    copy = artifacts.work_folder(place, other.id, other.fence) / "input" / "0.jsonl"
    copy.unlink()
    objects.write(INPUT, lines(record("another")))
    with pytest.raises(DataError, match="changed while the job ran"):
        stages.run(
            place, engine, again(engine, other), lambda: False, objects=objects, connect=model
        )


class Stop(StopFlag):
    """Set once a model has answered so many records."""

    def __init__(self, model: Model, count: int) -> None:
        super().__init__()
        self._model, self._count = model, count

    def __call__(self) -> bool:
        return len(self._model.asked) >= self._count


def test_a_job_that_is_stopped_hands_out_what_was_answered(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    model.never.add("text 4")
    job = held(engine)

    def run(place: Settings, engine: Engine, job: Job, stop: StopFlag) -> None:
        with transaction(engine) as connection:
            assert jobs.request_stop(connection, job.id)
        stages.run(place, engine, job, stop, objects=objects, connect=model)

    assert run_attempt(place, engine, job.id, job.fence, Stop(model, 19), run=run) == 0
    assert now(engine, job).status == "stopped"
    ids = [item["recordId"] for item in output_of(objects, job)]
    assert ids == [f"id-{number}" for number in range(20) if number != 4]
    counts = manifest_of(objects, job)
    assert (counts["totalRecordCount"], counts["processedRecordCount"]) == (20, 19)
    assert used(engine)[True].requests == 19


def test_a_service_that_shuts_down_hands_out_nothing_and_the_next_attempt_goes_on(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    model.never.add("text 4")
    job = held(engine)
    with pytest.raises(StopRequested):
        stages.run(place, engine, job, Stop(model, 19), objects=objects, connect=model)
    assert not [uri for uri in objects.content if job.id in uri.key]
    model.never.clear()
    model.asked.clear()
    stages.run(place, engine, again(engine, job), lambda: False, objects=objects, connect=model)
    assert model.asked == ["text 4"]


def test_a_job_whose_time_is_up_is_partly_completed_and_its_next_attempt_too(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    model.never.add("text 4")
    job = held(engine)
    with pytest.raises(StopRequested):
        stages.run(place, engine, job, Stop(model, 19), objects=objects, connect=model)
    job = replace(again(engine, job), expires_at=datetime.now(UTC))
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    ended = now(engine, job)
    assert (ended.status, ended.phase) == ("completed", "PartiallyCompleted")
    assert ended.result is not None
    assert "19 of 20 records" in ended.result["message"]
    assert len(output_of(objects, job)) == 19

    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    other = held(engine, expires_at=soon)
    stages.run(place, engine, other, lambda: False, objects=objects, connect=model)
    assert now(engine, other).phase == "PartiallyCompleted"
    assert manifest_of(objects, other)["processedRecordCount"] == 19


def test_a_job_whose_every_record_was_answered_completes_without_a_model_server(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    for late in (False, True):
        job = held(engine)
        with transaction(engine) as connection:
            batches.set_phase(connection, job.id, job.fence, "InProgress")
            servers.remove(connection, MODEL.weights)
        journal = Journal(journal_of(place, job).parent, 20, ())
        journal.add(Answer(number, b"{}", False, 5, 3) for number in range(20))
        journal.close()
        job = again(engine, job)
        job = replace(job, expires_at=datetime.now(UTC)) if late else job
        stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
        assert (now(engine, job).status, now(engine, job).phase) == ("completed", "InProgress")
        assert len(output_of(objects, job)) == 20
    assert not model.asked


def test_a_job_that_did_not_begin_in_time_expires(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    late = datetime.now(UTC) - timedelta(seconds=1)
    job = held(engine, expires_at=late)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    with transaction(engine) as connection:
        waiting = jobs.create_job(connection, new_batch("waits", expires_at=late))
        other = jobs.create_job(connection, new_batch("has time"))
        assert batches.is_any_due(connection, datetime.now(UTC))
        assert batches.end_expired(connection, datetime.now(UTC)) == [waiting.id]
        assert status_of(connection, other) == "queued"
    for ended in (now(engine, job), now(engine, waiting)):
        assert (ended.status, ended.phase) == ("failed", "Expired")
        assert "24 hours after it was submitted" in (ended.failure_message or "")
    assert not model.asked


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"modelInput": {}}\n\nnot json\n', r"in/a.jsonl.*Line 3: The body is not JSON"),
        (b'{"recordId": "1"}\n', r"Line 1: It has no modelInput"),
        (b'{"modelInput": "text"}\n', r"Line 1: modelInput is a string"),
        (b'{"modelInput": {}, "recordId": 1}\n', r"Line 1: recordId is a number"),
        (b"\n\n", r"The input has 0 records"),
        (b'{"modelInput": {}}\n' * 31, r"The input has 31 records.*may have 30"),
        (b'{"modelInput": {"inputText": "%s"}}\n' % (b"x" * 5000), r"may have 4,000"),
    ],
)
def test_an_input_that_is_no_batch_fails_the_job_with_file_line_and_reason(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model, content: bytes, reason: str
) -> None:
    objects.write(INPUT, content)
    bounded = replace(place, max_batch_records=30, max_batch_file_bytes=4000)
    job = held(engine)
    wanted = (DataError, ValidationException, ServiceQuotaExceededException)
    with pytest.raises(wanted, match=reason):
        stages.run(bounded, engine, job, lambda: False, objects=objects, connect=model)
    assert now(engine, job).phase == "Validating"


def test_a_byte_order_mark_and_carriage_returns_are_passed_over(
    place: Settings, engine: Engine, objects: MemoryStore, model: Model
) -> None:
    objects.write(INPUT, b"\xef\xbb\xbf" + lines(record("a"), record("b")).replace(b"\n", b"\r\n"))
    job = held(engine)
    stages.run(place, engine, job, lambda: False, objects=objects, connect=model)
    assert sorted(model.asked) == ["a", "b"]
