"""No invocation waits for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path

import anyio
import pytest
from tests.unit.api.conftest import Context

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
