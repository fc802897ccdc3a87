"""Kill -9 of attempts, workers and the whole service at random moments of real jobs.

`python -m benchmarks.kill_matrix --through service` runs this. One job runs through undisturbed;
then each further job has the same records and settings, and one process of the service is killed at
a seeded random moment of it. What was killed is started again by whoever has to: attempts by the
worker, workers by `outcrop serve`, `outcrop serve` by this script.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.running import write_result
from tests.e2e.service import TITAN, Service, new_bucket

from outcrop.models.artifact import folder_digest

TARGETS = ("attempt", "worker", "service")
COMMANDS = {"attempt": "outcrop.jobs.attempt", "worker": "outcrop worker"}
HYPER_PARAMETERS = {"epochCount": "4", "batchSize": "8", "learningRate": "0.00001"}
CSV_FILES = (
    "training_artifacts/step_wise_training_metrics.csv",
    "validation_artifacts/validation_metrics.csv",
)
BUCKET = "kills"
JOB_SECONDS = 900.0
LATE_SHARE = 0.15
"""Every third kill comes in this last part of a job, where it is published."""


@dataclass(frozen=True)
class Killed:
    """One job and what was done to it."""

    target: str
    stage: str
    """What the job said it was in, just before."""
    attempts: int
    same: bool


def kill_jobs(options: argparse.Namespace) -> None:
    """Run the jobs and write the table."""
    chance = random.Random(options.seed)
    (options.work / "data").mkdir(parents=True)
    service = Service(options.work / "data", OUTCROP_JOB_SLOTS="1", OUTCROP_CHECKPOINT_SECONDS="1")
    service.start()
    try:
        new_bucket(service, BUCKET)
        create(service, "warm")  # what a first job does once is not in the others' time
        started = time.monotonic()
        whole = create(service, "whole")
        seconds = time.monotonic() - started
        wanted = published(service, whole)
        print(f"undisturbed: {seconds:.1f} s, {wanted}", flush=True)
        killed = []
        for number in range(options.runs):
            share = chance.random()
            if number % 3 == 2:
                share = 1.0 - LATE_SHARE * share
            target = TARGETS[number // 3 % 3] if options.runs >= 9 else TARGETS[number % 3]
            found = disturb(service, f"job-{number}", target, share * seconds, wanted)
            print(f"job {number}: {found}", flush=True)
            killed.append(found)
    finally:
        if service.running:
            service.stop()
    report(options, killed, seconds)


def create(service: Service, name: str) -> str:
    """Run a job to its end and return its ARN."""
    arn = service.create_job(
        BUCKET, name, baseModelIdentifier=TITAN, hyperParameters=HYPER_PARAMETERS
    )
    job = service.wait_for_job(arn, JOB_SECONDS)
    if job["status"] != "Completed":
        raise SystemExit(f"{name} is {job['status']}: {job.get('failureMessage')}")
    return arn


def disturb(
    service: Service, name: str, target: str, seconds: float, wanted: dict[str, str]
) -> Killed:
    """Run a job, kill one process after so many seconds, and compare what comes of it."""
    arn = service.create_job(
        BUCKET, name, baseModelIdentifier=TITAN, hyperParameters=HYPER_PARAMETERS
    )
    time.sleep(seconds)
    stage = stage_of(service.job(arn))
    if target == "service":
        service.kill()
        service.start()
    else:
        for process in service.processes(COMMANDS[target])[:1]:
            os.kill(process.pid, signal.SIGKILL)
    job = service.wait_for_job(arn, JOB_SECONDS)
    if job["status"] != "Completed":
        raise SystemExit(f"{name} is {job['status']}: {job.get('failureMessage')}")
    attempts = service.progress(arn)["attempt"]
    return Killed(target, stage, attempts, published(service, arn) == wanted)


def stage_of(job: dict[str, Any]) -> str:
    """Return the stage that a job is in, or how it ended."""
    if job["status"] != "InProgress":
        return "ended before"
    for name, details in job["statusDetails"].items():
        if details["status"] == "InProgress":
            return str(name.removesuffix("Details"))
    return "queued or between stages"


def published(service: Service, arn: str) -> dict[str, str]:
    """Return the digests of a job's model and of its CSV files; there must be one model only."""
    model = service.job(arn)["outputModelArn"].rpartition("/")[2]
    job_id = arn.rpartition("/")[2]
    places = list((service.data_dir / "models" / "custom" / model).iterdir())
    if len(places) != 1:
        raise SystemExit(f"{len(places)} folders hold the model of {arn}")
    s3 = service.client("s3")
    found = {"artifact": folder_digest(places[0])}
    for listed in s3.list_objects_v2(Bucket=BUCKET, Prefix="out/")["Contents"]:
        for name in CSV_FILES:
            if job_id in listed["Key"] and listed["Key"].endswith(name):
                body = s3.get_object(Bucket=BUCKET, Key=listed["Key"])["Body"].read()
                found[name.rpartition("/")[2]] = hashlib.sha256(body).hexdigest()
    return found


def report(options: argparse.Namespace, killed: Sequence[Killed], seconds: float) -> None:
    """Write the table: for each process and stage, how often, and with what result."""
    rows: list[tuple[str, ...]] = [
        ("killed", "while the job was in", "kills", "most attempts", "ended in the same bytes")
    ]
    for target in TARGETS:
        for stage in sorted({one.stage for one in killed if one.target == target}):
            hit = [one for one in killed if (one.target, one.stage) == (target, stage)]
            same = sum(one.same for one in hit)
            attempts = max(one.attempts for one in hit)
            rows.append((target, stage, str(len(hit)), str(attempts), f"{same} of {len(hit)}"))
    same = sum(one.same for one in killed)
    rows.append(("all", "", str(len(killed)), "", f"{same} of {len(killed)}"))
    write_result(
        "kill_matrix_service",
        f"24 training and 8 validation records, {HYPER_PARAMETERS}, base model id {TITAN}, through "
        f"a real `outcrop serve` with checkpoint_seconds 1. An undisturbed job took {seconds:.0f} "
        f"s. {len(killed)} jobs, one kill (SIGKILL) each at a random moment of that time, seed "
        f"{options.seed}; every third in its last {LATE_SHARE:.0%}.",
        rows,
        "Compared with the undisturbed job: the digest of the published folder, and the bytes of "
        "both CSV files in the bucket. In each case exactly one folder held the model.",
    )
