"""Fine-tune a model on Bedrock, deploy it, and compare it with its base: the whole way in boto3.

    python examples/operation_data.py FOLDER     # makes training, validation and test.jsonl
    python examples/customize.py FOLDER

Nothing in here is Outcrop's own. The same program runs against Amazon Bedrock, given a role there;
what it talks to is what AWS_ENDPOINT_URL and the credentials in the environment say. Only for the
progress bar it asks Outcrop, where that is installed: Bedrock has no operation for it.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions

BASE_MODEL = "amazon.titan-text-express-v1"
HYPER_PARAMETERS = {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"}
MAX_ANSWER_TOKENS = 24
POLL_SECONDS = 1.0
WIDTH = 96

s3 = boto3.client("s3")
bedrock = boto3.client("bedrock")
runtime = boto3.client("bedrock-runtime")
Record = dict[str, str]
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Metrics:
    """Loss, in nats a token, and perplexity on the validation records."""

    loss: float
    perplexity: float


def main(folder: Path) -> None:
    """Run all of it; whatever costs anything is deleted in the end, come what may."""
    started = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    account = boto3.client("sts").get_caller_identity()["Account"]
    training, test = read_records(folder / "training.jsonl"), read_records(folder / "test.jsonl")

    title("Upload the data")
    bucket = f"operations-{account}-{stamp}"
    upload(bucket, folder)

    title("Base models that can be fine-tuned")
    show_base_models()

    title(f"Ask the base model {len(test)} questions it has not seen")
    worked_example = training[0]["prompt"], training[0]["completion"]
    base_answers = ask_all(lambda prompt: ask(BASE_MODEL, prompt), test)
    shown_answers = ask_all(lambda prompt: ask(BASE_MODEL, prompt, worked_example), test)

    title("Fine-tune it")
    job_name, model_name = f"operations-job-{stamp}", f"operations-{stamp}"
    job_arn = bedrock.create_model_customization_job(
        customizationType="FINE_TUNING",
        jobName=job_name,
        customModelName=model_name,
        roleArn=f"arn:aws:iam::{account}:role/BedrockCustomizationRole",
        baseModelIdentifier=BASE_MODEL,
        hyperParameters=HYPER_PARAMETERS,
        trainingDataConfig={"s3Uri": f"s3://{bucket}/training.jsonl"},
        validationDataConfig={"validators": [{"s3Uri": f"s3://{bucket}/validation.jsonl"}]},
        outputDataConfig={"s3Uri": f"s3://{bucket}/output"},
    )["jobArn"]
    say(", ".join(f"{name} {value}" for name, value in HYPER_PARAMETERS.items()))
    num_steps = math.ceil(len(training) / int(HYPER_PARAMETERS["batchSize"]))
    job = wait_for_job(job_arn, bucket, num_steps * int(HYPER_PARAMETERS["epochCount"]))
    before, after = read_metrics(bucket, job_arn)
    say(f"training loss    {job['trainingMetrics']['trainingLoss']:.3f}")
    say(f"validation loss  {before.loss:.3f} before, {after.loss:.3f} after")

    model = bedrock.get_custom_model(modelIdentifier=model_name)
    title("Deploy the custom model")
    say(model["modelArn"].split(":", 5)[5])
    throughput = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName=model_name, modelId=model["modelArn"]
    )["provisionedModelArn"]
    try:
        wait_for_throughput(throughput)
        title(f"Ask the custom model the same {len(test)} questions")
        custom_answers = ask_all(lambda prompt: ask(throughput, prompt), test)
    finally:
        bedrock.delete_provisioned_model_throughput(provisionedModelId=throughput)
        bedrock.delete_custom_model(modelIdentifier=model["modelArn"])

    answers = {"base": base_answers, "base, 1 example": shown_answers, "custom": custom_answers}
    losses = {"base": before, "custom": after}
    title(f"Base against custom on {len(test)} held-out records")
    show_table(test, answers, losses)
    title("Three answers side by side")
    show_answers(test, answers, number=3)
    title("The throughput and the custom model are deleted; is the base as it was?")
    again = ask_all(lambda prompt: ask(BASE_MODEL, prompt), test[:10])
    same = sum(left == right for left, right in zip(again, base_answers, strict=False))
    say(f"{same} of {len(again)} answers are the same to the last character.")
    print(f"\nDone in {clock(time.monotonic() - started)}.")


def upload(bucket: str, folder: Path) -> None:
    """Create the bucket and put the training and validation records into it."""
    s3.create_bucket(Bucket=bucket)
    for name in ("training.jsonl", "validation.jsonl"):
        s3.upload_file(str(folder / name), bucket, name)
        size = s3.head_object(Bucket=bucket, Key=name)["ContentLength"]
        number = len(read_records(folder / name))
        say(f"{f's3://{bucket}/{name}':<58}{number:>6} records{size / 1000:>8.1f} kB")


def show_base_models() -> None:
    """List what can be fine-tuned: the id that programs use, and the model that really answers."""
    listed = bedrock.list_foundation_models(byCustomizationType="FINE_TUNING")["modelSummaries"]
    ids = {model["modelId"] for model in listed}
    for model in listed:
        name, _, suffix = model["modelId"].partition(":")
        if ":" in suffix and ids & {name, f"{name}:{suffix.partition(':')[0]}"}:
            continue  # the same model again, with the length of its context
        chosen = "  <- this one" if model["modelId"] == BASE_MODEL else ""
        say(f"{model['modelId']:<42}{model['modelName']}, {model['providerName']}{chosen}")


def wait_for_job(job_arn: str, bucket: str, num_steps: int) -> dict[str, Any]:
    """Poll the job until it is over, and show how far it is."""
    progress = read_progress(job_arn, bucket, num_steps)
    bar = Bar()
    while True:
        job: dict[str, Any] = bedrock.get_model_customization_job(jobIdentifier=job_arn)
        if job["status"] != "InProgress":
            break
        bar.show(next(progress))
        time.sleep(POLL_SECONDS)
    bar.end()
    if job["status"] != "Completed":
        sys.exit(f"The job is {job['status']}: {job.get('failureMessage', 'no reason was given')}")
    seconds = (job["endTime"] - job["creationTime"]).total_seconds()
    say(f"{job['status']} in {clock(seconds)}")
    return job


@dataclass(frozen=True)
class Progress:
    """How far training is; what is not known yet is None."""

    step: int
    num_steps: int
    loss: float | None = None
    seconds_left: float | None = None
    note: str = ""


def read_progress(job_arn: str, bucket: str, num_steps: int) -> Iterator[Progress]:
    """Yield the job's progress for ever: from Outcrop where it answers, else from the CSV in S3."""
    try:
        import outcrop

        client: Any = outcrop.client()
        client.get_job_progress(jobIdentifier=job_arn)
    except (ImportError, botocore.exceptions.ClientError):
        yield from read_progress_from_s3(job_arn, bucket, num_steps)
    while True:
        answer = client.get_job_progress(jobIdentifier=job_arn)
        position = answer.get("queuePosition")
        yield Progress(
            answer.get("step", 0),
            answer.get("totalSteps", num_steps),
            answer.get("trainingLoss"),
            answer.get("etaSeconds"),
            f"{position} jobs are before it" if position else answer.get("stage", ""),
        )


