"""The model server: one engine behind a unix socket that only its owner can reach.

    POST /generate  a GenerationRequest; answers NDJSON events as `serve/request.py` has them
    POST /count     messages; answers {"input_tokens": n}
    GET  /stats     figures of engine and process, for its owner: `curl --unix-socket`

The event loop only moves bytes: tokens are drawn in the engine's thread and prompts are rendered in
others, so it answers while the model computes. Knows no accounts and no body formats.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import anyio
import anyio.to_thread
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from outcrop.errors import ApiError, SettingsError, ValidationException
from outcrop.models.weights import ensure_weights
from outcrop.processes.group import end_group_with_this_process
from outcrop.serve.request import (
    Event,
    Generation,
    event_to_json,
    messages_from_json,
    request_from_json,
)
from outcrop.settings import Settings

if TYPE_CHECKING:
    from outcrop.serve.interface import Engine

T = TypeVar("T")
logger = logging.getLogger("outcrop.model-server")

MAX_THREADS = 8
"""More threads than this do not make one small model faster."""
STOP_SECONDS = 2
"""How long answers that are on their way may still take after SIGTERM."""
MAX_SOCKET_PATH = 100
"""Bytes. Source: unix(7) allows 108 on Linux, 104 on macOS, with the end."""


def run_model_server(
    settings: Settings,
    weights_key: str,
    socket_path: str | Path,
    *,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Load the weights and serve them until SIGTERM or SIGINT.

    Args:
        weights_key: which weights, by their key in the catalogue.
        socket_path: is made; its folder too, for the owner alone.
        ready: called once, when requests are answered.
    Raises:
        ModelError: the weights cannot be loaded.
        SettingsError: the path is too long for a socket.
    """
    # Threads that spin while they wait for each other stand still when a training job runs beside
    # them: 590 ms a token instead of 57 on two shared cores. It is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from outcrop.models.compiled import keep_libraries_in, kernel_folder

    started = time.perf_counter()
    # uvicorn raises the signal that ended it once more: then, and while loading, just end.
    signal.signal(signal.SIGTERM, _end)
    listener = _listen(Path(socket_path))
    try:
        folder = ensure_weights(settings, weights_key)
        keep_libraries_in(kernel_folder(settings))
        engine = open_engine(folder, weights_key, settings)
        app = make_app(engine, weights_key, timeout_seconds=settings.invoke_timeout_seconds)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            lifespan="on",
            timeout_graceful_shutdown=STOP_SECONDS,
            server_header=False,
            date_header=False,
        )

        def on_ready() -> None:
            logger.info("%s loaded in %.1f s", weights_key, time.perf_counter() - started)
            ready()

        _Server(config, on_ready).run(sockets=[listener])
    finally:
        listener.close()
        Path(socket_path).unlink(missing_ok=True)


def open_engine(folder: Path, weights_key: str, settings: Settings) -> Engine:
    """Start what the settings have answer for the model of a folder.

    Args:
        weights_key: under which its measured rate is kept.
    Raises:
        ModelError: it does not start on this model.
        SettingsError: it is vLLM, which is not installed.
    """
    from outcrop.serve.engine import BatchEngine
    from outcrop.serve.fairness import Limits
    from outcrop.serve.rate import RateMeter, rate_file
    from outcrop.serve.routed import RoutedEngine
    from outcrop.serve.vllm import VllmEngine
    from outcrop.serve.vllm_library import open_vllm, wants_vllm

    threads = settings.serve_threads or default_threads()

    def open_own() -> BatchEngine:
        held = f"{weights_key} {settings.serve_weights}"
        rates = rate_file(settings.data_dir / "cache" / "rates", held, threads)
        return BatchEngine(
            folder,
            threads=threads,
            precision=settings.serve_weights,
            limits=Limits(
                units=settings.machine_model_units,
                max_waiting=settings.max_waiting_requests,
                burst_seconds=settings.throughput_burst_seconds,
            ),
            meter=RateMeter(rates, fixed=settings.machine_tokens_per_second),
        )

    if not wants_vllm(settings.serve_engine):
        return open_own()
    end_group_with_this_process()  # vLLM's processes outlive one that is killed
    rank = settings.vllm_max_rank
    first = VllmEngine(
        folder,
        lambda: open_vllm(folder, max_rank=rank, memory_percent=settings.vllm_memory_percent),
        max_rank=rank,
        max_waiting=settings.max_waiting_requests,
        # The supervisor starts another server for the next request.
        on_death=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    return RoutedEngine(first, open_own)


def default_threads() -> int:
    """Return the cores this process may use, up to `MAX_THREADS`."""
    if sys.platform == "linux":
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


def make_app(engine: Engine, weights_key: str, *, timeout_seconds: float) -> Starlette:
    """Return the ASGI application; closing it closes the engine.

    Args:
        timeout_seconds: for requests that bring no limit of their own.
    """
    started = time.monotonic()

    async def generate(request: Request) -> Response:
        wanted = _read(request_from_json, await request.body())
        if wanted.timeout_seconds is None:
            wanted = dataclasses.replace(wanted, timeout_seconds=timeout_seconds)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        number = await anyio.to_thread.run_sync(
            engine.submit,
            wanted,
            lambda event: _hand_over(loop, events, event),
        )
        return _EventResponse(events, lambda: engine.cancel(number))

    async def count(request: Request) -> Response:
        messages, tools = _read(messages_from_json, await request.body())
        number = await anyio.to_thread.run_sync(engine.count_tokens, messages, tools)
        return JSONResponse({"input_tokens": number})

    async def stats(request: Request) -> Response:
        return JSONResponse(
            {
                **dataclasses.asdict(engine.stats()),
                "weights": weights_key,
                "pid": os.getpid(),
                "uptime_seconds": time.monotonic() - started,
                "max_memory_bytes": _max_memory_bytes(),
            }
        )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    return Starlette(
        routes=[
            Route("/generate", generate, methods=["POST"]),
            Route("/count", count, methods=["POST"]),
            Route("/stats", stats),
        ],
        exception_handlers={ApiError: _answer_error},
        lifespan=lifespan,
    )


class _EventResponse(Response):
    """Sends events as lines as they come; a client that goes away cancels the request."""

    def __init__(self, events: asyncio.Queue[Event], cancel: Callable[[], None]) -> None:
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self._events, self._cancel = events, cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                await self._send(send)
                group.cancel_scope.cancel()
        finally:
            self._cancel()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        last = False
        while not last:
            event = await self._events.get()
            last = isinstance(event, Generation | ApiError)
            body = event_to_json(event)
            await send({"type": "http.response.body", "body": body, "more_body": not last})


class _Server(uvicorn.Server):
    """uvicorn's server that says when it has started."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(event_to_json(error), error.http_status, media_type="application/json")


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Give an event to the event loop, from the engine's thread."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)


def _read(read: Callable[[bytes], T], body: bytes) -> T:
    try:
        return read(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValidationException(f"The body is not what this path takes: {error!r}.") from error


def _end(number: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise SettingsError(
            f"{path} is too long for a socket: it may have {MAX_SOCKET_PATH} bytes."
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    return listener


def _max_memory_bytes() -> int:
    """The most memory the process ever held. Source: getrusage(2): KiB on Linux, bytes on macOS."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held
