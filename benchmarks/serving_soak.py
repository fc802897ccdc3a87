"""Many streaming clients at once, for minutes, through the real gateway, some of whom go away.

    python -m benchmarks.serving_soak [--seconds 600] [--clients 200]
    python -m benchmarks.serving_soak --seconds 60 --clients 50 --no-pictures

Starts a service of its own with some custom models. Each client asks one after the other, by
InvokeModelWithResponseStream or ConverseStream, the base or a custom model, with prompts and
lengths that a seed draws; one in ten goes away in the middle of its answer. A request that is
throttled is asked again after a pause. The memory of every process of the service is looked at all
the while. At the end nothing new is asked, and what is under way is ended by its client.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import httpx
from benchmarks import pictures
from benchmarks.adapter_files import write_adapters
from benchmarks.custom_models import (
    BASE_MODEL,
    allowed,
    buy,
    place_weights,
    processes,
    publish,
    resident_bytes,
)
from benchmarks.running import Running, percentile, running_service, write_result
from benchmarks.serving_work import NUM_ADAPTERS, TEXT
from benchmarks.training_work import CACHE, ROOT, shipped_weights
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.eventstream import EventStreamBuffer

SAMPLE_SECONDS = 2.0
CANCELLED_SHARE = 0.1
PROMPT_WORDS, ANSWER_TOKENS = (10, 120), (16, 64)
WARM_UP_SHARE = 0.2
"""Of the time, whose memory is not looked at for growth: caches are filled in it."""
PAUSE_FACTOR = (1.0, 1.5)
"""Of the time after which a throttled request is told to ask again."""
PARTS = ("model-server", "gateway", "worker", "weed", "serve")
"""Names of processes, by what their command lines hold; the first that fits."""
KINDS = ("answers", "gone away", "throttled", "errors", "under way at the end")


@dataclass
class Found:
    """What all clients found."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)
    """Seconds from a request to its first piece."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between the pieces of an answer."""
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Of each process (seconds since the start, MiB resident)."""
    tokens: int = 0


def main() -> None:
    """Run it and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pictures", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args()
    adapters = write_adapters(shipped_weights(None), CACHE / "adapters", NUM_ADAPTERS)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=CACHE) as name:
        data_dir = Path(name) / "data"
        place_weights(data_dir)
        with running_service(data_dir, allowed(NUM_ADAPTERS)) as service:
            bedrock = boto3.client("bedrock", **service.credentials())
            models = [BASE_MODEL, *buy(bedrock, publish(data_dir, adapters, NUM_ADAPTERS))]
            found = asyncio.run(soak(service, models, options))
    report(found, options)


async def soak(service: Running, models: Sequence[str], options: argparse.Namespace) -> Found:
    """Let the clients ask until the time is up, and return what they found."""
    found = Found()
    ends = time.perf_counter() + options.seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(
        base_url=service.url, timeout=httpx.Timeout(None), limits=limits, trust_env=False
    ) as http:
        watching = asyncio.create_task(watch(service, found))
        clients = [
            asyncio.create_task(
                ask_on(
                    http, service, models, random.Random(f"{options.seed} {number}"), ends, found
                )
            )
            for number in range(options.clients)
        ]
        await asyncio.sleep(max(0.0, ends - time.perf_counter()))
        for client in clients:
            client.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    for error in ended:
        if isinstance(error, Exception):
            raise error
        found.outcomes[KINDS[4]] += isinstance(error, asyncio.CancelledError)
    return found


async def ask_on(
    http: httpx.AsyncClient,
    service: Running,
    models: Sequence[str],
    chance: random.Random,
    ends: float,
    found: Found,
) -> None:
    """Ask one request after the other, as one client does."""
    while time.perf_counter() < ends:
        path, body = draw_request(models, chance)
        leaves_after = None
        if chance.random() < CANCELLED_SHARE:
            leaves_after = chance.randrange(1, ANSWER_TOKENS[0])
        while True:
            outcome, pause = await ask(http, signed(service, path, body), leaves_after, found)
            found.outcomes[outcome] += 1
            if outcome != KINDS[2]:
                break
            await asyncio.sleep(pause * chance.uniform(*PAUSE_FACTOR))


