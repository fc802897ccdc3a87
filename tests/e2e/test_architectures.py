"""Models of other architectures than the shipped one's: added, fine-tuned and served."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.assets.architectures import ARCHITECTURES
from tests.e2e.service import Service, in_service, new_bucket
from tests.unit.serve.tiny_chat import write_tiny_chat

from outcrop.models.describe import add_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

KINDS = ("gpt2", "gemma2")
BODY = {
    "inputText": "Which code has part 3?",
    "textGenerationConfig": {"maxTokenCount": 12, "temperature": 0},
}


def model_id(kind: str) -> str:
    return f"mylab.{kind}-v1:0"


def write_model(kind: str, folder: Path) -> Path:
    """A tiny model of the kind, with a tokenizer of bytes and a chat template."""
    write_tiny_chat(folder)
    llama = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = {name: llama.get(name) for name in ("vocab_size", "eos_token_id", "bos_token_id")}
    architecture = ARCHITECTURES[kind]
    changes = {**architecture.changes, **tokens, "pad_token_id": None}
    model = dataclasses.replace(architecture, changes=changes).model(dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("architectures")
    running = Service(root / "data", OUTCROP_JOB_SLOTS="1")
    for kind in KINDS:
        folder = write_model(kind, root / kind)
        add_model(running.settings, folder, model_id(kind), license="none", family="titan-text")
    running.start()
    yield running
    running.stop()


def invoke(service: Service, model: str) -> str:
    answer = service.client("bedrock-runtime", attempts=8).invoke_model(
        modelId=model, body=json.dumps(BODY)
    )
    return str(json.loads(answer["body"].read())["results"][0]["outputText"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_the_architecture_is_fine_tuned_and_served(service: Service, kind: str) -> None:
    bedrock, bucket = service.client("bedrock"), f"bucket-{kind}"
    new_bucket(service, bucket)
    before = invoke(service, model_id(kind))
    arn = service.create_job(
        *(bucket, f"job-{kind}"),
        baseModelIdentifier=model_id(kind),
        hyperParameters={"epochCount": "3", "batchSize": "4", "learningRate": "0.00003"},
    )
    job = service.wait_for_job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    begin = service.progress(arn)["baseValidationLoss"]
    assert job["validationMetrics"][0]["validationLoss"] < begin

    number = job["outputModelArn"].rpartition("/")[2]
    (file,) = (service.data_dir / "models" / "custom" / number).rglob("adapter_model.safetensors")
    described = json.loads(file.with_name("adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(described["target_modules"]) == sorted(ARCHITECTURES[kind].linears)
    assert described["fan_in_fan_out"] is (kind == "gpt2")
    assert len(load_file(file)) >= 2 * 2 * len(ARCHITECTURES[kind].linears)

    throughput = in_service(service, f"throughput-{kind}", job["outputModelArn"])
    assert invoke(service, throughput) != before
    assert invoke(service, model_id(kind)) == before
    bedrock.delete_provisioned_model_throughput(provisionedModelId=throughput)
