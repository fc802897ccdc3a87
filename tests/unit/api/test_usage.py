"""What was answered is counted, however the answer ended, and no answer waits for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EventStreamError
from botocore.retries.base import BaseRetryBackoff
from botocore.retries.standard import ExponentialBackoff
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from tests.unit.api.runtime_gateway import ANSWER, WEIGHTS, Gateway, running_gateway, wait_until
from tests.unit.store.build import ACCOUNT, REGION, new_throughput

from outcrop.api import usage
from outcrop.api.usage import UsageMeter
from outcrop.errors import ModelErrorException, ThrottlingException
from outcrop.ids import foundation_model_arn
from outcrop.serve.request import Owner
from outcrop.store import throughputs
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.rows import ProvisionedModel, TokenUsage
from outcrop.store.usage import list_usage

LLAMA = "meta.llama3-1-8b-instruct-v1:0"
COHERE = "cohere.command-text-v14"
BODY = json.dumps({"prompt": "Hi"})


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(usage, "FLUSH_SECONDS", 0.02)
    with running_gateway(tmp_path) as place:
        yield place


def counted(engine: Engine) -> dict[tuple[str, str], TokenUsage]:
    """Return the usage of the last and this hour by model and throughput."""
    since = datetime.now(UTC) - timedelta(hours=2)
    with engine.connect() as connection:
        found = list_usage(
            connection, ACCOUNT, REGION, since=since, until=since + timedelta(hours=3)
        )
    total: dict[tuple[str, str], TokenUsage] = {}
    for key, each in found.items():
        before = total.get((key.model_arn, key.throughput_arn), TokenUsage(0, 0, 0))
        total[key.model_arn, key.throughput_arn] = TokenUsage(
            before.requests + each.requests,
            before.input_tokens + each.input_tokens,
            before.output_tokens + each.output_tokens,
        )
    return total


def wait_for(gateway: Gateway, model: str, wanted: TokenUsage, throughput: str = "") -> None:
    key = (foundation_model_arn(REGION, model), throughput)
    wait_until(lambda: counted(gateway.engine).get(key) == wanted)
    assert set(counted(gateway.engine)) == {key}


def stream(gateway: Gateway, **params: Any) -> Any:
    client = gateway.client()
    found = client.invoke_model_with_response_stream(modelId=LLAMA, body=BODY, **params)
    return found["body"]


def test_answers_whole_and_in_pieces_are_counted_as_their_headers_say(gateway: Gateway) -> None:
    answer = gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    told = [int(headers[f"x-amzn-bedrock-{name}-token-count"]) for name in ("input", "output")]
    wait_for(gateway, LLAMA, TokenUsage(1, *told))
    with closing(stream(gateway)) as events:
        list(events)
    wait_for(gateway, LLAMA, TokenUsage(2, 2 * told[0], 2 * told[1]))


def test_of_several_answers_to_one_prompt_the_prompt_counts_once(gateway: Gateway) -> None:
    body = json.dumps({"prompt": "Hi", "num_generations": 3})
    answer = gateway.client().invoke_model(modelId=COHERE, body=body)
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    assert headers["x-amzn-bedrock-output-token-count"] == "12"
    wait_for(gateway, COHERE, TokenUsage(1, 7, 12))


def test_a_client_that_goes_away_is_counted_what_was_drawn_for_it(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER[:2], ending="wait")
    events = stream(gateway)
    assert next(iter(events))["chunk"]
    events.close()
    assert gateway.model.was_left.wait(10)
    wait_until(lambda: bool(counted(gateway.engine)))
    (found,) = counted(gateway.engine).values()
    assert (found.requests, found.input_tokens) == (1, 7)
    assert found.output_tokens in (1, 2), "as far as it had come when it was noticed"


def test_an_answer_that_breaks_off_is_counted_as_far_as_it_came(gateway: Gateway) -> None:
    gateway.model.script(*ANSWER[:2], ending="cut")
    with pytest.raises(EventStreamError), closing(stream(gateway)) as events:
        list(events)
    wait_for(gateway, LLAMA, TokenUsage(1, 7, 2))
    with pytest.raises(ClientError):
        gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    wait_for(gateway, LLAMA, TokenUsage(2, 14, 4))


def test_what_is_refused_is_not_counted(gateway: Gateway) -> None:
    gateway.model.script(ModelErrorException("No."))
    with pytest.raises(ClientError):
        gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    gateway.model.script(*ANSWER)
    gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    wait_for(gateway, LLAMA, TokenUsage(1, 7, 4))


def bought(gateway: Gateway) -> ProvisionedModel:
    with transaction(gateway.engine) as connection:
        made = throughputs.create_throughput(
            connection,
            new_throughput("t", foundation_model_arn(REGION, LLAMA), weights=WEIGHTS),
            max_throughputs=2,
            max_model_units=1,
            machine_model_units=2,
        )
        throughputs.mark_in_service(connection, WEIGHTS)
    return made


def test_a_throughputs_answers_are_counted_as_its_own_and_its_requests_say_so(
    gateway: Gateway,
) -> None:
    made, arn = bought(gateway), foundation_model_arn(REGION, LLAMA)
    client = gateway.client()
    client.invoke_model(modelId=made.arn, body=BODY)
    client.converse(modelId=LLAMA, messages=[{"role": "user", "content": [{"text": "Hi"}]}])
    wanted = {(arn, made.arn): TokenUsage(1, 7, 4), (arn, ""): TokenUsage(1, 7, 4)}
    wait_until(lambda: counted(gateway.engine) == wanted)
    assert [request.owner for request in gateway.model.requests] == [
        Owner(ACCOUNT, arn, made.id, 1),
        Owner(ACCOUNT, arn, None, 0),
    ]


def test_a_gateway_that_is_stopped_loses_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "FLUSH_SECONDS", 3600)
    with running_gateway(tmp_path) as place:
        place.client().invoke_model(modelId=LLAMA, body=BODY)
        place.model.script(*ANSWER[:2], ending="wait")
        events = stream(place)
        assert next(iter(events))["chunk"]
        assert counted(place.engine) == {}
        url = place.settings.effective_database_url
    events.close()
    engine = connect(url)
    (found,) = counted(engine).values()
    engine.dispose()
    assert found.requests == 2
    assert found.output_tokens in (5, 6)


def test_a_database_that_is_away_fails_no_answer_and_loses_no_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'db'}")
    migrate(engine)
    meter = UsageMeter()
    once = TokenUsage(1, 10, 20)
    meter.count(ACCOUNT, REGION, "model", "", once)

    def fail(*arguments: object) -> None:
        raise OperationalError("", None, Exception("database or disk is full"))

    with monkeypatch.context() as patched:
        patched.setattr(usage, "add_usage", fail)
        meter.flush(engine)
    meter.count(ACCOUNT, REGION, "model", "", once)
    assert counted(engine) == {}
    meter.flush(engine)
    meter.flush(engine)
    assert counted(engine) == {("model", ""): TokenUsage(2, 20, 40)}
    meter.count(ACCOUNT, REGION, "model", "", once)
    meter.flush(engine)
    assert counted(engine) == {("model", ""): TokenUsage(3, 30, 60)}
    engine.dispose()


# --- when to ask again ---------------------------------------------------------------------------


def test_botocore_waits_as_long_as_a_throttled_request_is_told(gateway: Gateway) -> None:
    gateway.model.script(ThrottlingException("Wait.", members={"retryAfterSeconds": 2.345}))
    with pytest.raises(ClientError) as caught:
        gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    found = caught.value.response
    assert found["Error"]["Code"] == "ThrottlingException"
    assert found["ResponseMetadata"]["HTTPStatusCode"] == 429
    headers = found["ResponseMetadata"]["HTTPHeaders"]
    assert (headers["x-amz-retry-after"], headers["retry-after"]) == ("2345", "3")
    backoff: BaseRetryBackoff = ExponentialBackoff(random=lambda: 0.0)
    context = SimpleNamespace(
        attempt_number=1, http_response=SimpleNamespace(headers=headers), parsed_response={}
    )
    assert backoff.delay_amount(context) == 2.345


def test_an_error_without_a_time_has_no_such_header(gateway: Gateway) -> None:
    gateway.model.script(ModelErrorException("No."))
    with pytest.raises(ClientError) as caught:
        gateway.client().invoke_model(modelId=LLAMA, body=BODY)
    headers = caught.value.response["ResponseMetadata"]["HTTPHeaders"]
    assert not {"x-amz-retry-after", "retry-after"} & set(headers)
