"""How long lists of 100,000 jobs take, and whether 500 jobs created by 16 clients are all there.

One job is created as usual; its row is then copied, with times a minute apart and the states of a
service that has run for long. The worker is held still, so that the jobs that wait go on waiting.
Requests go one after the other over one kept connection and are signed beforehand, so what is
measured is the service, not boto3.

    python -m benchmarks.job_lists [--jobs 100000] [--created 500] [--clients 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit

import boto3
import sqlalchemy as sa
from benchmarks.get_job_latency import ROLE, Connection
from benchmarks.running import Running, percentile, running_service, write_result
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials

from outcrop.settings import Settings
from outcrop.store import tables
from outcrop.store.database import connect, transaction

BUCKET = "lists"
LIST = "/model-customization-jobs"
STATES = ("completed",) * 7 + ("failed", "stopped", "queued")
"""What one job in ten is."""
CHUNK = 5000
REPEATS = 100
RARE = 997
"""One job in so many has a name with `rare`."""


class Asked(NamedTuple):
    """One kind of request."""

    what: str
    query: dict[str, str]
    target: str


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs in the list")
    parser.add_argument("--created", type=int, default=500, help="jobs created at once")
    parser.add_argument("--clients", type=int, default=16, help="clients that create them")
    options = parser.parse_args()
    table = [("what", "p50", "p95", "slowest", "target")]
    with (
        tempfile.TemporaryDirectory(prefix="outcrop-lists-") as name,
        running_service(
            Path(name) / "data",
            {"OUTCROP_MAX_CUSTOM_MODELS": str(10 * (options.jobs + options.created))},
        ) as service,
        worker_held_still(service.pid),
    ):
        template = create(service, "template")
        middle = fill(Path(name) / "data", template, options.jobs)
        for asked in requests(middle):
            times = asyncio.run(measure(service, LIST, asked.query))
            table.append((asked.what, *summary(times), asked.target))
        times = asyncio.run(measure(service, f"{LIST}/job-{options.jobs // 2 + 1}", {}))
        table.append(("GetModelCustomizationJob of one of them, by name", *summary(times), ""))
        walked, times = asyncio.run(walk(service))
        assert walked == options.jobs + 1, f"{walked} jobs in all pages"
        table.append((f"all {len(times)} pages of 100, each", *summary(times), "50 ms"))
        seconds, notes = create_at_once(service, options.created, options.clients)
    table.append(
        (
            f"{options.created} jobs created by {options.clients} clients",
            f"{seconds:.1f} s",
            *("", "", "none lost or doubled, no 500"),
        )
    )
    write_result(
        "job_lists",
        f"{options.jobs:,} jobs in SQLite: of ten, seven completed, one failed, one stopped and "
        "one queued. ListModelCustomizationJobs, one request after the other over one connection; "
        f"{REPEATS} of each kind after ten that are not counted. A page has 100 jobs where nothing "
        "else is said. Times run from the first byte sent to the last one read.",
        table,
        notes,
    )


def requests(middle: str) -> Iterator[Asked]:
    """Return what is asked for; `middle` is an instant half way through the jobs."""
    yield Asked("first page", {}, "p50 20 ms")
    yield Asked("first page, oldest first", {"sortOrder": "Ascending"}, "50 ms")
    for status in ("InProgress", "Completed", "Failed", "Stopping", "Stopped"):
        yield Asked(f"statusEquals {status}", {"statusEquals": status}, "50 ms")
    for text, what in (("job", "all have"), ("rare", "one in 997 has"), ("nothing", "none has")):
        yield Asked(f"nameContains, which {what}", {"nameContains": text}, "50 ms")
    yield Asked(
        "nameContains, which none has, and InProgress",
        {"nameContains": "nothing", "statusEquals": "InProgress"},
        "50 ms",
    )
    yield Asked("creationTimeAfter half", {"creationTimeAfter": middle}, "50 ms")
    yield Asked(
        "creationTimeBefore half, Failed",
        {"creationTimeBefore": middle, "statusEquals": "Failed"},
        "50 ms",
    )
    yield Asked("first page of 1,000", {"maxResults": "1000"}, "50 ms")


@contextmanager
def worker_held_still(pid: int) -> Iterator[None]:
    """Stop the worker among a service's children, and let it go on at the end."""
    children = [
        child
        for task in Path(f"/proc/{pid}/task").glob("*/children")
        for child in task.read_text().split()
    ]
    (worker,) = (
        int(child)
        for child in children
        if b"\0worker\0" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGKILL)  # else it would begin with the jobs that wait


