"""Records a second through a batch inference job, and the same requests through boto3 clients.

    python -m benchmarks.batch_inference

The same greedy requests, once by one client that asks one after the other, once by 32 at a time,
and once as a batch job. The model is loaded before; the answers are compared.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from benchmarks.running import Running, running_service, write_result
from botocore.config import Config

MODEL = "amazon.titan-text-express-v1"
ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
NUM_RECORDS = 384
NUM_ALONE = 24
"""Requests of the one client: more would only take longer."""
NUM_CLIENTS = 32
ANSWER_TOKENS = 24
POLL_SECONDS = 0.1
WORDS = ("granite", "basalt", "slate", "marble", "gneiss", "chalk", "flint", "schist")


def main() -> None:
    """Measure and write the result."""
    bodies = list(requests())
    with (
        tempfile.TemporaryDirectory(prefix="outcrop-batch-") as name,
        running_service(Path(name) / "data") as service,
    ):
        client = runtime(service)
        ask(client, bodies[0])  # loads the model
        started = time.perf_counter()
        alone = [ask(client, body) for body in bodies[:NUM_ALONE]]
        rates = [("one client", NUM_ALONE, time.perf_counter() - started)]

        started = time.perf_counter()
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            together = list(pool.map(lambda body: ask(client, body), bodies))
        seconds = time.perf_counter() - started
        rates.append((f"{NUM_CLIENTS} clients", NUM_RECORDS, seconds))

        answers, whole, inference = batch(service, bodies)
        rates.append(("batch job, from submission to its end", NUM_RECORDS, whole))
        rates.append(("batch job, its inference", NUM_RECORDS, inference))
    same = sum(one == other for one, other in zip(together, answers, strict=True))
    assert alone == together[:NUM_ALONE]
    rows = [("way", "records", "seconds", "records/s")]
    rows += [
        (way, str(count), f"{seconds:.1f}", f"{count / seconds:.2f}")
        for way, count, seconds in rates
    ]
    write_result(
        "batch_inference",
        f"Prompts of about 40 tokens, {ANSWER_TOKENS} tokens of answer at most, temperature 0, no "
        "other load. Clients are threads of one process with a boto3 client. Inference is from the "
        "first look that shows the job InProgress to the first that shows its end, looked at every "
        f"{POLL_SECONDS} s.",
        rows,
        f"{same} of {NUM_RECORDS} answers of the batch job are those that the {NUM_CLIENTS} "
        "clients got, byte for byte. Not measured: a batch job beside people's requests.",
    )


def requests() -> Iterator[dict[str, Any]]:
    """Yield bodies, all different."""
    for number in range(NUM_RECORDS):
        first, second = WORDS[number % 8], WORDS[number // 8 % 8]
        yield {
            "inputText": f"Case {number}: say in one sentence how {first} differs from {second}, "
            "and where a geologist would look for either of them.",
            "textGenerationConfig": {"temperature": 0, "maxTokenCount": ANSWER_TOKENS},
        }


def runtime(service: Running) -> Any:
    """Return a client that may hold as many connections as are asked at a time."""
    config = Config(max_pool_connections=NUM_CLIENTS, read_timeout=300)
    return boto3.client("bedrock-runtime", config=config, **service.credentials())


def ask(client: Any, body: dict[str, Any]) -> Any:
    """Return one answer."""
    return json.loads(client.invoke_model(modelId=MODEL, body=json.dumps(body))["body"].read())


def batch(service: Running, bodies: list[dict[str, Any]]) -> tuple[list[Any], float, float]:
    """Return a job's answers, its seconds, and those of its inference."""
    s3 = boto3.client("s3", **service.credentials())
    bedrock = boto3.client("bedrock", **service.credentials())
    s3.create_bucket(Bucket="batch")
    lines = "".join(json.dumps({"modelInput": body}) + "\n" for body in bodies)
    s3.put_object(Bucket="batch", Key="in.jsonl", Body=lines.encode())
    started = time.perf_counter()
    arn = bedrock.create_model_invocation_job(
        jobName="measured",
        roleArn=ROLE,
        modelId=MODEL,
        inputDataConfig={"s3InputDataConfig": {"s3Uri": "s3://batch/in.jsonl"}},
        outputDataConfig={"s3OutputDataConfig": {"s3Uri": "s3://batch/out"}},
    )["jobArn"]
    begun: float | None = None
    while True:
        status = bedrock.get_model_invocation_job(jobIdentifier=arn)["status"]
        now = time.perf_counter()
        if status == "InProgress" and begun is None:
            begun = now
        if status not in ("Submitted", "Validating", "Scheduled", "InProgress"):
            break
        time.sleep(POLL_SECONDS)
    assert status == "Completed", status
    key = f"out/{arn.rpartition('/')[2]}/in.jsonl.out"
    content = s3.get_object(Bucket="batch", Key=key)["Body"].read()
    answers = [json.loads(line)["modelOutput"] for line in content.splitlines()]
    return answers, now - started, now - (begun or started)


if __name__ == "__main__":
    main()
