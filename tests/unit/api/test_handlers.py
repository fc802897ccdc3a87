"""Whole requests through the gateway's handlers: what is understood, and what errors become."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import anyio
import pytest
from starlette.requests import Request
from starlette.types import Message
from tests.protocol.answers import check_answer
from tests.protocol.wires import receive
from tests.unit.store.build import ACCOUNT, REGION, new_model

from outcrop.api.context import Services
from outcrop.api.handlers import answer
from outcrop.identity.credentials import Credentials
from outcrop.ids import role_arn
from outcrop.objects.client import EMBEDDED_NAME
from outcrop.objects.internal import make_internal_keys
from outcrop.processes.address import write_address
from outcrop.store import models, tags
from outcrop.store.database import transaction
from outcrop.wire import route, sigv4
from outcrop.wire.serialize import HttpReply

BY_NAME = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/mine"
JOB = {
    "jobName": "job",
    "customModelName": "model",
    "roleArn": role_arn(ACCOUNT, "BedrockCustomizationRole"),
    "baseModelIdentifier": "amazon.titan-text-lite-v1:0:4k",
    "trainingDataConfig": {"s3Uri": "s3://bucket/train.jsonl"},
    "outputDataConfig": {"s3Uri": "s3://bucket/out"},
    "hyperParameters": {},
}


class Call:
    """A signed request whose client stays, or goes away once its body is read."""

    def __init__(
        self, owner: Credentials, method: str, path: str, body: object = None, *, query: str = ""
    ) -> None:
        self.body = b"" if body is None else json.dumps(body).encode()
        self.goes_away = False
        headers = {"host": "localhost", "content-type": "application/json"}
        headers |= sigv4.sign_headers(
            *(method, path, query, headers),
            access_key_id=owner.access_key_id,
            secret_access_key=owner.secret_access_key,
            region=REGION,
            service="bedrock",
            payload_hash=hashlib.sha256(self.body).hexdigest(),
            now=datetime.now(UTC),
        )
        self.scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        self._read = False

    async def receive(self) -> Message:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        if not self.goes_away:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    def answered(self, services: Services) -> HttpReply:
        async def bounded() -> HttpReply:
            with anyio.fail_after(30):
                found = await answer(Request(self.scope, self.receive), services, "r-1")
                assert isinstance(found, HttpReply)
                return found

        return asyncio.run(bounded())


@pytest.fixture
def call(services: Services, owner: Credentials) -> Callable[..., Any]:
    """Makes a call and returns what its answer says, which must be a success."""

    def make(method: str, path: str, body: object = None, **query: str) -> Any:
        reply = Call(owner, method, path, body, query=urlencode(query)).answered(services)
        assert reply.status == 200, reply.body
        operation = route.match(method, path).operation
        check_answer(operation, receive(operation, reply))
        return json.loads(reply.body)

    return make


@pytest.fixture
def mine(services: Services, owner: Credentials) -> str:
    """The ARN of a custom model called `mine`, and a model that was made from it."""
    new = new_model("mine")
    with transaction(services.engine) as connection:
        models.insert_model(connection, new)
        models.insert_model(connection, new_model("child", base_model_arn=new.arn))
    return new.arn


def test_tags_of_a_custom_model_named_by_its_arn_and_name(
    call: Callable[..., Any], mine: str, services: Services
) -> None:
    new = [{"key": "team", "value": "a"}]
    call("POST", "/tagResource", {"resourceARN": BY_NAME, "tags": new})
    for arn in (BY_NAME, mine):
        assert call("POST", "/listTagsForResource", {"resourceARN": arn}) == {"tags": new}
    with services.engine.connect() as connection:
        assert tags.list_tags(connection, ACCOUNT, REGION, mine) == {"team": "a"}
    call("POST", "/untagResource", {"resourceARN": BY_NAME, "tagKeys": ["team"]})
    assert call("POST", "/listTagsForResource", {"resourceARN": mine}) == {"tags": []}


def test_models_made_from_a_custom_model_named_by_its_arn_and_name(
    call: Callable[..., Any], mine: str
) -> None:
    for arn in (BY_NAME, mine):
        found = call("GET", "/custom-models", baseModelArnEquals=arn)["modelSummaries"]
        assert [model["modelName"] for model in found] == ["child"]


@pytest.mark.parametrize(
    "arn",
    [
        BY_NAME + "-other",
        BY_NAME.replace(ACCOUNT, "210987654321"),
        f"arn:aws:bedrock:{REGION}:{ACCOUNT}:provisioned-model/abcdefghijkl",
    ],
)
def test_tags_of_what_is_not_there_are_not_found(
    services: Services, owner: Credentials, mine: str, arn: str
) -> None:
    reply = Call(owner, "POST", "/listTagsForResource", {"resourceARN": arn}).answered(services)
    assert reply.status == 404


def test_create_answers_503_while_the_object_store_is_away(
    services: Services, owner: Credentials
) -> None:
    reply = Call(owner, "POST", "/model-customization-jobs", JOB).answered(services)
    assert reply.status == 503
    headers = {name.lower(): value for name, value in reply.headers.items()}
    assert headers["x-amzn-errortype"].startswith("ServiceUnavailableException")
    assert json.loads(reply.body)["message"] == "The object store does not answer. Try again."


def test_the_object_store_is_found_again_where_it_was_started_anew(services: Services) -> None:
    data_dir = services.settings.data_dir
    make_internal_keys(data_dir)
    for url in ("http://127.0.0.1:20001", "http://127.0.0.1:20002"):
        write_address(data_dir, EMBEDDED_NAME, url, pid=1)
        assert services.objects.backend.url == url
        assert services.objects is services.objects


def test_a_client_that_goes_away_ends_its_invocation(
    services: Services, owner: Credentials, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outcrop.gateway")
    patient = replace(services, settings=replace(services.settings, model_start_seconds=3600))
    path = f"/model/{quote('amazon.titan-text-lite-v1', safe='')}/invoke"
    call = Call(owner, "POST", path, {"inputText": "Hello"})
    call.goes_away = True
    assert call.answered(patient).status == 499
    assert "r-1 InvokeModel 499" in caplog.text


def test_a_client_that_stays_gets_its_error(services: Services, owner: Credentials) -> None:
    path = "/model/amazon.titan-text-lite-v1/invoke"
    reply = Call(owner, "POST", path, {"inputText": "Hello"}).answered(services)
    assert reply.status == 429
    assert "being loaded" in json.loads(reply.body)["message"]
