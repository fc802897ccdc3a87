"""The gateway's ASGI app in the test's own process, and one signed client of it.

No server, no socket: a request is the scope and the messages that a server would hand over, so a
thousand of them take two seconds. Every successful answer passes through `check_answer`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from botocore.model import OperationModel, Shape
from sqlalchemy import Engine
from starlette.types import ASGIApp, Message
from tests.protocol.answers import check_answer
from tests.protocol.wires import Sent, receive, send

from outcrop.api.app import create_app
from outcrop.identity.bootstrap import bootstrap
from outcrop.identity.credentials import Credentials
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate
from outcrop.wire import sigv4
from outcrop.wire.model import service_model
from outcrop.wire.serialize import HttpReply

SIGNED_FOR = {"sts": "sts"}
"""What requests of a service are signed for, where that is not `bedrock`."""


class Refused(Exception):
    """The gateway answered with an error, as botocore reads it."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Gateway:
    """The app and its owner's key."""

    settings: Settings
    engine: Engine
    owner: Credentials
    app: ASGIApp
    runner: asyncio.Runner

    def call(
        self, service: str, name: str, *, credentials: Credentials | None = None, **params: Any
    ) -> dict[str, Any]:
        """Call an operation as boto3 does, and return the answer as boto3 does.

        Raises:
            Refused: it was answered with an error.
        """
        operation = service_model(service).operation_model(name)
        (reply,) = self.replies([(service, send(operation, params))], credentials)
        return self.read(operation, reply)

    def read(self, operation: OperationModel, reply: HttpReply) -> dict[str, Any]:
        """Return an answer as botocore reads it, held against its shape.

        Raises:
            Refused: it is an error.
        """
        parsed = receive(operation, reply)
        if reply.status >= 300:
            error = parsed["Error"]
            raise Refused(reply.status, error["Code"], error["Message"])
        check_answer(operation, parsed)
        return parsed

    def replies(
        self, requests: Iterable[tuple[str, Sent]], credentials: Credentials | None = None
    ) -> list[HttpReply]:
        """Sign and send requests one after the other, each with the service it is for."""

        async def every() -> list[HttpReply]:
            return [
                await self._reply(sent, SIGNED_FOR.get(service, "bedrock"), credentials)
                for service, sent in requests
            ]

        return self.runner.run(every())

    def replies_at_once(
        self, requests: Sequence[tuple[str, Sent]], *, clients: int
    ) -> list[HttpReply]:
        """Send requests by so many clients at once; the answers come in the requests' order."""

        async def every() -> list[HttpReply]:
            turn = asyncio.Semaphore(clients)

            async def one(service: str, sent: Sent) -> HttpReply:
                async with turn:
                    return await self._reply(sent, SIGNED_FOR.get(service, "bedrock"), None)

            return await asyncio.gather(*(one(*request) for request in requests))

        return self.runner.run(every())

    async def _reply(
        self, sent: Sent, signed_for: str, credentials: Credentials | None
    ) -> HttpReply:
        key = credentials or self.owner
        headers = {"host": "localhost", **sent.headers}
        headers |= sigv4.sign_headers(
            *(sent.method, sent.raw_path, sent.query, headers),
            access_key_id=key.access_key_id,
            secret_access_key=key.secret_access_key,
            region=self.settings.region,
            service=signed_for,
            payload_hash=hashlib.sha256(sent.body).hexdigest(),
            now=datetime.now(UTC),
        )
        scope = {
            "type": "http",
            "method": sent.method,
            "path": sent.raw_path,
            "raw_path": sent.raw_path.encode(),
            "query_string": sent.query.encode(),
            "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
        }
        was_read = False
        messages: list[Message] = []

        async def receive_() -> Message:
            nonlocal was_read
            if not was_read:
                was_read = True
                return {"type": "http.request", "body": sent.body, "more_body": False}
            await asyncio.Event().wait()  # the client stays
            raise AssertionError

        async def send_(message: Message) -> None:
            messages.append(message)

        await self.app(scope, receive_, send_)
        start = messages[0]
        answered = {name.decode().lower(): text.decode() for name, text in start["headers"]}
        body = b"".join(message.get("body", b"") for message in messages[1:])
        return HttpReply(start["status"], answered, body)


@contextlib.contextmanager
def gateway_in_process(folder: Path, **changes: Any) -> Iterator[Gateway]:
    """Open the app on an empty database; no object store answers, and no model server."""
    settings = Settings(
        data_dir=folder, model_start_seconds=0, s3_endpoint_url="http://127.0.0.1:1",
        s3_access_key_id="key", s3_secret_access_key="secret", **changes,
    )  # fmt: skip
    engine = connect(settings.effective_database_url)
    migrate(engine)
    owner = bootstrap(engine, settings)
    app = create_app(settings)
    with asyncio.Runner() as runner:
        steps: list[Message] = []
        stop = asyncio.Event()

        async def open_() -> asyncio.Task[None]:
            started = asyncio.Event()

            async def receive_() -> Message:
                if started.is_set():
                    await stop.wait()
                return {"type": "lifespan.startup"}

            async def send_(message: Message) -> None:
                steps.append(message)
                started.set()

            async def run() -> None:
                await app({"type": "lifespan"}, receive_, send_)

            task = asyncio.create_task(run())
            await started.wait()
            return task

        async def close(task: asyncio.Task[None]) -> None:
            stop.set()
            await task

        task = runner.run(open_())
        assert steps[0]["type"] == "lifespan.startup.complete", steps
        try:
            yield Gateway(settings, engine, owner, app, runner)
        finally:
            runner.run(close(task))
            engine.dispose()


def write_unchecked(operation: OperationModel, params: Mapping[str, Any]) -> Sent:
    """Write a request down to its bytes, whatever its members are: botocore refuses most mistakes.

    Members in path, query and headers are written as text; the rest is JSON as it stands, but that
    bytes become base64 and times ISO 8601.
    """
    path, fields, headers, document = operation.http["requestUri"], [], {}, {}
    payload: Any = b""
    shape = operation.input_shape
    for name, value in params.items():
        member = shape.members[name]
        location, key = member.serialization.get("location"), member.serialization.get("name", name)
        if location == "uri":
            path = path.replace("{" + key + "}", quote(_text(value), safe=""))
        elif location == "querystring":
            items = value if isinstance(value, list) else [value]
            fields += [(key, _text(item)) for item in items]
        elif location == "header":
            is_json = member.serialization.get("jsonvalue")
            headers[key.lower()] = json.dumps(value) if is_json else _text(value)
        elif name == shape.serialization.get("payload"):
            payload = value
        else:
            document[key] = _json(member, value)
    if shape is None or shape.serialization.get("payload"):
        body = payload
    else:
        has_body = operation.http["method"] in ("POST", "PUT", "PATCH")
        body = json.dumps(document).encode() if has_body or document else b""
    headers["content-type"] = "application/json"
    return Sent(operation.http["method"], path, urlencode(fields), headers, body)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _json(shape: Shape, value: Any) -> Any:
    """Return a value under the names that its members have on the wire."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime):
        return value.isoformat()
    kind = shape.type_name
    if kind == "structure" and isinstance(value, dict) and not shape.is_document_type:
        members = shape.members
        return {
            members[name].serialization.get("name", name): _json(members[name], item)
            for name, item in value.items()
        }
    if kind == "list" and isinstance(value, list):
        return [_json(shape.member, item) for item in value]
    if kind == "map" and isinstance(value, dict):
        return {key: _json(shape.value, item) for key, item in value.items()}
    return value
