"""How long a model server takes to be up, and to be back after it was killed under load.

    python -m benchmarks.model_restart [--rounds 5]

A start is from the process to its first figures over the socket, of the shipped model: with
nothing kept of it, and with its packed matrices on disk. Then a service answers streams, the model
server is killed, and the time to the end of the next short answer is taken. It is counted how many
streams ended with the modelled error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import boto3
from benchmarks.custom_models import BASE_MODEL, place_weights
from benchmarks.running import OUTCROP, Running, running_service, write_result
from benchmarks.serving_overhead import server_row
from benchmarks.training_work import CACHE

from outcrop.errors import ServingError
from outcrop.models.weights import SHIPPED_KEY
from outcrop.serve.client import ModelClient

START_SECONDS, RESTART_SECONDS = 3.0, 4.0
"""Targets."""
STREAMS = 8
LOOK_SECONDS = 0.002


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="restart-", dir=CACHE) as name:
        data_dir = Path(name) / "data"
        place_weights(data_dir)
        kept = data_dir / "cache" / "packed"
        start(data_dir)  # compiles the pass
        anew, again, back, errors = [], [], [], 0
        for _ in range(options.rounds):
            shutil.rmtree(kept)
            anew.append(start(data_dir))
            again.append(start(data_dir))
        with running_service(data_dir) as service:
            for _ in range(options.rounds):
                seconds, modelled = kill_under_load(service, data_dir)
                back.append(seconds)
                errors += modelled
    rows = [
        ("what", "median", "slowest", "wanted"),
        row("start, matrices packed", anew, ""),
        row("start, packed matrices read", again, f"under {START_SECONDS:g} s"),
        row("from the kill to the next answer", back, f"under {RESTART_SECONDS:g} s"),
    ]
    write_result(
        "model_restart",
        f"{options.rounds} of each. A start: from the process to its first figures over the "
        f"socket. After a kill: {STREAMS} streams were under way, of which {errors} of "
        f"{STREAMS * options.rounds} ended with modelStreamErrorException; boto3's client asks "
        "at once, and as it does by itself.",
        rows,
        "The files are in the system's cache of files; a disk that has to be read adds its time.",
    )


def row(what: str, seconds: list[float], wanted: str) -> tuple[str, ...]:
    """Return a row of the table."""
    return (what, f"{statistics.median(seconds):.2f} s", f"{max(seconds):.2f} s", wanted)


def start(data_dir: Path) -> float:
    """Return how long a model server takes to answer; it is ended once it has kept its matrices."""
    kept = data_dir / "cache" / "packed"
    with tempfile.TemporaryDirectory() as folder:
        socket = Path(folder) / "s.sock"
        started = time.perf_counter()
        command = (*OUTCROP, "model-server", "--weights", SHIPPED_KEY, "--socket", str(socket))
        process = subprocess.Popen(
            (*command, "--data-dir", str(data_dir)), stderr=subprocess.DEVNULL
        )
        try:
            while not asyncio.run(answers(socket)):
                if process.poll() is not None:
                    raise SystemExit("the model server did not start")
                time.sleep(LOOK_SECONDS)
            seconds = time.perf_counter() - started
            while not any(path.name[0] != "." for path in kept.glob("*")):
                time.sleep(LOOK_SECONDS)
        finally:
            process.terminate()
            process.wait()
    return seconds


async def answers(socket: Path) -> bool:
    """Return whether a model server answers at a socket."""
    try:
        return bool(await ModelClient(socket).stats())
    except ServingError:
        return False


def kill_under_load(service: Running, data_dir: Path) -> tuple[float, int]:
    """Return the seconds from the kill to the next answer, and how many streams were told."""
    runtime = boto3.client("bedrock-runtime", **service.credentials())
    ask(runtime)
    begun = threading.Barrier(STREAMS + 1)
    ends: list[str] = []

    def read() -> None:
        messages = [{"role": "user", "content": [{"text": "Tell a very long story."}]}]
        settings = {"maxTokens": 2000, "temperature": 1.0}
        answer = runtime.converse_stream(
            modelId=BASE_MODEL, messages=messages, inferenceConfig=settings
        )
        events = iter(answer["stream"])
        next(events)
        next(events)
        begun.wait()
        try:
            for _ in events:
                pass
            ends.append("")
        except Exception as error:
            ends.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    begun.wait()
    pid = server_row(data_dir).pid
    assert pid is not None
    started = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    ask(runtime)
    seconds = time.perf_counter() - started
    return seconds, sum("modelStreamErrorException" in end for end in ends)


def ask(runtime: Any) -> None:
    """Have a short answer."""
    body = {"inputText": "Hi", "textGenerationConfig": {"maxTokenCount": 2, "temperature": 0}}
    runtime.invoke_model(modelId=BASE_MODEL, body=json.dumps(body))["body"].read()


if __name__ == "__main__":
    main()
