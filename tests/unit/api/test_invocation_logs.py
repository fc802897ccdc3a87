"""Invocations come to the owner's bucket as records, once each, and none waits or fails for it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EventStreamError
from tests.unit.api.runtime_gateway import ANSWER, Gateway, running_gateway, wait_until
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, REGION, queued

from outcrop.api import log_spool
from outcrop.api.context import Services
from outcrop.api.log_shipping import LARGE_BYTES
from outcrop.api.log_spool import spool_folder
from outcrop.data.logs import read_call
from outcrop.errors import ThrottlingException
from outcrop.identity.api_keys import load_or_make_api_key
from outcrop.ids import S3Uri
from outcrop.store import outbox
from outcrop.store.database import transaction
from outcrop.store.delivery import list_counts
from outcrop.store.spool import segments
from outcrop.wire.client import outcrop_client

LLAMA = "meta.llama3-1-8b-instruct-v1:0"
ROOT = f"logs/AWSLogs/{ACCOUNT}/BedrockModelInvocationLogs"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/BedrockCustomizationRole"
CONFIG = {"s3Config": {"bucketName": BUCKET, "keyPrefix": "logs/"}}
BODY = {"prompt": "Hi", "max_gen_len": 20}


@pytest.fixture(scope="module")
def store() -> Iterator[MemoryStore]:
    found = MemoryStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Services, "objects", property(lambda self: found))
        patch.setattr(log_spool, "SYNC_SECONDS", 0.02)
        yield found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, store: MemoryStore) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("logs")
    with running_gateway(folder, invocation_log_seconds=0) as place:
        yield place


@pytest.fixture
def objects(store: MemoryStore) -> MemoryStore:
    """The gateway's store, which has nothing yet."""
    store.content.clear()
    return store


@pytest.fixture
def gateway(shared: Gateway, objects: MemoryStore) -> Gateway:
    """The gateway, which logs nothing yet."""
    control(shared).delete_model_invocation_logging_configuration()
    shared.model.script(*ANSWER)
    return shared


def control(gateway: Gateway, **credentials: str) -> Any:
    """Return a client of bedrock that asks once."""
    made = boto3.client(
        "bedrock",
        endpoint_url=gateway.url,
        aws_access_key_id=credentials.get("key", gateway.owner.access_key_id),
        aws_secret_access_key=credentials.get("secret", gateway.owner.secret_access_key),
        region_name=REGION,
        config=Config(retries={"total_max_attempts": 1}),
    )
    gateway.clients.append(made)
    return made


def turn_on(gateway: Gateway, **config: Any) -> None:
    control(gateway).put_model_invocation_logging_configuration(loggingConfig={**CONFIG, **config})


def keys(objects: MemoryStore) -> list[str]:
    return sorted(uri.key for uri in objects.content if uri.key.endswith(".gz"))


def delivered(objects: MemoryStore) -> list[dict[str, Any]]:
    """Return the records in the bucket, in the order they came."""
    found = []
    for key in keys(objects):
        if "/data/" not in key:
            lines = gzip.decompress(objects.content[S3Uri(BUCKET, key)]).splitlines()
            found += [json.loads(line) for line in lines]
    return found


def records(objects: MemoryStore, number: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(delivered(objects)) >= number)
    return delivered(objects)


def outcomes(gateway: Gateway) -> dict[str, int]:
    with gateway.engine.connect() as connection:
        return {row.outcome: row.number for row in list_counts(connection, ACCOUNT, REGION)}


# --- the configuration ----------------------------------------------------------------------------


