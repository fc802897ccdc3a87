"""Is the model that the published hyperparameters make visibly better than its base?

    python -m benchmarks.mts_dialog_rouge --data FOLDER

Starts a service of its own and goes the way of its users: uploads mts-dialog's training and
validation records, fine-tunes with the settings of Bedrock's own examples (1 epoch, batch 8,
learningRate 0.00001), buys throughput and asks for the note of each test record, greedily: the
base, the base with one worked example in its prompt, and the custom model.

Targets: ROUGE-L of the custom model at least 1.5 times the base's, and the median answer length
within a factor of 2 of the references'.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
from benchmarks.running import running_service, write_result
from botocore.config import Config

from outcrop.evaluate.generation import exact_match, rouge_l, words

BASE_MODEL = "cohere.command-light-text-v14:7:4k"
"""Its limit of 4,096 tokens a record at batch 8 holds the longest one; Titan's does not."""
TURNS_MODEL = "amazon.titan-text-express-v1"
"""The same real model behind a body that knows turns, for the worked example."""
ROLE = "arn:aws:iam::123456789012:role/BedrockCustomizationRole"
HYPER_PARAMETERS = {"epochCount": "1", "batchSize": "8", "learningRate": "0.00001"}
BUCKET, TRAINING, VALIDATION = "mts-dialog", "training.jsonl", "validation.jsonl"
ANSWER_TOKENS = 128
POLL_SECONDS = 2.0

Record = dict[str, str]


