"""Model units on the real service, what is used of them, and a server killed under load."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError
from tests.assets.smollm2 import smollm2_folder
from tests.e2e.service import LLAMA, TITAN, Service, in_service, refusal, wait_for
from tests.unit.serve.tiny_chat import write_random_adapter
from tests.unit.store.build import new_model

from outcrop.models.artifact import folder_digest
from outcrop.models.weights import SHIPPED_KEY
from outcrop.store import models
from outcrop.store.database import connect, transaction
from outcrop.store.rows import NewCustomModel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

BASE = "meta.llama3-1-8b-instruct-v1:0"
BURST, RATE = 2, 4
TOKENS = 20
MODEL_SERVER = "model-server"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose units are small: two of 2 tokens a second each."""
    running = Service(
        tmp_path_factory.mktemp("units") / "data",
        OUTCROP_MACHINE_TOKENS_PER_SECOND=str(RATE),
        OUTCROP_THROUGHPUT_BURST_SECONDS=str(BURST),
        OUTCROP_MAX_PROVISIONED_MODELS="9",
        OUTCROP_MAX_MODEL_UNITS="9",
    )
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def throughput(small: Service) -> str:
    """The ARN of a throughput of one unit."""
    return in_service(small, "one", BASE)


def ask(service: Service, model: str, tokens: int) -> Any:
    body = json.dumps({"prompt": "Count.", "max_gen_len": tokens, "temperature": 0})
    runtime = service.client("bedrock-runtime", attempts=1)
    return runtime.invoke_model(modelId=model, body=body)


def test_a_purchase_beyond_the_machine_is_refused_with_what_is_left(
    small: Service, throughput: str
) -> None:
    bedrock = small.client("bedrock")
    wanted = {"provisionedModelName": "more", "modelId": f"{TITAN}:0:8k", "modelUnits": 2}
    error = refusal(lambda: bedrock.create_provisioned_model_throughput(**wanted))
    assert (error.code, error.status) == ("ServiceQuotaExceededException", 400)
    for part in ("modelUnits is 2", "2 model units only 1 are left", "machine_model_units"):
        assert part in error.message


def test_beyond_its_units_a_throughput_is_throttled_and_others_are_not(
    small: Service, throughput: str
) -> None:
    ask(small, BASE, 1)

    def throttled() -> ClientError | None:
        try:
            ask(small, throughput, TOKENS)
        except ClientError as error:
            return error
        return None

    error = wait_for(throttled, 60, "a request beyond the units").response
    assert error["Error"]["Code"] == "ThrottlingException"
    assert "1 model unit" in error["Error"]["Message"]
    headers = error["ResponseMetadata"]["HTTPHeaders"]
    assert 0 < int(headers["x-amz-retry-after"]) <= 6000
    assert ask(small, BASE, 1)["body"].read()
    patient = small.client("bedrock-runtime", attempts=8)
    body = json.dumps({"prompt": "Count.", "max_gen_len": 1})
    assert patient.invoke_model(modelId=throughput, body=body)["body"].read(), "asked again"


def test_a_model_server_that_is_killed_under_load_ends_its_streams_and_comes_back(
    small: Service,
) -> None:
    runtime = small.client("bedrock-runtime", attempts=8)
    body = json.dumps({"prompt": "Tell me a very long story.", "max_gen_len": 2000})
    bodies = [
        runtime.invoke_model_with_response_stream(modelId=LLAMA, body=body)["body"]
        for _ in range(8)
    ]
    streams = [iter(each) for each in bodies]
    for events in streams:
        assert next(events)["chunk"]
    os.kill(small.process(MODEL_SERVER).pid, signal.SIGKILL)

    def end(events: Iterator[Any]) -> str:
        try:
            for _ in events:
                continue
        except EventStreamError as error:
            return str(error.response["Error"]["Code"])
        return "whole"

    with ThreadPoolExecutor(9) as pool:
        after = pool.submit(runtime.invoke_model, modelId=LLAMA, body=body[:-5] + "8}")
        codes = list(pool.map(end, streams))
        assert json.loads(after.result()["body"].read())["generation"]
    for each in bodies:
        each.close()
    assert set(codes) <= {"modelStreamErrorException", "whole"}
    assert "modelStreamErrorException" in codes


@pytest.fixture(scope="module")
def custom(small: Service) -> NewCustomModel:
    """A custom model that changes the base a little, without a job that made it."""
    found = new_model("mine", spec={"weights": SHIPPED_KEY})
    artifact = small.data_dir / found.artifact_path
    write_random_adapter(smollm2_folder(), artifact, size=0.01)
    found = replace(found, artifact_digest=folder_digest(artifact))
    engine = connect(small.settings.effective_database_url)
    with transaction(engine) as connection:
        models.insert_model(connection, found)
    engine.dispose()
    return found


def test_an_answer_under_way_ends_well_when_throughput_and_model_are_deleted(
    small: Service, throughput: str, custom: NewCustomModel
) -> None:
    bedrock, runtime = small.client("bedrock"), small.client("bedrock-runtime", attempts=8)
    bought = in_service(small, "for-mine", custom.arn)
    titan = {"maxTokenCount": 60, "temperature": 0}
    asked = {
        "modelId": bought,
        "body": json.dumps({"inputText": "Count.", "textGenerationConfig": titan}),
    }
    whole = json.loads(runtime.invoke_model(**asked)["body"].read())
    with closing(runtime.invoke_model_with_response_stream(**asked)["body"]) as events:
        chunks = (json.loads(event["chunk"]["bytes"]) for event in events)
        text = next(chunks)["outputText"]
        error = refusal(lambda: bedrock.delete_custom_model(modelIdentifier=custom.arn))
        assert error.code == "ConflictException", "the throughput goes first"
        bedrock.delete_provisioned_model_throughput(provisionedModelId=bought)
        assert refusal(lambda: runtime.invoke_model(**asked)).code == "ResourceNotFoundException"
        bedrock.delete_custom_model(modelIdentifier=custom.arn)
        assert not (small.data_dir / custom.artifact_path).exists()
        text += "".join(chunk["outputText"] for chunk in chunks)
    assert text == whole["results"][0]["outputText"]


def test_usage_is_in_the_database_once_the_service_has_stopped(
    small: Service, throughput: str
) -> None:
    answer = ask(small, BASE, 3)
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    assert headers["x-amzn-bedrock-output-token-count"] == "3"
    runtime = small.client("bedrock-runtime", attempts=8)
    body = json.dumps({"prompt": "Count.", "max_gen_len": 2})
    assert runtime.invoke_model(modelId=throughput, body=body)["body"].read()
    streamed = runtime.invoke_model_with_response_stream(modelId=LLAMA, body=body)
    with closing(streamed["body"]) as events:
        assert list(events)
    small.stop()
    with closing(sqlite3.connect(small.data_dir / "outcrop.sqlite3")) as database:
        rows = database.execute(
            "SELECT model_arn, throughput_arn, sum(requests), sum(input_tokens),"
            " sum(output_tokens) FROM token_usage GROUP BY 1, 2"
        ).fetchall()
    found = {bought or model.rpartition("/")[2]: counts for model, bought, *counts in rows}
    small.start()
    assert found[BASE][2] >= 3
    assert found[throughput][2] >= 1
    assert found[LLAMA][0] >= 1
    assert all(value > 0 for counts in found.values() for value in counts)
