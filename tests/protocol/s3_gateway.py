"""A gateway for S3 alone, over a real object store, and requests signed by hand against it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
import httpx
import uvicorn
from botocore.config import Config
from sqlalchemy import Engine
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from outcrop.api.s3 import s3_request
from outcrop.identity import accounts
from outcrop.identity.bootstrap import bootstrap
from outcrop.identity.credentials import Credentials
from outcrop.objects import embedded
from outcrop.objects.client import Backend, backend
from outcrop.processes.supervise import Supervisor
from outcrop.settings import Settings
from outcrop.store.database import connect, migrate, transaction
from outcrop.wire import sigv4


@dataclass(frozen=True)
class Services:
    """What s3_request needs."""

    settings: Settings
    engine: Engine
    backend: Backend
    http: httpx.AsyncClient


@dataclass(frozen=True)
class Gateway:
    """A running gateway and its owner's credentials."""

    url: str
    settings: Settings
    engine: Engine
    owner: Credentials
    store: Supervisor
    clients: list[Any] = field(default_factory=list)
    """What `client` made; closed with the gateway."""

    def client(self, credentials: Credentials | None = None, **config: Any) -> Any:
        """Return a boto3 client."""
        credentials = credentials or self.owner
        made = boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=credentials.access_key_id,
            aws_secret_access_key=credentials.secret_access_key,
            region_name=self.settings.region,
            config=Config(**{"retries": {"max_attempts": 1}, "read_timeout": 60, **config}),
        )
        self.clients.append(made)
        return made

    def user(self, *documents: str) -> Credentials:
        """Return the key of a new user with these policies."""
        name = f"user-{uuid.uuid4().hex[:8]}"
        account = self.settings.account
        with transaction(self.engine) as connection:
            accounts.create_user(connection, account, name)
            for number, document in enumerate(documents):
                accounts.put_user_policy(connection, account, name, f"p{number}", document)
            return accounts.create_access_key(connection, account, name)

    def bucket(self) -> str:
        """Return the name of a new bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name


@dataclass(frozen=True)
class Reply:
    """An answer, as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The code of an XML error."""
        return self.body.partition(b"<Code>")[2].partition(b"</Code>")[0].decode()


@contextlib.contextmanager
def gateway(data_dir: Path) -> Iterator[Gateway]:
    """Run object store and gateway for the length of a `with` block."""
    settings = Settings(data_dir=data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    engine = connect(settings.effective_database_url)
    migrate(engine)
    owner = bootstrap(engine, settings)
    with embedded.running(settings) as store, _serve(settings, engine) as url:
        place = Gateway(url, settings, engine, owner, store)
        yield place
        for client in place.clients:
            client.close()
    engine.dispose()


@contextlib.contextmanager
def _serve(settings: Settings, engine: Engine) -> Iterator[str]:
    opened: list[Services] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            timeout = httpx.Timeout(None, connect=5.0)
            async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
                opened.append(Services(settings, engine, backend(settings), client))
                await send({"type": "lifespan.startup.complete"})
                await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        response = await s3_request(Request(scope, receive), opened[0], str(uuid.uuid4()))
        await response(scope, receive, send)

    # Named as TCP, or asyncio leaves Nagle on: a body waits 40 ms until the head is acknowledged.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Wait for something that must come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def send(
    place: Gateway,
    method: str,
    path: str,
    *,
    query: str = "",
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    payload_hash: str | None = None,
    credentials: Credentials | None = None,
    now: datetime | None = None,
    unsigned_headers: Mapping[str, str] | None = None,
    close_after: int | None = None,
) -> Reply:
    """Send one request signed in its headers.

    Args:
        path: as it is sent; the signature is over the same.
        close_after: end the connection after so many bytes of the body, without an answer.
    """
    request_headers, _ = sign(
        place, method, path, query, body, headers, payload_hash, credentials, now
    )
    host = urlsplit(place.url).netloc
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.putrequest(
        method,
        path + (f"?{query}" if query else ""),
        skip_host=True,
        skip_accept_encoding=True,
    )
    for name, value in {**request_headers, **(unsigned_headers or {})}.items():
        connection.putheader(name, value)
    if "transfer-encoding" not in request_headers:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders()
    if close_after is not None:
        connection.send(body[:close_after])
        connection.close()
        return Reply(0, {}, b"")
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(body)
    answer = connection.getresponse()
    reply = Reply(
        answer.status,
        {name.lower(): value for name, value in answer.getheaders()},
        answer.read(),
    )
    connection.close()
    return reply


def fetch(url: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
    """Send a request as it is, with no headers but these (urllib adds a content type)."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, target, body or None, named)
    answer = connection.getresponse()
    found = {name.lower(): value for name, value in answer.getheaders()}
    reply = Reply(answer.status, found, answer.read())
    connection.close()
    return reply


