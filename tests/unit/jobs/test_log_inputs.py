"""A job's training data out of invocation logs: the calls that fit, and what the role may read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE, BASE_ARN, claimed, queued

from outcrop.errors import DataError, StopRequested, TrainingError
from outcrop.identity import accounts
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import validation
from outcrop.jobs.inputs import Input
from outcrop.jobs.log_inputs import EVENT
from outcrop.jobs.validation import Start
from outcrop.models.catalog import load_catalog
from outcrop.settings import Settings
from outcrop.store import events, jobs
from outcrop.store.database import transaction
from outcrop.store.rows import Job

ROOT = f"logs/AWSLogs/{ACCOUNT}/BedrockModelInvocationLogs/us-east-1"
HOUR = f"{ROOT}/2026/11/30/12"
LOG = f"{HOUR}/20261130T120000000Z_a.json.gz"
SECRET = S3Uri("private", "secret.json")


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


def call(prompt: str, completion: str = "Yes.", **more: Any) -> dict[str, Any]:
    return {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "input": {"inputBodyJson": {"inputText": prompt}},
        "output": {"outputBodyJson": {"results": [{"outputText": completion}]}},
        **more,
    }


def packed(*calls: dict[str, Any]) -> bytes:
    return gzip.compress(b"".join(json.dumps(each).encode() + b"\n" for each in calls), mtime=0)


def held(engine: Engine, source: str = f"s3://{BUCKET}/logs", **config: Any) -> Job:
    """A job of a model whose format is prompt-completion, just claimed."""
    base = load_catalog(Settings()).resolve(BASE)
    assert base is not None
    logs = {"usePromptResponse": True, "invocationLogSource": {"s3Uri": source}, **config}
    spec = {
        "baseModelId": base.model_id,
        "baseModelArn": BASE_ARN,
        "weights": base.weights,
        "customizationType": "FINE_TUNING",
        "hyperParameters": {},
        "userHyperParameters": {},
        "trainingDataConfig": {"invocationLogsConfig": logs},
        "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
        "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
        "customModelId": new_id(),
        "customModelName": "mine",
    }
    with transaction(engine) as connection:
        return claimed(connection, queued(connection, "a", spec=spec, model_name="mine"))


@pytest.fixture
def begin(settings: Settings, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins the validation stage of a job, without weights, which it does not look at."""
    monkeypatch.setattr(validation, "ensure_weights", lambda settings, key: settings.data_dir)

    def run(objects: MemoryStore, job: Job, *, stop: bool = False) -> Start:
        base = load_catalog(settings).resolve(BASE)
        assert base is not None
        return validation.begin(settings, engine, objects, job, base, lambda: stop)

    return run


def lines(item: Input) -> list[dict[str, Any]]:
    return [json.loads(line) for line in item.path.read_bytes().splitlines()]


def told(engine: Engine, job: Job) -> str:
    with engine.connect() as connection:
        return events.last_message(connection, job.id, EVENT)


def test_calls_become_records_and_what_cannot_be_trained_on_is_counted(
    engine: Engine, begin: Any
) -> None:
    tools = {"stopReason": "tool_use", "output": {}}
    objects = MemoryStore(**{
        LOG: packed(
            call("One?"),
            call("Two?", errorCode="ThrottlingException"),
            call("Three?", output={"outputBodyJson": tools}),
        ),
        f"{ROOT}/2026/11/30/13/b.json.gz": packed(call("Four?", "No.")),
        f"{HOUR}/data/1_input.json.gz": gzip.compress(b"{}"),
        f"{ROOT}/amazon-bedrock-logs-permission-check": b"",
        "logs2/other.json": b"{}",
    })  # fmt: skip
    job = held(engine)
    start = begin(objects, job)
    (item,) = start.inputs
    assert lines(item) == [
        {"prompt": "One?", "completion": "Yes."},
        {"prompt": "Four?", "completion": "No."},
    ]
    assert (str(item.uri), item.num_bytes) == (f"s3://{BUCKET}/logs", item.path.stat().st_size)
    assert told(engine, job) == (
        f"2 calls were taken from 2 logs at s3://{BUCKET}/logs; left out: 1 missing_output, "
        "1 unsupported_block."
    )