def create(service: Running, name: str) -> str:
    """Create the job that is copied; returns its id."""
    s3 = boto3.client("s3", **service.credentials())
    s3.create_bucket(Bucket=BUCKET)
    record = json.dumps({"prompt": "Part 1?", "completion": "Shelf 1"})
    s3.put_object(Bucket=BUCKET, Key="train.jsonl", Body=record.encode())
    bedrock = boto3.client("bedrock", **service.credentials())
    answer = bedrock.create_model_customization_job(**request(name))
    return str(answer["jobArn"]).rpartition("/")[2]


def request(name: str) -> dict[str, Any]:
    """Return a job's request, in the form of published examples."""
    return {
        "jobName": name,
        "customModelName": name,
        "roleArn": ROLE,
        "baseModelIdentifier": "amazon.titan-text-express-v1",
        "hyperParameters": {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"},
        "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
        "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/output"},
    }


def fill(data_dir: Path, template: str, num_jobs: int) -> str:
    """Copy a job so many times; returns an instant half way through, as a query has it."""
    engine = connect(Settings(data_dir=data_dir).effective_database_url)
    with engine.connect() as connection:
        job = dict(
            connection.execute(sa.select(tables.job).where(tables.job.c.id == template))
            .one()
            ._mapping
        )
        of_job = sa.select(tables.job_stage).where(tables.job_stage.c.job_id == template)
        stages = [dict(row._mapping) for row in connection.execute(of_job)]
    begin = job["created_at"] - timedelta(minutes=num_jobs)
    for first in range(0, num_jobs, CHUNK):
        numbers = range(first, min(first + CHUNK, num_jobs))
        rows = [_copy(job, number, begin + timedelta(minutes=number)) for number in numbers]
        with transaction(engine) as connection:
            connection.execute(sa.insert(tables.job), rows)
            connection.execute(
                sa.insert(tables.job_stage),
                [_stage(stage, row) for row in rows for stage in stages],
            )
    engine.dispose()
    return f"{begin + timedelta(minutes=num_jobs // 2):%Y-%m-%dT%H:%M:%SZ}"


def _copy(job: Mapping[str, Any], number: int, at: Any) -> dict[str, Any]:
    job_id = f"{number:012d}"
    status = STATES[number % len(STATES)]
    name = f"job-{'rare-' if number % RARE == 0 else ''}{number}"
    arn = str(job["arn"]).rpartition("/")[0] + f"/{job_id}"
    model = arn.replace(":model-customization-job/", ":custom-model/")
    metrics = {"trainingMetrics": {"trainingLoss": 1.5}, "validationMetrics": []}
    return {
        **job,
        "id": job_id,
        "arn": arn,
        "name": name,
        "model_name": name,
        "status": status,
        "number": number,
        "created_at": at,
        "last_modified_at": at + timedelta(seconds=30),
        "ended_at": None if status == "queued" else at + timedelta(seconds=30),
        "result": {"outputModelArn": model, **metrics} if status == "completed" else None,
        "failure_message": "Line 3 is no JSON." if status == "failed" else None,
    }