def draw_request(models: Sequence[str], chance: random.Random) -> tuple[str, bytes]:
    """Return the path and the body of a request."""
    text = " ".join(chance.choices(TEXT.split(), k=chance.randint(*PROMPT_WORDS)))
    model, most = quote(chance.choice(models), safe=""), chance.randint(*ANSWER_TOKENS)
    body: dict[str, Any]
    if chance.random() < 0.5:
        path = f"/model/{model}/invoke-with-response-stream"
        body = {"inputText": text, "textGenerationConfig": {"maxTokenCount": most}}
    else:
        path = f"/model/{model}/converse-stream"
        body = {
            "messages": [{"role": "user", "content": [{"text": text}]}],
            "inferenceConfig": {"maxTokens": most},
        }
    return path, json.dumps(body).encode()


def signed(service: Running, path: str, body: bytes) -> httpx.Request:
    """Return a signed request."""
    keys = service.credentials()
    request = AWSRequest(
        "POST", service.url + path, headers={"Content-Type": "application/json"}, data=body
    )
    credentials = Credentials(keys["aws_access_key_id"], keys["aws_secret_access_key"])
    SigV4Auth(credentials, "bedrock", keys["region_name"]).add_auth(request)
    return httpx.Request("POST", request.url, headers=dict(request.headers.items()), content=body)


async def ask(
    http: httpx.AsyncClient, request: httpx.Request, leaves_after: int | None, found: Found
) -> tuple[str, float]:
    """Ask once; times go into what was found.

    Returns:
        (kind, seconds): what came of it, and where it was throttled, how long to wait.
    """
    last = time.perf_counter()
    pieces = 0
    try:
        response = await http.send(request, stream=True)
    except httpx.TransportError as error:
        return failed(found, f"no answer: {type(error).__name__}")
    try:
        if response.status_code == 429:
            await response.aread()
            return KINDS[2], float(response.headers.get("retry-after", 1.0))
        if response.status_code != 200:
            await response.aread()
            return failed(found, f"{response.status_code}: {response.text[:120]}")
        events = EventStreamBuffer()
        ended = False
        async for chunk in response.aiter_bytes():
            events.add_data(chunk)
            for event in events:
                headers = event.headers
                if headers.get(":message-type") != "event":
                    kind = str(headers.get(":exception-type", "error"))
                    if kind == "throttlingException":
                        return KINDS[2], 1.0
                    return failed(found, f"in a stream: {kind}")
                ended = ended or is_last(headers[":event-type"], event.payload)
                if headers[":event-type"] in ("chunk", "contentBlockDelta"):
                    now = time.perf_counter()
                    (found.gaps if pieces else found.firsts).append(now - last)
                    last = now
                    pieces += 1
                    found.tokens += 1
                    if leaves_after is not None and pieces >= leaves_after:
                        return KINDS[1], 0.0
        return (KINDS[0], 0.0) if ended else failed(found, "a stream without its end")
    except httpx.TransportError as error:
        return failed(found, f"cut off after {pieces} pieces: {type(error).__name__}")
    finally:
        # Ends the connection where the answer is not at its end: the client goes away.
        await response.aclose()


def failed(found: Found, why: str) -> tuple[str, float]:
    """Note an error and return what came of its request."""
    found.errors[why] += 1
    return KINDS[3], 0.0


def is_last(kind: str, payload: bytes) -> bool:
    """Return whether a well-formed stream may end after an event."""
    if kind == "metadata":
        return True
    if kind != "chunk":
        return False
    return b"amazon-bedrock-invocationMetrics" in base64.b64decode(json.loads(payload)["bytes"])


async def watch(service: Running, found: Found) -> None:
    """Look at the memory of the service's processes, until it is cancelled."""
    started = time.perf_counter()
    while True:
        sums: Counter[str] = Counter()
        for pid, command in processes(service.pid).items():
            part = next((part for part in PARTS if part in command), "others")
            sums[part] += resident_bytes(pid)
        for part, held in sums.items():
            at = time.perf_counter() - started
            found.memory.setdefault(part, []).append((at, held / 2**20))
        await asyncio.sleep(SAMPLE_SECONDS)


