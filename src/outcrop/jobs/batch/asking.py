"""One record of a batch job: read as the gateway reads a request, asked, and answered in its form.

What is wrong with a record is its answer. What is wrong with the moment (a model server that is
away, or has too much to do) is waited out: it is nobody's answer.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from sqlalchemy import Engine

from outcrop.errors import (
    ApiError,
    ModelErrorException,
    ModelNotReadyException,
    ServiceUnavailableException,
    ServingError,
    ThrottlingException,
)
from outcrop.jobs.batch.journal import Answer
from outcrop.jobs.batch.outputs import dump
from outcrop.models.catalog import BaseModel
from outcrop.serve import tool_use
from outcrop.serve.client import ModelClient
from outcrop.serve.invocation import converse_answer, generation_request, read_converse
from outcrop.serve.prompt_formats import NativeRequest, format_body, parse_body
from outcrop.serve.request import Generation, Owner
from outcrop.serve.whereabouts import LONGEST_LOOK_SECONDS, RETRY_SECONDS, find_server
from outcrop.settings import Settings
from outcrop.store.rows import ModelServer
from outcrop.wire.model import service_model
from outcrop.wire.parse import convert
from outcrop.wire.serialize import to_json
from outcrop.wire.validate import validate

logger = logging.getLogger("outcrop.attempt")

CONVERSE = "Converse"
MAX_FAILURES = 3
"""How often a model server that lives on may fail on a record before that is its answer."""
MAX_ENDS = 8
"""How often the model server may end while it answers a record before that is its answer: it may be
this record that ends it."""
MAX_START_FAILURES = 5
"""How often the model server may fail to start before the job fails."""
Connect = Callable[[Path], ModelClient]
_AWAY = (ServingError, ModelNotReadyException, ServiceUnavailableException)


@dataclass(frozen=True)
class Asked:
    """Which model a job asks, and how."""

    model_id: str
    """As its owner named it."""
    region: str
    base: BaseModel
    weights: str
    """Key of the base weights."""
    artifact: Path | None
    """Folder of the custom model's artifact."""
    digest: str | None
    owner: Owner
    is_converse: bool
    """Whether records have the form of Converse, not of the family's own body."""


@dataclass(frozen=True, eq=False)
class _Server:
    """A model server that was found, and the connections to it."""

    row: ModelServer
    client: ModelClient

    async def lives(self) -> bool:
        """Return whether it is still the same one, after it failed on a request."""
        try:
            return bool((await self.client.stats())["pid"] == self.row.pid)
        except (ServingError, ModelErrorException):
            return False


class Asker:
    """Answers records; many at a time, in one event loop."""

    def __init__(self, settings: Settings, engine: Engine, asked: Asked, connect: Connect) -> None:
        """
        Args:
            connect: makes the client of a model server's socket.
        """
        self._settings, self._engine, self._asked = settings, engine, asked
        self._connect = connect
        self._server: _Server | None = None
        self._looking = anyio.Lock()
        self._touched: dict[str, float] = {}
        self._start_failures = 0

    async def answer(self, number: int, model_input: dict[str, Any], seconds: float) -> Answer:
        """Return a record's answer, however long that takes.

        Args:
            number: of the record.
            seconds: how long the model server may take for it.
        Raises:
            ModelErrorException: no model server can be started.
        """
        started = time.perf_counter()
        try:
            params, native = self._read(model_input)
            found = [await self._generate(native, seconds) for _ in range(native.num_generations)]
        except _Unstartable as error:
            raise error.reason from error
        except ApiError as error:
            wrong = {"errorCode": error.http_status, "errorMessage": error.message}
            return Answer(number, dump(wrong), is_error=True)
        if self._asked.is_converse:
            milliseconds = int(1000 * (time.perf_counter() - started))
            content = self._say(params, native, found[0], milliseconds)
        else:
            content = format_body(self._asked.base, native, found)
        tokens = found[0].input_tokens, sum(item.output_tokens for item in found)
        return Answer(number, content, False, *tokens)

    async def find_server(self) -> None:
        """Wait until the model server runs.

        Raises:
            ModelErrorException: it cannot be started.
        """
        try:
            await self._ready()
        except _Unstartable as error:
            raise error.reason from error

    async def touch(self) -> None:
        """Say that the model server is in use, so that it is not ended for idleness."""
        if self._server is not None:
            await anyio.to_thread.run_sync(self._find)

    def _find(self) -> ModelServer | None:
        return find_server(self._settings, self._engine, self._asked.weights, self._touched)

    def close(self) -> None:
        """End the connections that were kept."""
        if self._server is not None:
            self._server.client.close()

    async def _ready(self) -> _Server:
        async with self._looking:  # one looks, the others wait for what it finds
            while self._server is None:
                self._server = await self._look()
                if self._server is None:
                    await anyio.sleep(LONGEST_LOOK_SECONDS)
            return self._server

    async def _look(self) -> _Server | None:
        try:
            found = await anyio.to_thread.run_sync(self._find)
        except ModelErrorException as error:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                raise _Unstartable(error) from error
            logger.warning("%s", error)
            await anyio.sleep(RETRY_SECONDS)
            return None
        if found is None or found.address is None:
            return None
        self._start_failures = 0
        return _Server(found, self._connect(Path(found.address)))

    def _read(self, model_input: dict[str, Any]) -> tuple[dict[str, Any], NativeRequest]:
        asked = self._asked
        params: dict[str, Any] = {}
        if asked.is_converse:
            shape = service_model("bedrock-runtime").operation_model(CONVERSE).input_shape
            params = convert(shape, {**model_input, "modelId": None}, "")
            params["modelId"] = asked.model_id
            validate(shape, params)
            native = read_converse(asked.base, params, asked.model_id, asked.region)
        else:
            native = parse_body(asked.base, json.dumps(model_input).encode())
        return params, tool_use.check(self._settings, asked.weights, native)

    def _say(
        self, params: dict[str, Any], native: NativeRequest, found: Generation, milliseconds: int
    ) -> bytes:
        shape = service_model("bedrock-runtime").operation_model(CONVERSE).output_shape
        members = converse_answer(self._asked.base, native, found, params, milliseconds)
        return dump(to_json(shape, members))

    async def _generate(self, native: NativeRequest, seconds: float) -> Generation:
        asked = self._asked
        request = generation_request(
            native,
            adapter=str(asked.artifact) if asked.artifact else None,
            adapter_digest=asked.digest,
            owner=replace(asked.owner, batch=True),
            timeout_seconds=seconds,
        )
        failures = ends = 0
        while True:
            server = await self._ready()
            try:
                return tool_use.with_calls(native, await server.client.generate(request))
            except ThrottlingException as error:
                wanted = error.members.get("retryAfterSeconds")
                await anyio.sleep(wanted if isinstance(wanted, float | int) else 1.0)
                continue
            except _AWAY:
                pass
            except ModelErrorException as error:
                if await server.lives():
                    failures += 1
                else:
                    ends += 1
                if failures >= MAX_FAILURES or ends >= MAX_ENDS:
                    raise
                logger.warning("a record is asked again: %s", error)
            if self._server is server:
                self._server = None
                server.client.close()
            await anyio.sleep(LONGEST_LOOK_SECONDS)


class _Unstartable(Exception):
    """No model server can be started: no record's fault."""

    def __init__(self, reason: ModelErrorException) -> None:
        super().__init__(reason.message)
        self.reason = reason
