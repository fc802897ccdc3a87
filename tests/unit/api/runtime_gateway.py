"""A real gateway, a model server that says what a test wants, and boto3 clients of the first."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import boto3
import uvicorn
from botocore.config import Config
from sqlalchemy import Engine
from tests.protocol.answers import check_client

from outcrop.api.app import create_app, listen
from outcrop.data.records import Message, Tool
from outcrop.errors import ApiError
from outcrop.identity import accounts
from outcrop.identity.bootstrap import bootstrap
from outcrop.identity.credentials import Credentials
from outcrop.models.catalog import shipped_models
from outcrop.serve.request import (
    Event,
    Generation,
    GenerationRequest,
    TokenEvent,
    event_to_json,
    messages_from_json,
    prompt_from_json,
    request_from_json,
)
from outcrop.settings import Settings
from outcrop.store import servers
from outcrop.store.database import connect, migrate, transaction

WEIGHTS = shipped_models()[0].weights
ANSWER: tuple[Event, ...] = (
    TokenEvent("Hél", 7, 1),
    TokenEvent("lo", 7, 2),
    Generation("Héllo you", 7, 4, "stop"),
)
"""Two pieces, and a last one that was held back."""
SECONDS = 20.0
Ending = Literal["done", "once", "cut", "wait"]
"""After the events: keep the connection; end it (a whole answer, or a cut one); or wait for the
client to go away."""


class ScriptedModelServer:
    """Speaks the model server's protocol at a socket; answers every request alike."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.events: tuple[Event, ...] = ANSWER
        self.ending: Ending = "done"
        self.late_refusal: tuple[object, ApiError] | None = None
        """A prompt, and how it is refused, once another request has its whole answer."""
        self.requests: list[GenerationRequest] = []
        self.num_connections = 0
        self.counted: list[tuple[Message, ...]] = []
        self.counted_tools: list[tuple[Tool, ...]] = []
        self.counted_prompts: list[str | None] = []
        self.was_left = threading.Event()
        """A client went away from an answer that was not over."""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._answered = asyncio.Event()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        assert self._up.wait(SECONDS)

    def script(self, *events: Event, ending: Ending = "done") -> ScriptedModelServer:
        """Answer so from now on, and forget what was asked."""
        self.events, self.ending, self.late_refusal = events, ending, None
        self.requests.clear()
        self.counted.clear()
        self.was_left.clear()
        return self

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(SECONDS)
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_unix_server(self._answer, str(self.socket))
        async with server:
            self._up.set()
            await self._stop.wait()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                verb, size = (await reader.readuntil(b"\n")).split()
                body = await reader.readexactly(int(size))
                is_kept = await self._reply(verb, body, reader, writer)
                await writer.drain()
                if not is_kept:
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _reply(
        self,
        verb: bytes,
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Answer a request; False where the connection ends with it."""
        if verb == b"count":
            messages, tools = messages_from_json(body)
            self.counted.append(messages)
            self.counted_tools.append(tools)
            self.counted_prompts.append(prompt_from_json(body))
            writer.write(json.dumps({"input_tokens": 7}).encode() + b"\n")
            return True
        request = request_from_json(body)
        self.requests.append(request)
        if self.late_refusal and request.prompt == self.late_refusal[0]:
            await asyncio.wait_for(self._answered.wait(), SECONDS)
            writer.write(event_to_json(self.late_refusal[1]))
            return True
        for event in self.events:
            writer.write(event_to_json(event))
            await writer.drain()
        refused = bool(self.events) and isinstance(self.events[-1], ApiError)
        if self.ending == "wait" and not refused:
            await reader.read()
            self.was_left.set()
        self._answered.set()
        return self.ending == "done" or refused


@dataclass(frozen=True)
class Gateway:
    """A running gateway, its owner, and the model server of every base model that ships."""

    url: str
    settings: Settings
    engine: Engine
    owner: Credentials
    model: ScriptedModelServer
    server: uvicorn.Server
    clients: list[Any] = field(default_factory=list)

    def client(
        self,
        credentials: Credentials | None = None,
        *,
        service: str = "bedrock-runtime",
        region: str | None = None,
        read_timeout: float = SECONDS,
    ) -> Any:
        """Return a boto3 client of a service that asks once; closed with the gateway."""
        credentials = credentials or self.owner
        made = boto3.client(
            service,
            endpoint_url=self.url,
            aws_access_key_id=credentials.access_key_id,
            aws_secret_access_key=credentials.secret_access_key,
            region_name=region or self.settings.region,
            config=Config(retries={"total_max_attempts": 1}, read_timeout=read_timeout),
        )
        self.clients.append(made)
        return check_client(made)

    def user(self, name: str, action: str) -> Credentials:
        """Return the key of a new user who may do one action on everything."""
        statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        account = self.settings.account
        with transaction(self.engine) as connection:
            accounts.create_user(connection, account, name)
            accounts.put_user_policy(connection, account, name, "p", policy)
            return accounts.create_access_key(connection, account, name)


@contextlib.contextmanager
def running_gateway(folder: Path, **changes: Any) -> Iterator[Gateway]:
    """Run both for the length of a `with` block."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        data_dir=folder, port=0, model_start_seconds=1, s3_endpoint_url="http://127.0.0.1:1",
        s3_access_key_id="key", s3_secret_access_key="secret", **changes,
    )  # fmt: skip
    engine = connect(settings.effective_database_url)
    migrate(engine)
    owner = bootstrap(engine, settings)
    model = ScriptedModelServer(folder / "model.sock")
    with transaction(engine) as connection:
        servers.want(connection, WEIGHTS)
        servers.mark_starting(connection, WEIGHTS, str(model.socket))
        servers.mark_ready(connection, WEIGHTS, 1)
    listener = listen(settings)
    config = uvicorn.Config(
        create_app(settings), log_config=None, lifespan="on", timeout_graceful_shutdown=0
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        place = Gateway(url, settings, engine, owner, model, server)
        yield place
        for client in place.clients:
            client.close()
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        listener.close()
        model.close()
        engine.dispose()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)