def test_configuration_is_put_shown_and_deleted_as_in_bedrock(
    gateway: Gateway, objects: MemoryStore
) -> None:
    client = control(gateway)
    assert "loggingConfig" not in client.get_model_invocation_logging_configuration()
    turn_on(gateway, imageDataDeliveryEnabled=False)
    shown = client.get_model_invocation_logging_configuration()["loggingConfig"]
    assert shown["s3Config"] == CONFIG["s3Config"]
    assert (shown["textDataDeliveryEnabled"], shown["imageDataDeliveryEnabled"]) == (True, False)
    assert objects.content[S3Uri(BUCKET, f"{ROOT}/amazon-bedrock-logs-permission-check")] == b""
    client.delete_model_invocation_logging_configuration()
    client.delete_model_invocation_logging_configuration()
    assert "loggingConfig" not in client.get_model_invocation_logging_configuration()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"s3Config": {"bucketName": "not-there"}}, "does not exist"),
        ({"s3Config": {"bucketName": BUCKET, "keyPrefix": "a//b"}}, "keyPrefix"),
        ({"textDataDeliveryEnabled": True}, "s3Config must name"),
        ({"cloudWatchConfig": {"logGroupName": "g", "roleArn": ROLE}, **CONFIG}, "CloudWatch Logs"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(
    gateway: Gateway, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ClientError, match=said) as refused:
        control(gateway).put_model_invocation_logging_configuration(loggingConfig=config)
    assert refused.value.response["Error"]["Code"] == "ValidationException"


def test_logging_writes_only_where_its_caller_may(gateway: Gateway) -> None:
    user = gateway.user("logger", "bedrock:PutModelInvocationLoggingConfiguration")
    client = control(gateway, key=user.access_key_id, secret=user.secret_access_key)
    with pytest.raises(ClientError, match="s3:PutObject"):
        client.put_model_invocation_logging_configuration(loggingConfig=CONFIG)


# --- the records ----------------------------------------------------------------------------------


def test_nothing_is_logged_unless_it_is_turned_on(gateway: Gateway, objects: MemoryStore) -> None:
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    turn_on(gateway)
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    control(gateway).delete_model_invocation_logging_configuration()
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    records(objects, 1)
    assert len(delivered(objects)) == 1
    assert not segments(spool_folder(gateway.settings))


def test_an_invocation_is_a_record_with_its_bodies_counts_and_caller(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway)
    answer = gateway.client().invoke_model(
        modelId=LLAMA, body=json.dumps(BODY), requestMetadata=json.dumps({"team": "red"})
    )
    (record,) = records(objects, 1)
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    assert (record["schemaType"], record["schemaVersion"]) == ("ModelInvocationLog", "1.0")
    assert record["requestId"] == answer["ResponseMetadata"]["RequestId"]
    assert (record["accountId"], record["region"]) == (ACCOUNT, REGION)
    assert (record["operation"], record["modelId"]) == ("InvokeModel", LLAMA)
    assert record["identity"]["arn"].startswith(f"arn:aws:iam::{ACCOUNT}:user/")
    assert record["requestMetadata"] == {"team": "red"}
    assert record["input"] == {
        "inputContentType": "application/json", "inputBodyJson": BODY, "inputTokenCount": 7,
    }  # fmt: skip
    assert record["output"]["outputBodyJson"] == json.loads(answer["body"].read())
    assert record["output"]["outputTokenCount"] == 4
    assert record["latencyMs"] == int(headers["x-amzn-bedrock-invocation-latency"])
    (key,) = keys(objects)
    stamp = record["timestamp"]
    hour = f"{stamp[:4]}/{stamp[5:7]}/{stamp[8:10]}/{stamp[11:13]}"
    assert key.startswith(f"{ROOT}/{REGION}/{hour}/{stamp[:4]}{stamp[5:7]}{stamp[8:10]}T")


def test_streams_are_logged_as_their_chunks(gateway: Gateway, objects: MemoryStore) -> None:
    turn_on(gateway)
    client = gateway.client()
    found = client.invoke_model_with_response_stream(modelId=LLAMA, body=json.dumps(BODY))
    with closing(found["body"]) as body:
        chunks = [json.loads(event["chunk"]["bytes"]) for event in body]
    (record,) = records(objects, 1)
    assert record["operation"] == "InvokeModelWithResponseStream"
    assert record["output"]["outputBodyJson"] == chunks
    assert record["output"]["outputTokenCount"] == 4
    assert read_call(record)[-1].text == "Héllo you"


def test_conversations_are_logged_whole_and_streamed(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway)
    asked: dict[str, Any] = {
        "modelId": LLAMA,
        "messages": [{"role": "user", "content": [{"text": "Hi"}]}],
        "requestMetadata": {"team": "blue"},
    }
    answer = gateway.client().converse(**asked)
    (first,) = records(objects, 1)
    assert first["output"]["outputBodyJson"]["output"] == answer["output"]
    assert first["latencyMs"] == answer["metrics"]["latencyMs"]
    assert first["requestMetadata"] == {"team": "blue"}
    with closing(gateway.client().converse_stream(**asked)["stream"]) as events:
        names = [next(iter(event)) for event in events]
    both = records(objects, 2)
    second = next(each for each in both if each["operation"] == "ConverseStream")
    assert [next(iter(event)) for event in second["output"]["outputBodyJson"]] == names
    assert [read_call(each)[-1].text for each in (first, second)] == ["Héllo you"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_style_paths_are_logged_too(
    gateway: Gateway, objects: MemoryStore, stream: bool
) -> None:
    turn_on(gateway)
    key = load_or_make_api_key(gateway.settings).key
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    asked = {"model": LLAMA, "messages": messages, "stream": stream}
    answer = httpx.post(
        f"{gateway.url}/v1/chat/completions",
        json=asked,
        headers={"authorization": f"Bearer {key}"},
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    (record,) = records(objects, 1)
    assert record["operation"] == ("InvokeModelWithResponseStream" if stream else "InvokeModel")
    assert record["requestId"] == answer.headers["x-request-id"]
    assert record["input"]["inputBodyJson"] == asked
    assert (record["input"]["inputTokenCount"], record["output"]["outputTokenCount"]) == (7, 4)
    said = [(message.role, message.text) for message in read_call(record)]
    assert said == [("system", "Short."), ("user", "Hi"), ("assistant", "Héllo you")]


def test_errors_are_logged_with_their_code_and_refused_callers_are_not(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway)
    client = gateway.client()
    with pytest.raises(ClientError):
        client.invoke_model(modelId=LLAMA, body=b"no json")
    with pytest.raises(ClientError):
        client.invoke_model(modelId="no.such-model", body=json.dumps(BODY))
    stranger = gateway.client(gateway.user("stranger", "s3:GetObject"))
    with pytest.raises(ClientError, match="not authorized"):
        stranger.invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    gateway.model.script(ThrottlingException("Too much."))
    with pytest.raises(ClientError):
        client.invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    gateway.model.script(*ANSWER[:2], ending="cut")
    body = client.invoke_model_with_response_stream(modelId=LLAMA, body=json.dumps(BODY))["body"]
    with pytest.raises(EventStreamError), closing(body) as events:
        list(events)
    found = {record["errorCode"]: record for record in records(objects, 4)}
    unknown = next(each for each in delivered(objects) if each["modelId"] == "no.such-model")
    assert unknown["errorCode"] == "ValidationException"
    assert found.keys() == {"ValidationException", "ThrottlingException", "ModelErrorException"}
    assert found["ThrottlingException"]["input"]["inputBodyJson"] == BODY
    broken = found["ModelErrorException"]["output"]
    assert (len(broken["outputBodyJson"]), broken["outputTokenCount"]) == (2, 2)
    paths = [each["input"].get("inputBodyS3Path") for each in delivered(objects)]
    (path,) = filter(None, paths)
    key = path.removeprefix(f"s3://{BUCKET}/")
    assert gzip.decompress(objects.content[S3Uri(BUCKET, key)]) == b"no json"


@pytest.mark.parametrize("body", [b'{"prompt": NaN}', b"[" * 5000 + b"]" * 5000])
def test_a_body_that_no_reader_of_logs_could_read_is_kept_as_it_was(
    gateway: Gateway, objects: MemoryStore, body: bytes
) -> None:
    turn_on(gateway)
    with pytest.raises(ClientError):
        gateway.client().invoke_model(modelId=LLAMA, body=body)
    (record,) = records(objects, 1)
    path = record["input"]["inputBodyS3Path"]
    held = objects.content[S3Uri(BUCKET, path.removeprefix(f"s3://{BUCKET}/"))]
    assert gzip.decompress(held) == body


def test_an_answer_that_its_client_left_is_marked(gateway: Gateway, objects: MemoryStore) -> None:
    turn_on(gateway)
    gateway.model.script(*ANSWER[:2], ending="wait")
    client = gateway.client()
    body = client.invoke_model_with_response_stream(modelId=LLAMA, body=json.dumps(BODY))["body"]
    assert next(iter(body))["chunk"]
    body.close()
    (record,) = records(objects, 1)
    assert record["errorCode"] == "ClientDisconnected"


def test_a_large_body_has_an_object_of_its_own(gateway: Gateway, objects: MemoryStore) -> None:
    turn_on(gateway)
    large = {**BODY, "prompt": "Hi " * LARGE_BYTES}
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(large))
    (record,) = records(objects, 1)
    assert "inputBodyJson" not in record["input"]
    path = record["input"]["inputBodyS3Path"]
    assert path.endswith(f"/data/{record['requestId']}_input.json.gz")
    held = objects.content[S3Uri(BUCKET, path.removeprefix(f"s3://{BUCKET}/"))]
    assert json.loads(gzip.decompress(held)) == large
    assert record["output"]["outputBodyJson"]["generation"] == "Héllo you"


def test_bodies_are_left_out_where_their_kind_is_turned_off(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway, imageDataDeliveryEnabled=False)
    image = {"image": {"format": "png", "source": {"bytes": b"x"}}}
    with pytest.raises(ClientError):
        gateway.client().converse(modelId=LLAMA, messages=[{"role": "user", "content": [image]}])
    (record,) = records(objects, 1)
    assert record["errorCode"] == "ValidationException"
    assert "inputBodyJson" not in record["input"]
    turn_on(gateway, textDataDeliveryEnabled=False)
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    record = next(each for each in records(objects, 2) if "errorCode" not in each)
    assert record["input"] == {"inputContentType": "application/json", "inputTokenCount": 7}
    assert record["output"] == {"outputContentType": "application/json", "outputTokenCount": 4}


# --- what goes wrong ------------------------------------------------------------------------------


def test_records_wait_while_the_store_is_away_and_come_once_each(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway)
    objects.go_away()
    for number in range(3):
        body = json.dumps({**BODY, "prompt": f"number {number}"})
        gateway.client().invoke_model(modelId=LLAMA, body=body)
    wait_until(lambda: outcomes(gateway).get("failing", 0) > 0)
    assert not delivered(objects)
    objects.refusal = None
    found = sorted(each["input"]["inputBodyJson"]["prompt"] for each in records(objects, 3))
    assert found == ["number 0", "number 1", "number 2"]
    wait_until(lambda: outcomes(gateway).get("delivered", 0) >= 3)
    assert not segments(spool_folder(gateway.settings))


def test_an_invocation_does_not_notice_a_full_spool(tmp_path: Path, objects: MemoryStore) -> None:
    with running_gateway(
        tmp_path, invocation_log_seconds=0, invocation_log_spool_bytes=10
    ) as gateway:
        turn_on(gateway)
        assert gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))["body"].read()
        wait_until(lambda: outcomes(gateway) == {"spool-full": 1})
        shown = [line for line in _metrics(gateway).splitlines() if 'outcome="spool-full"' in line]
        assert [line.split()[-1] for line in shown] == ["1"]


