"""`/metrics`: figures of the model servers and the jobs, in Prometheus' text form.

The gateway asks every model server that is ready, at the same time; one that does not answer soon
is told as not up. No figure has text of a prompt or an answer. On loopback anyone may read them;
elsewhere an API key is needed.

Source: Prometheus documentation, "Exposition formats" and "Metric and label naming".
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response

from outcrop.api.context import Services
from outcrop.api.log_spool import spool_folder
from outcrop.errors import AccessDeniedException, ApiError, ServingError
from outcrop.identity.api_keys import authenticate_api_key, bearer_key
from outcrop.serve.client import ModelClient
from outcrop.store import jobs, servers
from outcrop.store.delivery import total_counts
from outcrop.store.spool import folder_bytes

PATH = "/metrics"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWER_SECONDS = 2.0
"""How long a model server may take to tell its figures."""

GAUGE, COUNTER = "gauge", "counter"
SERVER_FIGURES = {
    "outcrop_requests_running": (GAUGE, "num_active", "Requests that are being answered."),
    "outcrop_requests_waiting": (GAUGE, "num_waiting", "Requests that wait for room."),
    "outcrop_requests_total": (COUNTER, "num_requests", "Requests that ended in any way."),
    "outcrop_prompt_tokens_total": (COUNTER, "input_tokens", "Tokens of their prompts."),
    "outcrop_generation_tokens_total": (COUNTER, "output_tokens", "Tokens of their answers."),
    "outcrop_shared_prefix_tokens_total": (
        *(COUNTER, "prefix_tokens"),
        "Tokens of prompts that were not computed, because another request had them.",
    ),
    "outcrop_preemptions_total": (
        *(COUNTER, "num_preempted"),
        "How often a request gave its pages back to an older one.",
    ),
    "outcrop_passes_total": (COUNTER, "num_passes", "Passes over the model."),
    "outcrop_base_bytes": (GAUGE, "base_bytes", "Memory of the base's matrices."),
    "outcrop_own_models": (
        *(GAUGE, "num_own"),
        "Custom models in memory that have weights of their own.",
    ),
    "outcrop_own_model_bytes": (GAUGE, "own_bytes", "Memory of those."),
    "outcrop_adapters": (GAUGE, "num_adapters", "Adapters in memory."),
    "outcrop_adapter_bytes": (GAUGE, "adapter_bytes", "Memory of those."),
    "outcrop_adapter_loads_total": (
        *(COUNTER, "num_adapter_loads"),
        "How often an artifact of a custom model was read.",
    ),
    "outcrop_pages": (GAUGE, "num_pages", "Pages for keys and values."),
    "outcrop_pages_free": (GAUGE, "num_pages_free", "Pages that hold nothing of use."),
    "outcrop_pages_kept": (
        *(GAUGE, "num_pages_kept"),
        "Pages of ended requests that another can take over.",
    ),
    "outcrop_full_batch_tokens_per_second": (
        *(GAUGE, "full_batch_tokens_per_second"),
        "Rate of answers that model units are parts of: set, measured, or 100 until then.",
    ),
    "outcrop_page_bytes": (
        *(GAUGE, "page_bytes"),
        "Memory of the pages that hold something of use.",
    ),
    "outcrop_model_server_memory_bytes": (
        *(GAUGE, "max_memory_bytes"),
        "The most memory that the process ever had resident.",
    ),
    "outcrop_model_server_uptime_seconds": (GAUGE, "uptime_seconds", "Since it was started."),
}
"""Name -> (kind, its name in a model server's own figures, what it is)."""
CLASS_FIGURES = {
    "outcrop_class_requests_running": (GAUGE, "num_active", "Requests being answered, by class."),
    "outcrop_class_requests_waiting": (GAUGE, "num_waiting", "Requests that wait, by class."),
    "outcrop_class_throttled_total": (
        *(COUNTER, "num_throttled"),
        "Requests that were refused because too much was asked, by class.",
    ),
    "outcrop_class_tokens_total": (
        *(COUNTER, "served_tokens"),
        "Tokens computed, of prompts and answers, by class.",
    ),
}
"""The same for the classes: provisioned, on demand and batch. Not for accounts or models: there may
be any number of them, each would be a series for ever, and whoever reads this page is not asked who
he is."""
RESERVATION = (
    *("outcrop_reservation_used", GAUGE),
    "Part of what a provisioned throughput may have ahead of its rate that is used: from 1 on it "
    "is throttled.",
)
"""Has the throughput's id as a label: there are no more of them than model units."""
SERVER_HISTOGRAMS = {
    "outcrop_time_to_first_token_seconds": (
        "first_token_seconds",
        "From a request's arrival at the model server to its first token.",
    ),
    "outcrop_time_per_output_token_seconds": (
        "token_seconds",
        "From one token of an answer to the next.",
    ),
    "outcrop_pass_tokens": ("pass_tokens", "Tokens that a pass computed."),
}
UP = ("outcrop_model_server_up", GAUGE, "1 where a ready model server answers, else 0.")
DELIVERIES = (
    *("outcrop_deliveries_total", COUNTER),
    "Records of invocation logging, and events, by what came of them.",
)
SPOOL = (
    *("outcrop_invocation_log_spool_bytes", GAUGE),
    "Records of invocation logging that wait in the data directory for the object store.",
)
JOBS = ("outcrop_jobs", GAUGE, "Customization jobs, by the state of their row.")


async def metrics_page(request: Request, services: Services) -> Response:
    """Answer GET /metrics."""
    if request.method not in ("GET", "HEAD"):
        return _plain("Use GET.\n", 405)
    if not await anyio.to_thread.run_sync(_may_read, request, services):
        return _plain(
            "This page needs an API key: send `Authorization: Bearer KEY` (`outcrop env "
            "--bearer` prints one).\n",
            401,
        )
    ready, states, deliveries = await anyio.to_thread.run_sync(_look, services)
    figures: dict[str, dict[str, Any] | None] = dict.fromkeys(ready)

    async def ask(weights: str, socket: Path) -> None:
        with anyio.move_on_after(ANSWER_SECONDS):
            try:
                figures[weights] = await ModelClient(socket).stats()
            except (ServingError, ApiError):  # it ends, or is being started
                return

    async with anyio.create_task_group() as group:
        for weights, socket in ready.items():
            group.start_soon(ask, weights, socket)
    waiting = await anyio.to_thread.run_sync(folder_bytes, spool_folder(services.settings))
    text = "\n".join([*_lines(figures, states), *_delivery_lines(deliveries, waiting), ""])
    return Response(text, media_type=CONTENT_TYPE)


def _may_read(request: Request, services: Services) -> bool:
    host = request.client.host if request.client else ""
    try:
        if ipaddress.ip_address(host).is_loopback:
            return True
    except ValueError:  # no address, such as a socket's path
        pass
    key = bearer_key(request.headers.get("authorization", ""))
    if key is None:
        return False
    with services.engine.connect() as connection:
        try:
            return authenticate_api_key(connection, key) is not None
        except AccessDeniedException:
            return False


def _look(
    services: Services,
) -> tuple[dict[str, Path], Mapping[str, int], Mapping[tuple[str, str], int]]:
    with services.engine.connect() as connection:
        rows = servers.list_servers(connection)
        states = jobs.count_by_status(connection)
        deliveries = total_counts(connection)
    ready = {row.key: Path(row.address) for row in rows if row.state == "ready" and row.address}
    return ready, states, deliveries


def _lines(
    figures: Mapping[str, dict[str, Any] | None], states: Mapping[str, int]
) -> Iterator[str]:
    yield from _head(*UP)
    for weights, found in figures.items():
        yield f"{UP[0]}{_labels(weights=weights)} {int(found is not None)}"
    answered = {weights: found for weights, found in figures.items() if found is not None}
    for name, (kind, own_name, help_text) in SERVER_FIGURES.items():
        yield from _head(name, kind, help_text)
        for weights, found in answered.items():
            yield f"{name}{_labels(weights=weights)} {found[own_name]}"
    for name, (kind, own_name, help_text) in CLASS_FIGURES.items():
        yield from _head(name, kind, help_text)
        for weights, found in answered.items():
            for which, counts in found["classes"].items():
                yield f"{name}{_labels(weights=weights, **{'class': which})} {counts[own_name]}"
    yield from _head(*RESERVATION)
    for weights, found in answered.items():
        for throughput, used in found["reservations"].items():
            yield f"{RESERVATION[0]}{_labels(weights=weights, throughput=throughput)} {used:.4g}"
    for name, (own_name, help_text) in SERVER_HISTOGRAMS.items():
        yield from _head(name, "histogram", help_text)
        for weights, found in answered.items():
            yield from _histogram(name, weights, found[own_name])
    yield from _head(*JOBS)
    for status, count in sorted(states.items()):
        yield f"{JOBS[0]}{_labels(status=status)} {count}"


def _delivery_lines(deliveries: Mapping[tuple[str, str], int], waiting: int) -> Iterator[str]:
    kinds: Counter[tuple[str, str]] = Counter()
    for (channel, outcome), number in deliveries.items():
        # Of a webhook only that it is one: its URL is nobody's business who reads this page.
        kinds[channel.partition(":")[0], outcome] += number
    yield from _head(*DELIVERIES)
    for (channel, outcome), number in sorted(kinds.items()):
        yield f"{DELIVERIES[0]}{_labels(channel=channel, outcome=outcome)} {number}"
    yield from _head(*SPOOL)
    yield f"{SPOOL[0]} {waiting}"


def _histogram(name: str, weights: str, found: Mapping[str, Any]) -> Iterator[str]:
    below = 0
    bounds = [*map(str, found["bounds"]), "+Inf"]
    for bound, count in zip(bounds, found["counts"], strict=True):
        below += count
        yield f"{name}_bucket{_labels(weights=weights, le=bound)} {below}"
    yield f"{name}_sum{_labels(weights=weights)} {found['total']}"
    yield f"{name}_count{_labels(weights=weights)} {below}"


def _head(name: str, kind: str, help_text: str) -> tuple[str, str]:
    return f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"


def _labels(**values: str) -> str:
    shown = []
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        shown.append(f'{name}="{escaped}"')
    return "{" + ",".join(shown) + "}"


def _plain(text: str, status: int) -> Response:
    return Response(text, status, media_type="text/plain")
