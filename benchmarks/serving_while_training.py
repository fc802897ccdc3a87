"""Answers while a job trains at full load: how soon they begin, and what training loses by them.

    python -m benchmarks.serving_while_training [--answers 20]

Starts a service of its own and a job on it that trains with all cores. Its speed is read from the
steps that GetJobMetrics tells: first with nobody asking, then while an answer of 32 tokens is asked
for every ten seconds, whether the one before has come or not, then with nobody asking again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from benchmarks.aws_operations import operation_records
from benchmarks.custom_models import BASE_MODEL, place_weights
from benchmarks.running import Running, percentile, running_service, write_result
from benchmarks.training_work import CACHE

from outcrop.wire.client import outcrop_client

ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
BUCKET = "serving-while-training"
NUM_RECORDS = 512
ANSWER_TOKENS = 32
EVERY_SECONDS = 10.0
STEPS_BEFORE = 4
"""Of a job, which are not counted: kernels are compiled and measured in them."""
TARGET_SECONDS, TARGET_SHARE = 2.0, 0.70


@dataclass(frozen=True)
class Answer:
    """One answer's times, in seconds."""

    first: float
    whole: float


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--alone", type=float, default=60.0, help="seconds of training alone")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="training-", dir=CACHE) as name:
        data_dir = Path(name) / "data"
        place_weights(data_dir)
        with running_service(data_dir) as service:
            runtime = boto3.client("bedrock-runtime", **service.credentials())
            ask(runtime)  # loads the model
            idle = [ask(runtime) for _ in range(options.answers)]
            job = start_job(service)
            metrics = outcrop_client(**service.credentials())
            before = speed_over(metrics, job, lambda: time.sleep(options.alone))
            answers: list[Answer] = []
            during = speed_over(
                metrics, job, lambda: answers.extend(ask_often(runtime, options.answers))
            )
            after = speed_over(metrics, job, lambda: time.sleep(options.alone))
    alone = statistics.mean((before, after))
    rows: list[tuple[str, ...]] = [("", "no job", "while a job trains", "wanted")]
    for label, share in (("median", 0.5), ("p95", 0.95), ("slowest", 1.0)):
        cells = [
            f"{percentile([one.first for one in found], share):.3f} s" for found in (idle, answers)
        ]
        wanted = f"under {TARGET_SECONDS:g} s" if label == "p95" else ""
        rows.append((f"time to the first token, {label}", *cells, wanted))
    cells = [f"{statistics.median(one.whole for one in found):.3f} s" for found in (idle, answers)]
    rows.append(("the whole answer, median", *cells, ""))
    kept = f"{100 * during / alone:.0f} %, {during:.0f} tokens a second"
    rows.append(("training's speed kept", "", kept, f"at least {100 * TARGET_SHARE:.0f} %"))
    write_result(
        "serving_while_training",
        f"{options.answers} answers of {ANSWER_TOKENS} tokens through boto3's "
        f"InvokeModelWithResponseStream, one every {EVERY_SECONDS:g} s, prompts of some 100 "
        "tokens that have no beginning in common, greedy, the model loaded. The job: an adapter "
        f"on {NUM_RECORDS} records, the service's default settings.",
        rows,
        f"Training alone did {before:.0f} tokens a second before and {after:.0f} after; the share "
        "is of their mean. Tokens and seconds are those of the steps that ended in each part.",
    )


def start_job(service: Running) -> str:
    """Start a job that trains for long, and return its ARN once it has done some steps."""
    s3 = boto3.client("s3", **service.credentials())
    bedrock = boto3.client("bedrock", **service.credentials())
    fitting = [record for record in operation_records() if 60 <= len(record["prompt"]) <= 1300]
    lines = "\n".join(json.dumps(record) for record in fitting[:NUM_RECORDS])
    s3.create_bucket(Bucket=BUCKET)
    s3.put_object(Bucket=BUCKET, Key="train.jsonl", Body=lines.encode())
    arn: str = bedrock.create_model_customization_job(
        jobName=BUCKET,
        customModelName=BUCKET,
        roleArn=ROLE,
        baseModelIdentifier=BASE_MODEL,
        hyperParameters={"epochCount": "10", "batchSize": "8"},
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/output"},
    )["jobArn"]
    metrics = outcrop_client(**service.credentials())
    deadline = time.monotonic() + 300
    while len(steps_since(metrics, arn, 0)) < STEPS_BEFORE:
        job = bedrock.get_model_customization_job(jobIdentifier=arn)
        if job["status"] != "InProgress" or time.monotonic() > deadline:
            raise SystemExit(f"the job is {job['status']}: {job.get('failureMessage')}")
        time.sleep(0.5)
    return arn


def speed_over(metrics: Any, job: str, do: Callable[[], object]) -> float:
    """Return the tokens a second of the steps that ended while something was done."""
    first = last_step(metrics, job)
    do()
    steps = steps_since(metrics, job, first + 1)
    if not steps:
        raise SystemExit("no step ended in the time: ask for more answers, or for more seconds")
    tokens, seconds = (sum(float(step[name]) for step in steps) for name in ("tokens", "seconds"))
    return tokens / seconds


def last_step(metrics: Any, job: str) -> int:
    """Return the number of the last step that has ended."""
    return int(steps_since(metrics, job, 0)[-1]["step"])


def steps_since(metrics: Any, job: str, step: int) -> list[dict[str, Any]]:
    """Return a job's steps from a number on."""
    found: list[dict[str, Any]] = []
    more: dict[str, str] = {}
    while True:
        page = metrics.get_job_metrics(jobIdentifier=job, sinceStep=step, **more)
        found += page["steps"]
        if "nextToken" not in page:
            return found
        more = {"nextToken": page["nextToken"]}


def ask_often(runtime: Any, count: int) -> Sequence[Answer]:
    """Ask every ten seconds, each in a thread of its own, and return the answers."""
    answers: list[Answer] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(runtime)), daemon=True)
        for _ in range(count)
    ]
    started = time.perf_counter()
    for number, thread in enumerate(threads):
        time.sleep(max(0.0, started + number * EVERY_SECONDS - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(max(0.0, started + count * EVERY_SECONDS - time.perf_counter()))
    if len(answers) != count:
        raise SystemExit(f"{count - len(answers)} of {count} requests failed")
    return answers


_NUMBERS = iter(range(1_000_000))


def ask(runtime: Any) -> Answer:
    """Return how long an answer took to begin and to end."""
    number = next(_NUMBERS)
    # The number comes first, so that no prompt takes over what another had computed.
    text = f"{number} rocks lie here. " + "Name a rock, say where it is found, and why. " * 8
    settings = {"temperature": 0, "maxTokenCount": ANSWER_TOKENS}
    body = json.dumps({"inputText": text, "textGenerationConfig": settings})
    started = time.perf_counter()
    stream = runtime.invoke_model_with_response_stream(modelId=BASE_MODEL, body=body)["body"]
    first = 0.0
    for _ in stream:
        first = first or time.perf_counter() - started
    return Answer(first, time.perf_counter() - started)


if __name__ == "__main__":
    main()