def sign(
    place: Gateway,
    method: str,
    path: str,
    query: str,
    body: bytes,
    headers: Mapping[str, str] | None,
    payload_hash: str | None,
    credentials: Credentials | None,
    now: datetime | None,
) -> tuple[dict[str, str], sigv4.SigningKey]:
    """Return all headers of a signed request, and the key that signs its chunks."""
    credentials = credentials or place.owner
    all_headers = {"host": urlsplit(place.url).netloc, **(headers or {})}
    now = now or datetime.now(UTC)
    signature = sigv4.sign_headers(
        method,
        path,
        query,
        all_headers,
        access_key_id=credentials.access_key_id,
        secret_access_key=credentials.secret_access_key,
        region=place.settings.region,
        service="s3",
        payload_hash=payload_hash or hashlib.sha256(body).hexdigest(),
        now=now,
    )
    day, region = now.strftime("%Y%m%d"), place.settings.region
    key = sigv4.SigningKey(
        sigv4.signing_key(credentials.secret_access_key, day, region, "s3"),
        signature["x-amz-date"],
        f"{day}/{region}/s3/aws4_request",
        signature["authorization"].rpartition("=")[2],
    )
    return {**all_headers, **signature}, key


def send_chunks(
    place: Gateway,
    path: str,
    pieces: list[bytes],
    *,
    trailer: tuple[str, str] | None = None,
    tamper: str = "",
    decoded_length: int | None = None,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """PUT in signed chunks, as the SDKs for Java, Go and .NET do over plain HTTP.

    Args:
        trailer: a checksum to send after the data.
        tamper: what to change after signing: `data`, `last` (the empty chunk) or `trailer`.
    """
    word = sigv4.STREAMING_SIGNED_TRAILER if trailer else sigv4.STREAMING_SIGNED
    length = sum(map(len, pieces)) if decoded_length is None else decoded_length
    all_headers = {
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": str(length),
        **({"x-amz-trailer": trailer[0]} if trailer else {}),
        **(headers or {}),
    }
    now = datetime.now(UTC)
    _, key = sign(place, "PUT", path, "", b"", all_headers, word, None, now)
    previous, body = key.signature, b""
    for piece in [*pieces, b""]:
        digest = hashlib.sha256(piece).hexdigest()
        signature = sigv4.sign(
            key.key,
            "AWS4-HMAC-SHA256-PAYLOAD",
            key.timestamp,
            key.scope,
            previous,
            sigv4.EMPTY_SHA256,
            digest,
        )
        previous = signature
        sent = bytes(len(piece)) if tamper == "data" and piece is pieces[-1] else piece
        shown = "0" * 64 if tamper == "last" and not piece else signature
        body += f"{len(piece):x};chunk-signature={shown}\r\n".encode() + sent
        body += b"\r\n" if piece or not trailer else b""
    if trailer:
        line = f"{trailer[0]}:{trailer[1]}"
        digest = hashlib.sha256(f"{line}\n".encode()).hexdigest()
        signature = sigv4.sign(
            key.key, "AWS4-HMAC-SHA256-TRAILER", key.timestamp, key.scope, previous, digest
        )
        shown = "0" * 64 if tamper == "trailer" else signature
        body += f"{line}\r\nx-amz-trailer-signature:{shown}\r\n\r\n".encode()
    return send(place, "PUT", path, body=body, headers=all_headers, payload_hash=word, now=now)


def send_unsigned_chunks(
    place: Gateway,
    path: str,
    data: bytes,
    checksum: str,
    *,
    name: str = "x-amz-checksum-crc32",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """PUT in unsigned chunks with a checksum after them, as boto3 does over TLS."""
    body = b"".join(
        b"%x\r\n%b\r\n" % (len(data[start : start + 100_000]), data[start : start + 100_000])
        for start in range(0, len(data), 100_000)
    )
    body += f"0\r\n{name}:{checksum}\r\n\r\n".encode()
    all_headers = {
        "content-encoding": "aws-chunked",
        "x-amz-decoded-content-length": str(len(data)),
        "x-amz-trailer": name,
        **(headers or {}),
    }
    word = sigv4.STREAMING_UNSIGNED_TRAILER
    return send(place, "PUT", path, body=body, headers=all_headers, payload_hash=word)


def crc32(data: bytes) -> str:
    """Return the checksum as S3 writes it."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def object_path(bucket: str, key: str) -> str:
    """Return the path of an object, encoded as SDKs do it."""
    return f"/{bucket}/{quote(key, safe='/-_.~')}"
