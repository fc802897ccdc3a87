"""What a request costs beside the model: gateway, protocol and model server's socket.

    python -m benchmarks.serving_overhead [--requests 200]

The same request is answered with the same few tokens by each way in turn: by an engine in this
very process, rendering included, which is the engine's own time; over a model server's socket; and
by a service's gateway, as bytes over a kept connection, and through boto3. The differences of the
medians are what the ways cost; those of the fastest tenth say it with less of what else the machine
did. Only one request is under way at any time, so nothing waits for another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
from benchmarks.custom_models import BASE_MODEL, place_weights
from benchmarks.get_job_latency import Connection
from benchmarks.running import Running, percentile, running_service, write_result
from benchmarks.training_work import CACHE, shipped_weights
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from outcrop.data.records import Message
from outcrop.models.weights import SHIPPED_KEY
from outcrop.serve.client import ModelClient
from outcrop.serve.engine import BatchEngine
from outcrop.serve.request import Generation, GenerationRequest, SamplingParams
from outcrop.serve.server import default_threads
from outcrop.settings import Settings
from outcrop.store import servers
from outcrop.store.database import connect
from outcrop.store.rows import ModelServer

PROMPT = "Name three rocks."
ANSWER_TOKENS = 4
WARM_UP = 10
TARGET_MILLISECONDS = 3.0
ENGINE = "engine alone"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="overhead-", dir=CACHE) as name:
        data_dir = Path(name) / "data"
        place_weights(data_dir)
        with running_service(data_dir) as service:
            seconds = asyncio.run(measure(service, data_dir, options.requests))
    own = percentile(seconds[ENGINE], 0.5)
    fastest = percentile(seconds[ENGINE], 0.1)
    heads = ("way", "p50", "p95", "p10", "p50 over the engine's", "p10 over the engine's", "wanted")
    rows: list[tuple[str, ...]] = [heads]
    for way, values in seconds.items():
        p50, p95, p10 = (percentile(values, share) for share in (0.5, 0.95, 0.1))
        over = ("", "") if way == ENGINE else (_ms(p50 - own), _ms(p10 - fastest))
        wanted = f"under {TARGET_MILLISECONDS:g} ms" if "gateway" in way else ""
        rows.append((way, _ms(p50), _ms(p95), _ms(p10), *over, wanted))
    write_result(
        "serving_overhead",
        f"{options.requests} requests by each way, in turn, each with the same prompt of a few "
        f"words and {ANSWER_TOKENS} tokens of answer, greedy, the model loaded; {WARM_UP} of each "
        "before are not counted.",
        rows,
        "Client, gateway and model server share the machine, so the client's own time is in the "
        "numbers: boto3's is most of what it adds over bytes on a kept connection, whose request "
        "was signed before.",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


async def measure(service: Running, data_dir: Path, count: int) -> dict[str, list[float]]:
    """Return the seconds of each way."""
    runtime = boto3.client("bedrock-runtime", **service.credentials())
    settings = {"temperature": 0, "maxTokenCount": ANSWER_TOKENS}
    body = json.dumps({"inputText": PROMPT, "textGenerationConfig": settings})
    conversation: dict[str, Any] = {
        "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
        "inferenceConfig": {"temperature": 0, "maxTokens": ANSWER_TOKENS},
    }
    runtime.invoke_model(modelId=BASE_MODEL, body=body)  # has the model server started
    engine = BatchEngine(shipped_weights(None), threads=default_threads())
    client = ModelClient(Path(server_row(data_dir).address or ""), keeps=1)
    request = GenerationRequest(
        (Message("user", PROMPT),), SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    )
    connection = await Connection.open(service.url)
    invoke = signed(service, f"/model/{quote(BASE_MODEL, safe='')}/invoke", body)
    converse = signed(
        service, f"/model/{quote(BASE_MODEL, safe='')}/converse", json.dumps(conversation)
    )

    async def in_process() -> None:
        done = threading.Event()
        engine.submit(request, lambda event: done.set() if isinstance(event, Generation) else None)
        done.wait()

    async def by_boto3_invoke() -> None:
        runtime.invoke_model(modelId=BASE_MODEL, body=body)["body"].read()

    async def by_boto3_converse() -> None:
        runtime.converse(modelId=BASE_MODEL, **conversation)

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        ENGINE: in_process,
        "model server's socket": lambda: client.generate(request),
        "gateway, InvokeModel, bytes": lambda: connection.exchange(invoke),
        "gateway, Converse, bytes": lambda: connection.exchange(converse),
        "gateway, InvokeModel, boto3": by_boto3_invoke,
        "gateway, Converse, boto3": by_boto3_converse,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(WARM_UP + count):
        for way, go in ways.items():
            started = time.perf_counter()
            await go()
            if number >= WARM_UP:
                seconds[way].append(time.perf_counter() - started)
    await connection.close()
    client.close()
    engine.close()
    return seconds


def server_row(data_dir: Path) -> ModelServer:
    """Return the row of the shipped model's server, which runs."""
    database = connect(Settings(data_dir=data_dir).effective_database_url)
    try:
        with database.connect() as connection:
            row = servers.get(connection, SHIPPED_KEY)
    finally:
        database.dispose()
    if row is None or row.address is None:
        raise SystemExit("the model server does not run")
    return row


def signed(service: Running, path: str, body: str) -> bytes:
    """Return the bytes of a signed POST."""
    keys = service.credentials()
    credentials = Credentials(keys["aws_access_key_id"], keys["aws_secret_access_key"])
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = AWSRequest("POST", service.url + path, headers=headers, data=body.encode())
    SigV4Auth(credentials, "bedrock", keys["region_name"]).add_auth(request)
    target = urlsplit(service.url)
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    size = f"Content-Length: {len(body.encode())}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: {target.netloc}\r\n{lines}{size}\r\n{body}".encode()


if __name__ == "__main__":
    main()
