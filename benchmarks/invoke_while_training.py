"""How long a small invocation takes while a job trains at full load, and while none does.

    python -m benchmarks.invoke_while_training

A training process is nice, and its threads sleep while they wait, so that whoever asks a model
meanwhile gets an answer. One request after the other, greedy, of 8 tokens.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
from benchmarks.get_job_latency import make_job
from benchmarks.running import percentile, running_service, write_result

BASE_MODEL = "amazon.titan-text-express-v1"
NUM_REQUESTS = 20
ANSWER_TOKENS = 8


def main() -> None:
    """Measure and write the result."""
    with (
        tempfile.TemporaryDirectory(prefix="outcrop-invoke-") as name,
        running_service(Path(name) / "data") as service,
    ):
        runtime = boto3.client("bedrock-runtime", **service.credentials())
        ask(runtime)  # loads the model
        idle = [ask(runtime) for _ in range(NUM_REQUESTS)]
        make_job(service, keep_running=True)
        training = [ask(runtime) for _ in range(NUM_REQUESTS)]
    rows = [("what", "no job", "while a job trains")]
    for label, share in (("median", 0.5), ("slowest", 1.0)):
        found = [f"{percentile(seconds, share):.2f} s" for seconds in (idle, training)]
        rows.append((label, found[0], found[1]))
    write_result(
        "invoke_while_training",
        f"{NUM_REQUESTS} requests one after the other through boto3, a prompt of a few words, "
        f"{ANSWER_TOKENS} tokens of answer, temperature 0; the model is loaded.",
        rows,
        "One job with two threads; in the first seconds of its training stage it loads the model.",
    )


def ask(runtime: Any) -> float:
    """Return how many seconds an answer took."""
    settings = {"temperature": 0, "maxTokenCount": ANSWER_TOKENS}
    body = {"inputText": "Name three rocks.", "textGenerationConfig": settings}
    started = time.perf_counter()
    runtime.invoke_model(modelId=BASE_MODEL, body=json.dumps(body))["body"].read()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
