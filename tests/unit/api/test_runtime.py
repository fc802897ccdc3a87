"""No invocation waits for ever."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import anyio
import pytest
from tests.unit.api.conftest import Context
from tests.unit.api.runtime_gateway import WEIGHTS, Gateway, running_gateway

from outcrop.api import runtime, targets
from outcrop.api.context import Services
from outcrop.data.records import Message
from outcrop.errors import ModelNotReadyException
from outcrop.serve.prompt_formats import NativeRequest
from outcrop.serve.request import SamplingParams
from outcrop.store import servers
from outcrop.store.database import transaction


def test_a_server_that_says_it_is_ready_and_does_not_answer_is_given_up(
    services: Services, context: Context, tmp_path: Path
) -> None:
    target = targets.resolve(context("InvokeModel"), "amazon.titan-text-lite-v1", "InvokeModel")
    with transaction(services.engine) as connection:
        servers.want(connection, target.weights)
        servers.mark_starting(connection, target.weights, str(tmp_path / "absent.sock"))
        servers.mark_ready(connection, target.weights, 1)
    native = NativeRequest((Message("user", "Hello"),), SamplingParams())

    async def ask() -> None:
        with anyio.fail_after(30):
            await runtime.generate(context("InvokeModel"), target, native)

    with pytest.raises(ModelNotReadyException, match="does not answer"):
        asyncio.run(ask())


def ask(gateway: Gateway) -> None:
    body = json.dumps({"inputText": "Hello"})
    model = "amazon.titan-text-lite-v1"
    assert gateway.client().invoke_model(modelId=model, body=body)["body"].read()


def test_requests_after_the_first_keep_its_connection_and_look_at_no_row(tmp_path: Path) -> None:
    """Each of the two would cost a hand-over between threads, and more."""
    with running_gateway(tmp_path) as gateway:
        ask(gateway)
        with transaction(gateway.engine) as connection:
            servers.remove(connection, WEIGHTS)
        for _ in range(3):
            ask(gateway)
        assert len(gateway.model.requests) == 4
        assert gateway.model.num_connections == 1


def test_a_server_that_has_gone_is_looked_for_again(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as gateway:
        gateway.model.ending = "once"  # answered, then the connection ends
        for _ in range(3):
            ask(gateway)
        assert gateway.model.num_connections == 3
