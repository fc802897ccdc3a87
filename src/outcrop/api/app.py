"""The gateway: one port for S3, Bedrock, STS, our own operations and the OpenAI-style paths.

A request goes by the service it is signed for. Our own unsigned paths (`/healthz`, `/metrics`,
`/v1`) win for requests without a signature; an API key is Bedrock's on every other path. Every
other unsigned request is an anonymous S3 request, which is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.lowlevel
import anyio.to_thread
import httpx
import uvicorn
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from outcrop.api import handlers, metrics, openai
from outcrop.api.context import Services
from outcrop.api.event_stream import EventStreamResponse, StreamReply
from outcrop.api.log_spool import InvocationLog
from outcrop.api.s3 import s3_request
from outcrop.api.s3_actions import OWN_PATHS
from outcrop.api.signed import signed_request
from outcrop.errors import ApiError, SettingsError
from outcrop.identity.api_keys import bearer_key
from outcrop.identity.bootstrap import page_key
from outcrop.ids import new_request_id
from outcrop.meter.prices import load_prices
from outcrop.models.catalog import load_catalog
from outcrop.objects.client import backend
from outcrop.processes.address import GATEWAY, last_port, reachable_url
from outcrop.settings import Settings
from outcrop.store.database import connect
from outcrop.store.remembered import Remembered
from outcrop.wire import route, serialize, sigv4

logger = logging.getLogger("outcrop.gateway")

MAX_CONNECTIONS_TO_STORE = 100


@asynccontextmanager
async def open_services(settings: Settings) -> AsyncIterator[Services]:
    """Open what requests share, and close it again."""
    engine = connect(settings.effective_database_url)
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS_TO_STORE)
    # No proxy, no time-out on transfers: a slow upload is the client's own affair.
    timeout = httpx.Timeout(None, connect=5.0)
    remembered = Remembered(engine)
    async with httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False) as http:
        try:
            log = InvocationLog(settings, engine, lambda: services.objects)
            catalog = load_catalog(settings)
            services = Services(
                settings=settings,
                engine=engine,
                catalog=catalog,
                prices=load_prices(settings.price_book, catalog.all_ids),
                backend=backend(settings),
                http=http,
                page_key=page_key(settings),
                invocation_log=log,
                remembered=remembered,
            )
            async with services.usage.flushing(engine):
                with log.running():
                    yield services
            services.close_model_clients()
            await anyio.lowlevel.checkpoint()  # in which they are closed
        finally:
            remembered.close()
            engine.dispose()


def create_app(settings: Settings) -> ASGIApp:
    """Return the gateway as an ASGI application; the lifespan opens the services."""
    opened: dict[str, Services] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(settings, opened, receive, send)
        elif scope["type"] == "http":
            response = await _respond(Request(scope, receive), opened["services"])
            await response(scope, receive, send)
        else:  # no WebSockets here
            await send({"type": "websocket.close", "code": 1000})

    return app


async def _lifespan(
    settings: Settings, opened: dict[str, Services], receive: Receive, send: Send
) -> None:
    await receive()
    try:
        async with open_services(settings) as services:
            opened["services"] = services
            await send({"type": "lifespan.startup.complete"})
            await receive()
    except Exception as error:
        logger.exception("the gateway cannot start")
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        return
    await send({"type": "lifespan.shutdown.complete"})


async def _respond(request: Request, services: Services) -> ASGIApp:
    request_id = new_request_id()
    signed = signed_request(request)
    try:
        signature = sigv4.read_signature(signed)
    except ApiError as error:
        if _first_part(signed.raw_path) == openai.FIRST_PART:
            return openai.Answer(services, request_id)
        presigned = "x-amz-" in signed.raw_query.lower()
        service = "s3" if presigned or "/s3/aws4_request" in str(signed.headers) else "bedrock"
        return _response(serialize.serialize_error(service, error, request_id))
    bearer = bearer_key(request.headers.get("authorization", "")) is not None
    if signature is not None:
        is_s3 = signature.service == "s3"
    elif _first_part(signed.raw_path) == openai.FIRST_PART:
        return openai.Answer(services, request_id)
    elif signed.raw_path == metrics.PATH:
        return await metrics.metrics_page(request, services)
    elif not bearer and _first_part(signed.raw_path) in OWN_PATHS:
        return await _own_page(request, services)
    else:  # without a key refused either way, in the protocol that its client most likely speaks
        is_s3 = not bearer and not _names_operation(signed.method, signed.raw_path)
    if is_s3:
        return await s3_request(request, services, request_id)
    return _response(await handlers.answer(request, services, request_id))


def _names_operation(method: str, raw_path: str) -> bool:
    try:
        route.match(method, raw_path)
    except ApiError:
        return False
    return True


def _first_part(path: str) -> str:
    return path.removeprefix("/").partition("/")[0]


async def _own_page(request: Request, services: Services) -> Response:
    if request.url.path != "/healthz":
        return Response("There is nothing here yet.\n", 404, media_type="text/plain")
    healthy = await anyio.to_thread.run_sync(_database_answers, services)
    body = json.dumps({"status": "ok" if healthy else "database unavailable"})
    return Response(body, 200 if healthy else 503, media_type="application/json")


def _database_answers(services: Services) -> bool:
    try:
        with services.engine.connect() as connection:
            return connection.execute(text("SELECT 1")).scalar() == 1
    except Exception:
        logger.exception("the database does not answer")
        return False


def _response(reply: serialize.HttpReply | StreamReply) -> Response:
    if isinstance(reply, StreamReply):
        return EventStreamResponse(reply)
    return Response(reply.body, reply.status, reply.headers)


def listen(settings: Settings) -> socket.socket:
    """Bind the gateway's port, so that port 0 is known before the first request.

    Raises:
        SettingsError: the port is in use, or host and port cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, because asyncio sets TCP_NODELAY only then; without it an answer waits 40 ms
    # for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {settings.port} is in use; choose another with --port."
            ) from error
        raise SettingsError(
            f"port {settings.port} of {settings.host} cannot be listened on: {error.strerror}. "
            "Choose others with --host and --port."
        ) from error
    return listener


