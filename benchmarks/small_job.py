"""How long a small job takes, from its creation to Completed, with the service warm.

    python -m benchmarks.small_job [--records 100] [--runs 5]

Starts a service of its own and goes the way of its users: records in a bucket, one epoch, and
GetModelCustomizationJob until the job has ended. One job before makes the service warm: the base
weights are converted then, and the machine's file cache is filled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
from benchmarks.aws_operations import operation_records
from benchmarks.running import running_service, write_result

BASE_MODEL = "amazon.titan-text-express-v1"
ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
BUCKET, RECORDS = "small-job", "records.jsonl"
STAGES = ("validationDetails", "dataProcessingDetails", "trainingDetails")
POLL_SECONDS = 0.1
TARGET_SECONDS = 60


def main() -> None:
    """Run the jobs and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--file", type=Path, help="records of one's own, prompt and completion")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="outcrop-small-job-") as name,
        running_service(Path(name) / "data") as service,
    ):
        s3 = boto3.client("s3", **service.credentials())
        bedrock = boto3.client("bedrock", **service.credentials())
        s3.create_bucket(Bucket=BUCKET)
        s3.put_object(Bucket=BUCKET, Key=RECORDS, Body=make_file(options).encode())
        runs = [run_job(bedrock, number, options.batch_size) for number in range(options.runs + 1)]
    report(options, runs)


def make_file(options: argparse.Namespace) -> str:
    """Return the training file: the first records that are neither too short nor too long."""
    if options.file:
        lines = options.file.read_text(encoding="utf-8").splitlines()
    else:
        # 30 to 350 tokens, as in training_speed, told by the length of the text.
        fitting = [record for record in operation_records() if 60 <= len(record["prompt"]) <= 1300]
        lines = [json.dumps(record) for record in fitting]
    return "\n".join(lines[: options.records])


def run_job(bedrock: Any, number: int, batch_size: int) -> dict[str, Any]:
    """Return the seconds of one job: as its client sees them, and of each stage."""
    started = time.perf_counter()
    arn = bedrock.create_model_customization_job(
        jobName=f"small-{number}",
        customModelName=f"small-{number}",
        roleArn=ROLE,
        baseModelIdentifier=BASE_MODEL,
        hyperParameters={
            "epochCount": "1",
            "batchSize": str(batch_size),
            "learningRate": "0.00001",
        },
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/{RECORDS}"},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/output"},
    )["jobArn"]
    while True:
        job = bedrock.get_model_customization_job(jobIdentifier=arn)
        if job["status"] != "InProgress":
            break
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    if job["status"] != "Completed":
        raise SystemExit(f"the job is {job['status']}: {job.get('failureMessage')}")
    stages = {}
    for stage in STAGES:
        details = job["statusDetails"][stage]
        stages[stage] = (details["lastModifiedTime"] - details["creationTime"]).total_seconds()
    print(f"job {number}: {seconds:.1f} s, {stages}", flush=True)
    return {"seconds": seconds, "loss": job["trainingMetrics"]["trainingLoss"], **stages}


def report(options: argparse.Namespace, runs: list[dict[str, Any]]) -> None:
    """Write the table: the first job, then the median and the range of the others."""
    first, *others = runs
    rows: list[tuple[str, ...]] = [("what", "first job", "median", "lowest", "highest", "target")]
    names = {"seconds": "from creation to Completed"} | {
        stage: stage.removesuffix("Details") for stage in STAGES
    }
    for key, name in names.items():
        values = [run[key] for run in others]
        cells = [first[key], statistics.median(values), min(values), max(values)]
        target = f"{TARGET_SECONDS} s" if key == "seconds" else ""
        rows.append((name, *(f"{value:.1f} s" for value in cells), target))
    write_result(
        "small_job",
        f"{options.records} records ({options.file.name if options.file else 'AWS operations'}), "
        f"one epoch, batches of {options.batch_size}, base model id {BASE_MODEL}, default "
        f"settings, asked every {POLL_SECONDS:g} s. {len(others)} jobs one after the other, after "
        "a first one that makes the service warm (it converts the base weights).",
        rows,
        f"Training loss {others[0]['loss']:.3f}. A stage's time is that between its own two times "
        "in statusDetails.",
    )


if __name__ == "__main__":
    main()