def read_progress_from_s3(job_arn: str, bucket: str, num_steps: int) -> Iterator[Progress]:
    """Yield the job's progress as the metrics file tells it, which grows while the job runs."""
    started = time.monotonic()
    while True:
        rows = read_csv(
            bucket, artifact(job_arn, "training_artifacts/step_wise_training_metrics.csv")
        )
        left = (time.monotonic() - started) / len(rows) * (num_steps - len(rows)) if rows else None
        loss = float(rows[-1]["training_loss"]) if rows else None
        yield Progress(len(rows), num_steps, loss, left)


class Bar:
    """A line that is drawn again and again on a terminal, and now and then anywhere else."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.drawn_at = 0.0
        self.drawn = ""

    def show(self, progress: Progress) -> None:
        """Draw the line for where the job is now."""
        share = progress.step / progress.num_steps
        parts = [f"{progress.step:>4}/{progress.num_steps} steps"]
        if progress.loss is not None:
            parts.append(f"loss {progress.loss:.3f}")
        if progress.seconds_left is not None and progress.step:
            parts.append(f"{clock(progress.seconds_left)} left")
        elif progress.note:
            parts.append(progress.note)
        filled = round(30 * share)
        line = f"   [{'#' * filled}{'.' * (30 - filled)}] {'   '.join(parts)}"
        if self.live:
            print(f"\r{line:<{WIDTH}}", end="", flush=True)
        elif line != self.drawn and time.monotonic() - self.drawn_at >= 10:
            self.drawn, self.drawn_at = line, time.monotonic()
            print(line, flush=True)

    def end(self) -> None:
        """Leave an empty line where the bar was."""
        if self.live:
            print(f"\r{'':<{WIDTH}}\r", end="", flush=True)


def read_metrics(bucket: str, job_arn: str) -> tuple[Metrics, Metrics]:
    """Return the validation metrics before the first step, which are the base's, and at the end."""
    rows = read_csv(
        bucket,
        artifact(
            job_arn,
            "validation_artifacts/post_fine_tuning_validation/validation/validation_metrics.csv",
        ),
    )
    first, last = (
        Metrics(float(row["validation_loss"]), float(row["perplexity"]))
        for row in (rows[0], rows[-1])
    )
    return first, last