def listen_again(settings: Settings) -> socket.socket | None:
    """Bind the port that the system chose for an earlier gateway of this service, if it did.

    Clients were told that port, so a gateway that is started again after a crash must have it.
    """
    port = last_port(settings.data_dir, GATEWAY) if settings.port == 0 else 0
    if not port:
        return None
    with contextlib.suppress(SettingsError):  # somebody else has it now
        return listen(dataclasses.replace(settings, port=port))
    return None


def run_gateway(settings: Settings, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM.

    Args:
        on_ready: called with the URL once requests are answered.
    Raises:
        SettingsError: as `listen`, and as `make_tls_files`.
    """
    certificate = _certificate(settings)
    listener = listen_again(settings) or listen(settings)
    url = reachable_url(*listener.getsockname()[:2], tls=settings.tls)
    config = uvicorn.Config(
        create_app(settings),
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,
        ssl_certfile=certificate,
    )
    server = _Server(config, lambda: on_ready(url))
    server.run(sockets=[listener])


def _certificate(settings: Settings) -> Path | None:
    """Return the file with key and certificate, or None for plain http."""
    if not settings.tls:
        return None
    from outcrop.identity.certificates import make_tls_files  # a tenth of a second

    return make_tls_files(settings).server


class _Server(uvicorn.Server):
    """uvicorn's server that says when it has started."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()
            threading.Thread(target=_warm_up, daemon=True).start()


def _warm_up() -> None:
    """Load what the first request would wait for, and keep the garbage collector away from it.

    85,000 objects are there by then and stay to the end. Each time the collector looked at all of
    them, a request took 60 to 100 ms longer: one in a hundred lists of jobs.
    """
    route.load()
    gc.collect()
    gc.freeze()
    # A page of 1,000 jobs makes 60,000 objects that all live until it is written: to look for
    # garbage after every 700 took a fifth of its time, and found none.
    gc.set_threshold(50_000, 20, 20)
