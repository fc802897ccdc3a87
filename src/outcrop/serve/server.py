"""The model server: one engine behind a unix socket that only its owner can reach.

What crosses the socket is told in `connections.py`; `GET /stats` is there too, for the owner: `curl
--unix-socket`. Tokens are drawn in the engine's thread, which also sends them; the event loop takes
requests, so it answers while the model computes. Knows no accounts and no body formats.
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from outcrop.errors import SettingsError
from outcrop.models.weights import ensure_weights
from outcrop.processes.group import end_group_with_this_process
from outcrop.serve.connections import SHORT_BYTES, Connections
from outcrop.serve.kept import KeptMatrices, key_of
from outcrop.settings import Settings

if TYPE_CHECKING:
    from outcrop.serve.interface import Engine

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
    signal.signal(signal.SIGTERM, _end)  # while loading, just end
    listener = _listen(Path(socket_path))
    try:
        folder = ensure_weights(settings, weights_key)
        keep_libraries_in(kernel_folder(settings))
        kept = kept_matrices(folder, weights_key, settings)
        kept.start_reading()  # while the rest is loaded
        engine = open_engine(folder, weights_key, settings, kept)

        def on_ready() -> None:
            logger.info("%s loaded in %.1f s", weights_key, time.perf_counter() - started)
            ready()

        asyncio.run(_serve(engine, listener, weights_key, settings, on_ready))
    finally:
        listener.close()
        Path(socket_path).unlink(missing_ok=True)


async def _serve(
    engine: Engine,
    listener: socket.socket,
    weights_key: str,
    settings: Settings,
    on_ready: Callable[[], None],
) -> None:
    """Answer requests until SIGTERM or SIGINT, then close the engine."""
    started = time.monotonic()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked.set)

    def stats() -> dict[str, Any]:
        return {
            **dataclasses.asdict(engine.stats()),
            "weights": weights_key,
            "pid": os.getpid(),
            "uptime_seconds": time.monotonic() - started,
            "max_memory_bytes": _max_memory_bytes(),
        }

    connections = Connections(
        *(engine, listener, stats),
        timeout_seconds=settings.invoke_timeout_seconds,
        short_bytes=SHORT_BYTES if _is_own(engine) else 0,
    )
    on_ready()
    await asked.wait()
    await connections.end(STOP_SECONDS)
    await asyncio.to_thread(engine.close)


def _is_own(engine: Engine) -> bool:
    from outcrop.serve.engine import BatchEngine

    return isinstance(engine, BatchEngine)


def kept_matrices(folder: Path, weights_key: str, settings: Settings) -> KeptMatrices:
    """Return where the matrices of a folder's model are kept, packed."""
    name = f"{weights_key}-{settings.serve_weights}"
    key = key_of(folder, settings.serve_weights)
    return KeptMatrices(settings.data_dir / "cache" / "packed" / name, key)


def open_engine(
    folder: Path, weights_key: str, settings: Settings, kept: KeptMatrices | None = None
) -> Engine:
    """Start what the settings have answer for the model of a folder.

    Args:
        weights_key: under which its measured rate is kept.
        kept: where its packed matrices are kept.
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
            kept=kept,
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