def artifact(job_arn: str, name: str) -> str:
    """Return the key of one of the job's output files."""
    return f"output/model-customization-job-{job_arn.rsplit('/', 1)[1]}/{name}"


def read_csv(bucket: str, key: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file in S3; none while it is not there."""
    try:
        body = s3.get_object(Bucket=bucket, Key=key)["Body"].read().decode("utf-8")
    except s3.exceptions.NoSuchKey:
        return []
    return list(csv.DictReader(io.StringIO(body)))


def wait_for_throughput(arn: str) -> None:
    """Poll the provisioned throughput until it can be invoked."""
    started = time.monotonic()
    while True:
        state = bedrock.get_provisioned_model_throughput(provisionedModelId=arn)
        if state["status"] not in ("Creating", "Updating"):
            break
        time.sleep(POLL_SECONDS)
    if state["status"] != "InService":
        sys.exit(f"The throughput is {state['status']}: {state.get('failureMessage', '')}")
    say(f"{state['status']} after {clock(time.monotonic() - started)}")


def ask(model_id: str, prompt: str, worked_example: tuple[str, str] | None = None) -> str:
    """Return a model's greedy answer, to the prompt as it is or after one worked example."""
    text = prompt
    if worked_example is not None:
        question, answer = worked_example
        text = f"User: {question}\nBot: {answer}\nUser: {prompt}\nBot:"
    body = {
        "inputText": text,
        "textGenerationConfig": {"temperature": 0, "maxTokenCount": MAX_ANSWER_TOKENS},
    }
    response = runtime.invoke_model(modelId=model_id, body=json.dumps(body))
    answered: str = json.loads(response["body"].read())["results"][0]["outputText"]
    return answered.strip()


def ask_all(asked: Ask, records: list[Record]) -> list[str]:
    """Return the answers to all prompts, and say how long they took."""
    started = time.monotonic()
    answers = [asked(record["prompt"]) for record in records]
    seconds = time.monotonic() - started
    say(f"{len(answers)} answers in {clock(seconds)}")
    return answers


def show_table(
    test: list[Record], answers: dict[str, list[str]], losses: dict[str, Metrics]
) -> None:
    """Print what each model scored, a column a model."""
    wanted = [record["completion"] for record in test]
    columns = list(answers)
    right = [sum(a == b for a, b in zip(answers[name], wanted, strict=True)) for name in columns]
    length = [f"{statistics.median(map(len, answers[name])):.0f}" for name in columns]
    rows: list[tuple[str, list[str]]] = [
        ("exact match", [f"{n} ({n / len(test):.0%})" for n in right]),
        ("loss", [f"{losses[n].loss:.3f}" if n in losses else "-" for n in columns]),
        ("perplexity", [f"{losses[n].perplexity:.2f}" if n in losses else "-" for n in columns]),
        ("answer length", length),
    ]
    say(f"{'':<16}" + "".join(f"{name:>18}" for name in columns))
    for label, cells in rows:
        say(f"{label:<16}" + "".join(f"{cell:>18}" for cell in cells))
    reference = f"{statistics.median(map(len, wanted)):.0f},"
    say("")
    say("Answer length is the median in characters; that of the right answers is " + reference)
    say(
        f"and an answer ends after {MAX_ANSWER_TOKENS} tokens. Loss and perplexity are those of the"
    )
    say("validation records in the job's validation_metrics.csv, whose first row is the base.")


def show_answers(test: list[Record], answers: dict[str, list[str]], number: int) -> None:
    """Print some questions with the answer of each model."""
    for place, record in enumerate(test[:number]):
        if place:
            say("")
        for line in record["prompt"].splitlines():
            say(shorten(line))
        say(f"   {'right':<17}{record['completion']}")
        for name, given in answers.items():
            say(f"   {name:<17}{shorten(given[place], WIDTH - 24)}")


def read_records(path: Path) -> list[Record]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def title(text: str) -> None:
    """Begin a part of the output."""
    print(f"\n{text}", flush=True)


def say(text: str) -> None:
    """Print a line below the title."""
    print(f"   {text}".rstrip(), flush=True)


def shorten(text: str, width: int = WIDTH - 4) -> str:
    """Return the text on one line, and of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3].rstrip() + "..."


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/customize.py FOLDER")
    main(Path(sys.argv[1]))