def _stage(stage: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    waits = job["status"] == "queued"
    return {
        **stage,
        "job_id": job["id"],
        "status": "NotStarted" if waits else "Completed",
        "created_at": None if waits else job["created_at"],
        "last_modified_at": None if waits else job["last_modified_at"],
    }


def signed(service: Running, path: str, query: Mapping[str, str]) -> bytes:
    """Return the bytes of a signed GET."""
    keys = service.credentials()
    credentials = Credentials(keys["aws_access_key_id"], keys["aws_secret_access_key"])
    url = service.url + path + (f"?{urlencode(query)}" if query else "")
    asked = AWSRequest("GET", url)
    SigV4Auth(credentials, "bedrock", keys["region_name"]).add_auth(asked)
    target = urlsplit(url)
    headers = "".join(f"{name}: {value}\r\n" for name, value in asked.headers.items())
    asked_for = target.path + (f"?{target.query}" if target.query else "")
    return f"GET {asked_for} HTTP/1.1\r\nHost: {target.netloc}\r\n{headers}\r\n".encode()


async def measure(service: Running, path: str, query: Mapping[str, str]) -> list[float]:
    """Return the seconds that each of `REPEATS` requests takes."""
    connection = await Connection.open(service.url)
    asked = signed(service, path, query)
    times = []
    for _ in range(REPEATS + 10):
        started = time.perf_counter()
        await connection.exchange(asked)
        times.append(time.perf_counter() - started)
    await connection.close()
    return times[10:]


async def walk(service: Running) -> tuple[int, list[float]]:
    """Ask for page after page to the end; returns how many jobs there were, and the seconds."""
    connection = await Connection.open(service.url)
    query: dict[str, str] = {"maxResults": "100"}
    seen: set[str] = set()
    times = []
    while True:
        asked = signed(service, LIST, query)
        started = time.perf_counter()
        answer = json.loads(await connection.exchange(asked))
        times.append(time.perf_counter() - started)
        seen |= {job["jobName"] for job in answer["modelCustomizationJobSummaries"]}
        if "nextToken" not in answer:
            await connection.close()
            return len(seen), times
        query["nextToken"] = answer["nextToken"]


def create_at_once(service: Running, num_jobs: int, num_clients: int) -> tuple[float, str]:
    """Create jobs by many clients, every tenth request twice with the same token, in any order.

    Returns the seconds it took, and what is to be said of it. Ends the program where a job was lost
    or made twice, or an answer was an error.
    """
    wanted = [f"created-{number}" for number in range(num_jobs)]
    sent = wanted + wanted[::10]
    random.Random(0).shuffle(sent)
    once = Config(retries={"total_max_attempts": 1})
    free: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for _ in range(num_clients):
        free.put(boto3.client("bedrock", config=once, **service.credentials()))

    def one(name: str) -> tuple[str, str]:
        client = free.get()
        token = f"token-{name}"
        answer = client.create_model_customization_job(**request(name), clientRequestToken=token)
        free.put(client)
        return name, str(answer["jobArn"])

    with ThreadPoolExecutor(num_clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(one, sent))  # an error of one is raised here
        seconds = time.perf_counter() - started
    arns = dict(answers)
    if any(arns[name] != arn for name, arn in answers) or len(set(arns.values())) != num_jobs:
        raise SystemExit("a repeated request was answered with another job")
    bedrock = boto3.client("bedrock", **service.credentials())
    pages = bedrock.get_paginator("list_model_customization_jobs")
    listed = [
        job["jobArn"]
        for page in pages.paginate(nameContains="created-", maxResults=1000)
        for job in page["modelCustomizationJobSummaries"]
    ]
    if sorted(listed) != sorted(arns.values()):
        raise SystemExit(f"{len(listed)} jobs are listed, and {num_jobs} were created")
    return seconds, (
        f"{len(sent)} requests created {num_jobs} jobs, {num_jobs / seconds:.0f} a second: every "
        "tenth was sent twice with its token, in any order, and was answered with the same job. "
        "Each creation asks the object store for the data and syncs the database to disk. The "
        "clients, boto3 in threads, share the machine with the service, so their own time is in "
        "the numbers."
    )


def summary(times: list[float]) -> tuple[str, str, str]:
    """Return median, 95th percentile and the slowest, in milliseconds."""
    return (
        f"{1000 * percentile(times, 0.5):.1f} ms",
        f"{1000 * percentile(times, 0.95):.1f} ms",
        f"{1000 * max(times):.1f} ms",
    )


if __name__ == "__main__":
    main()