def main() -> None:
    """Train, ask, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="where mts-dialog-*.jsonl lie")
    parser.add_argument("--records", type=int, default=100, help="test records to ask for")
    parser.add_argument("--answers", type=Path, help="file for the answers themselves, as JSON")
    arguments = parser.parse_args()

    data: Path = arguments.data
    training = read_records(data / "mts-dialog-train.jsonl")
    test = read_records(data / "mts-dialog-test.jsonl")[: arguments.records]
    with tempfile.TemporaryDirectory(prefix="outcrop-rouge-") as name:
        answers, job = measure(Path(name) / "data", data, training, test)
    if arguments.answers:
        kept = answers | {"wanted": [record["completion"] for record in test]}
        arguments.answers.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    report(answers, [record["completion"] for record in test], len(training), job)


def measure(
    data_dir: Path, data: Path, training: Sequence[Record], test: Sequence[Record]
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Return the answers of each model, and the job that made the custom one."""
    with running_service(data_dir) as service:
        credentials = service.credentials()
        patient = Config(read_timeout=300)
        runtime = boto3.client("bedrock-runtime", config=patient, **credentials)

        def invoke(model_id: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = runtime.invoke_model(modelId=model_id, body=json.dumps(body))
            answered: dict[str, Any] = json.loads(answer["body"].read())
            return answered

        def ask(model_id: str, prompt: str) -> str:
            body = {"prompt": prompt, "temperature": 0, "max_tokens": ANSWER_TOKENS}
            return str(invoke(model_id, body)["generations"][0]["text"]).strip()

        def ask_with_example(prompt: str) -> str:
            settings = {"temperature": 0, "maxTokenCount": ANSWER_TOKENS}
            text = f"{worked}User: {prompt}\nBot:"
            body = {"inputText": text, "textGenerationConfig": settings}
            return str(invoke(TURNS_MODEL, body)["results"][0]["outputText"]).strip()

        upload(boto3.client("s3", **credentials), data)
        bedrock = boto3.client("bedrock", **credentials)
        job = fine_tune(bedrock)
        throughput = deploy(bedrock, job["outputModelArn"])
        worked = worked_example(training)
        answers = {
            "base": ask_all(lambda prompt: ask(BASE_MODEL, prompt), test),
            "base, one worked example as a turn before": ask_all(ask_with_example, test),
            "custom": ask_all(lambda prompt: ask(throughput, prompt), test),
        }
    return answers, job


def upload(s3: Any, data: Path) -> None:
    """Put the training and validation records into a bucket."""
    s3.create_bucket(Bucket=BUCKET)
    s3.upload_file(str(data / "mts-dialog-train.jsonl"), BUCKET, TRAINING)
    s3.upload_file(str(data / "mts-dialog-validation.jsonl"), BUCKET, VALIDATION)


def fine_tune(bedrock: Any) -> dict[str, Any]:
    """Return the completed job."""
    arn = bedrock.create_model_customization_job(
        customizationType="FINE_TUNING",
        jobName="mts-dialog",
        customModelName="mts-dialog",
        roleArn=ROLE,
        baseModelIdentifier=BASE_MODEL,
        hyperParameters=HYPER_PARAMETERS,
        trainingDataConfig={"s3Uri": f"s3://{BUCKET}/{TRAINING}"},
        validationDataConfig={"validators": [{"s3Uri": f"s3://{BUCKET}/{VALIDATION}"}]},
        outputDataConfig={"s3Uri": f"s3://{BUCKET}/output"},
    )["jobArn"]
    while True:
        job: dict[str, Any] = bedrock.get_model_customization_job(jobIdentifier=arn)
        if job["status"] != "InProgress":
            break
        time.sleep(POLL_SECONDS)
    assert job["status"] == "Completed", job.get("failureMessage")
    return job


def deploy(bedrock: Any, model: str) -> str:
    """Return the ARN of a throughput that is in service."""
    arn: str = bedrock.create_provisioned_model_throughput(
        modelUnits=1, provisionedModelName="mts-dialog", modelId=model
    )["provisionedModelArn"]
    while True:
        state = bedrock.get_provisioned_model_throughput(provisionedModelId=arn)
        if state["status"] == "InService":
            return arn
        assert state["status"] == "Creating", state
        time.sleep(POLL_SECONDS)


def worked_example(training: Sequence[Record]) -> str:
    """Return the training record of median length as a turn and its answer, in Titan's mark-up."""
    ordered = sorted(training, key=lambda record: len(record["prompt"]))
    record = ordered[len(ordered) // 2]
    return f"User: {record['prompt']}\nBot: {record['completion'].strip()}\n"


def ask_all(ask: Callable[[str], str], records: Sequence[Record]) -> list[str]:
    """Return the answers to all prompts."""
    return [ask(record["prompt"]) for record in records]


def report(
    answers: dict[str, list[str]], wanted: Sequence[str], num_training: int, job: dict[str, Any]
) -> None:
    """Write the table: ROUGE-L, its ratio to the base's, exact matches and lengths."""
    base = statistics.mean(map(rouge_l, answers["base"], wanted))
    rows = [("model", "ROUGE-L", "times the base's", "exact match", "median words")]
    for name, texts in answers.items():
        score = statistics.mean(map(rouge_l, texts, wanted))
        exact = statistics.mean(map(exact_match, texts, wanted))
        length = statistics.median(len(words(text)) for text in texts)
        rows.append((name, f"{score:.3f}", f"{score / base:.2f}", f"{exact:.0%}", f"{length:g}"))
    length = statistics.median(len(words(text)) for text in wanted)
    rows.append(("the references", "1.000", "", "", f"{length:g}"))
    minutes = (job["endTime"] - job["creationTime"]).total_seconds() / 60
    validation_loss = job["validationMetrics"][0]["validationLoss"]
    write_result(
        "mts-dialog_rouge",
        f"{num_training} training records, hyperparameters "
        + ", ".join(f"{name} {value}" for name, value in HYPER_PARAMETERS.items())
        + f", base model id {BASE_MODEL}; then {len(wanted)} test records, temperature 0, answers "
        f"of at most {ANSWER_TOKENS} tokens, all through the service's own API. ROUGE-L is the F1 "
        "of the longest common subsequence of words, the mean over the records.",
        rows,
        f"The job took {minutes:.1f} minutes from its creation to its end; validation loss at its "
        f"end {validation_loss:.3f}, training loss {job['trainingMetrics']['trainingLoss']:.3f}.",
    )


def read_records(file: Path) -> list[Record]:
    """Return the records of a file in its order."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