@pytest.mark.parametrize(
    ("filters", "taken"),
    [
        ({"equals": {"team": "red"}}, ["r"]),
        ({"notEquals": {"team": "red"}}, ["b", "n"]),
        ({"orAll": [{"equals": {"team": "red"}}, {"equals": {"team": "blue"}}]}, ["r", "b"]),
        ({"andAll": [{"notEquals": {"team": "red"}}, {"equals": {"tier": "1"}}]}, ["b"]),
    ],
)
def test_filters_take_calls_by_their_metadata(
    engine: Engine, begin: Any, filters: dict[str, Any], taken: list[str]
) -> None:
    log = packed(
        call("r", requestMetadata={"team": "red"}),
        call("b", requestMetadata={"team": "blue", "tier": "1"}),
        call("n"),
    )
    job = held(engine, f"s3://{BUCKET}/{LOG}", requestMetadataFilters=filters)
    (item,) = begin(MemoryStore(**{LOG: log}), job).inputs
    assert [line["prompt"] for line in lines(item)] == taken


def test_bodies_in_objects_of_their_own_are_fetched(engine: Engine, begin: Any) -> None:
    asked, answered = f"{HOUR}/data/1_input.json.gz", f"{HOUR}/data/1_output.json"
    elsewhere = call(
        "",
        input={"inputBodyS3Path": f"s3://{BUCKET}/{asked}"},
        output={"outputBodyS3Path": f"s3://{BUCKET}/{answered}"},
    )
    objects = MemoryStore(**{
        LOG: packed(elsewhere),
        asked: gzip.compress(json.dumps({"inputText": "Long?"}).encode()),
        answered: json.dumps({"results": [{"outputText": "Long."}]}).encode(),
    })  # fmt: skip
    (item,) = begin(objects, held(engine)).inputs
    assert lines(item) == [{"prompt": "Long?", "completion": "Long."}]


@pytest.mark.parametrize(
    "body",
    [b"no json", gzip.compress(b"{}")[:-4], b"\x1f\x8bno", gzip.compress(bytes(33 << 20))],
    ids=["no JSON", "cut", "no gzip", "a bomb"],
)
def test_a_damaged_body_leaves_its_call_out(engine: Engine, begin: Any, body: bytes) -> None:
    elsewhere = call("", input={"inputBodyS3Path": f"s3://{BUCKET}/x.gz"})
    objects = MemoryStore(**{LOG: packed(elsewhere, call("One?")), "x.gz": body})
    job = held(engine)
    (item,) = begin(objects, job).inputs
    assert [line["prompt"] for line in lines(item)] == ["One?"]
    assert "left out: 1 body_elsewhere" in told(engine, job)


def test_a_log_cannot_have_a_job_read_what_its_role_may_not(engine: Engine, begin: Any) -> None:
    forged = call("", input={"inputBodyS3Path": str(SECRET)})
    objects = MemoryStore(**{LOG: packed(forged, call("One?"))})
    objects.content[SECRET] = json.dumps({"inputText": "the secret"}).encode()
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {"Effect": "Allow", "Action": "s3:*", "Resource": "*"},
            {"Effect": "Deny", "Action": "s3:*", "Resource": "arn:aws:s3:::private/*"},
        ],
    }
    with transaction(engine) as connection:
        accounts.put_role_policy(connection, ACCOUNT, CUSTOMIZATION_ROLE, "p", json.dumps(policy))
    job = held(engine)
    (item,) = begin(objects, job).inputs
    assert [line["prompt"] for line in lines(item)] == ["One?"]
    assert "the secret" not in item.path.read_text()


def test_a_later_attempt_reads_the_same_logs_and_no_changed_one(
    settings: Settings, engine: Engine, begin: Any
) -> None:
    objects = MemoryStore(**{LOG: packed(call("One?"))})
    job = held(engine)
    start = begin(objects, job)
    first = start.inputs[0].sha256
    validation.note(engine, job, data=start.digests.found)
    objects.content[S3Uri(BUCKET, f"{HOUR}/later.json.gz")] = packed(call("Later?"))
    with engine.connect() as connection:
        again = jobs.get_job_by_id(connection, job.id)
    assert again is not None
    assert begin(objects, again).inputs[0].sha256 == first
    objects.content[S3Uri(BUCKET, LOG)] = packed(call("Another?"))
    with pytest.raises(TrainingError, match="changed while the job ran"):
        begin(objects, again)


def test_logs_without_a_usable_call_fail_the_job_with_the_reasons(
    engine: Engine, begin: Any
) -> None:
    objects = MemoryStore(**{LOG: packed(call("One?", errorCode="ModelErrorException"))})
    with pytest.raises(DataError, match="1 missing_output") as failed:
        begin(objects, held(engine))
    assert failed.value.code == "empty_file"


def test_a_job_that_is_asked_to_stop_reads_no_further_log(engine: Engine, begin: Any) -> None:
    with pytest.raises(StopRequested):
        begin(MemoryStore(**{LOG: packed(call("One?"))}), held(engine), stop=True)