def growth(curve: Sequence[tuple[float, float]], seconds: float) -> tuple[float, float, float]:
    """Return MiB after the warm-up, MiB at the end, and MiB a minute by a line through them."""
    late = [(at, held) for at, held in curve if at >= WARM_UP_SHARE * seconds]
    if len(late) < 2:
        return curve[-1][1], curve[-1][1], 0.0
    slope = statistics.linear_regression([at for at, _ in late], [held for _, held in late]).slope
    tenth = max(1, len(late) // 10)
    first = statistics.mean(held for _, held in late[:tenth])
    last = statistics.mean(held for _, held in late[-tenth:])
    return first, last, 60.0 * slope


def report(found: Found, options: argparse.Namespace) -> None:
    """Write the page, and the pictures beside it."""
    rows: list[tuple[str, ...]] = [("what", "found", "", "")]
    rows += [(kind, f"{found.outcomes[kind]}", "", "") for kind in KINDS]
    rows.append(("new tokens a second", f"{found.tokens / options.seconds:.0f}", "", ""))
    rows.append(("", "p50", "p99", "slowest"))
    for label, values in (
        ("time to the first token", found.firsts),
        ("time between tokens", found.gaps),
    ):
        cells = (statistics.median(values), percentile(values, 0.99), max(values))
        rows.append((label, *(f"{value:.3f} s" for value in cells)))
    rows.append(("memory, MiB", "after the first fifth", "at the end", "a minute"))
    for part in (part for part in (*PARTS, "others") if part in found.memory):
        first, last, slope = growth(found.memory[part], options.seconds)
        rows.append((part, f"{first:.0f}", f"{last:.0f}", f"{slope:+.2f}"))
    errors = "; ".join(f"{count} times {text}" for text, count in found.errors.most_common(5))
    write_result(
        "serving_soak",
        f"{options.clients} clients at the same time for {options.seconds:g} s, each one request "
        f"after the other, streamed through the gateway on loopback; base and {NUM_ADAPTERS} "
        f"custom models, each with a model unit of {NUM_ADAPTERS + 1}; prompts of "
        f"{PROMPT_WORDS[0]} to {PROMPT_WORDS[1]} words, answers of "
        f"{ANSWER_TOKENS[0]} to {ANSWER_TOKENS[1]} tokens, drawn with the families' default "
        f"temperatures; one in {1 / CANCELLED_SHARE:.0f} goes away in its answer; seed "
        f"{options.seed}. A tenth of the memory's samples each is averaged; the last column is the "
        "slope of a line through all of them.",
        rows,
        (f"Errors: {errors}. " if errors else "There were no errors. ")
        + "A piece of a stream is counted as a token; some hold two. Clients share the two cores "
        "with the service.",
    )
    if not options.no_pictures:
        draw(found)
    if found.outcomes[KINDS[3]]:
        raise SystemExit(f"{found.outcomes[KINDS[3]]} requests failed: {errors}")


def draw(found: Found) -> None:
    """Draw the memory of the processes, and how the times are spread."""
    memory = pictures.curves("memory resident, MiB", "seconds", found.memory)
    text = pictures.picture([memory], "Memory of each process of the service over the run")
    (ROOT / "docs" / "serving-memory.svg").write_text(text, encoding="utf-8")
    panels = [
        pictures.histogram(
            title,
            "seconds",
            [max(value, 1e-5) for value in values],
            {
                f"p50 {statistics.median(values):.3g} s": statistics.median(values),
                f"p99 {percentile(values, 0.99):.3g} s": percentile(values, 0.99),
            },
        )
        for title, values in (
            ("requests by time to the first token", found.firsts),
            ("tokens by time since the one before", found.gaps),
        )
    ]
    text = pictures.picture(panels, "Times to first tokens and between tokens, as histograms")
    (ROOT / "docs" / "serving-latency.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