def test_an_invocation_does_not_notice_a_disk_that_refuses(
    tmp_path: Path, objects: MemoryStore
) -> None:
    (tmp_path / "spool").write_text("in the way of the folder")
    with running_gateway(tmp_path, invocation_log_seconds=0) as gateway:
        turn_on(gateway)
        assert gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))["body"].read()
        wait_until(lambda: outcomes(gateway) == {"disk-error": 1})


def test_the_owner_sees_what_was_delivered_and_what_was_given_up(
    gateway: Gateway, objects: MemoryStore
) -> None:
    turn_on(gateway)
    gateway.client().invoke_model(modelId=LLAMA, body=json.dumps(BODY))
    wait_until(lambda: outcomes(gateway).get("delivered", 0) > 0)
    with transaction(gateway.engine) as connection:
        job = queued(connection, "told-to-nobody")
        (event,) = outbox.pending(connection, "webhook:h:1")
        outbox.settle(connection, event, "webhook:h:1", outbox.DEAD, "Why.")
    client = outcrop_client(
        endpoint_url=gateway.url,
        aws_access_key_id=gateway.owner.access_key_id,
        aws_secret_access_key=gateway.owner.secret_access_key,
        region_name=REGION,
    )
    gateway.clients.append(client)
    shown = client.get_delivery_status()
    assert "invocation-logs" in {each["channel"] for each in shown["deliveries"]}
    assert shown["spoolBytes"] == 0
    (dead,) = shown["deadEvents"]
    assert (dead["target"], dead["detail"]) == ("webhook:h:1", "Why.")
    told = json.loads(dead["event"])
    assert (told["id"], told["detail"]["jobArn"]) == (event.event_id, job.arn)


def _metrics(gateway: Gateway) -> str:
    return httpx.get(f"{gateway.url}/metrics", trust_env=False).text
