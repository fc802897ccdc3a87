"""Jobs that start from a custom model, and jobs on raw text, from their rows to their models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import Engine
from tests.unit.jobs.conftest import bootstrapped
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, BASE_ARN, REGION, claimed, queued

from outcrop.errors import DataError, ModelError
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, new_id, role_arn
from outcrop.jobs import customization
from outcrop.jobs.parents import describe_parent, plan_parent
from outcrop.models.artifact import read_artifact
from outcrop.models.catalog import load_catalog
from outcrop.models.describe import add_model
from outcrop.models.lora import load_adapter
from outcrop.settings import Settings
from outcrop.store import jobs, models
from outcrop.store.database import transaction
from outcrop.store.rows import CustomModel, Job

MODEL_ID = "mylab.tiny-v1:0"
CPT, FT = "CONTINUED_PRE_TRAINING", "FINE_TUNING"
FILES = {
    FT: [{"prompt": f"question {number}", "completion": " yes"} for number in range(10)],
    CPT: [{"input": "the user asks and the assistant answers " * 12}] * 3,
}


@pytest.fixture
def settings(data_dir: Path, folder: Path) -> Settings:
    settings = Settings(data_dir=data_dir)
    add_model(settings, folder, MODEL_ID, license="mit", family="titan-text")
    return settings


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    yield from bootstrapped(settings)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Workshop:
    """Runs jobs on one data directory."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings, self.engine = settings, engine
        content = {
            f"{name}.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            for name, lines in FILES.items()
        }
        self.objects = MemoryStore(**content)

    def held(self, name: str, parent: CustomModel | None = None, **changes: Any) -> Job:
        """A job that was just claimed; it makes the model of that name."""
        base = load_catalog(self.settings).resolve(MODEL_ID)
        assert base is not None
        customization_type = changes.get("customizationType", FT)
        spec = {
            "baseModelId": MODEL_ID,
            "baseModelArn": BASE_ARN if parent is None else parent.arn,
            "foundationModelArn": BASE_ARN,
            "weights": base.weights,
            "customizationType": customization_type,
            "hyperParameters": {},
            "userHyperParameters": {"epochCount": "1", **changes.pop("parameters", {})},
            "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/{customization_type}.jsonl"},
            "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/output"},
            "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
            "customModelId": new_id(),
            "customModelName": name,
            **({} if parent is None else {"parent": describe_parent(parent)}),
            **changes,
        }
        with transaction(self.engine) as connection:
            return claimed(connection, queued(connection, name, spec=spec, model_name=name))

    def run(self, job: Job) -> CustomModel:
        """Run a job to its end and return its model."""
        customization.run(self.settings, self.engine, job, lambda: False, objects=self.objects)
        with self.engine.connect() as connection:
            model = models.get_model(connection, ACCOUNT, REGION, job.spec["customModelName"])
        assert model is not None
        return model

    def make(self, name: str, parent: CustomModel | None = None, **changes: Any) -> CustomModel:
        """Make a model."""
        return self.run(self.held(name, parent, **changes))

    def artifact(self, model: CustomModel) -> Path:
        """The folder of a model."""
        return self.settings.data_dir / model.artifact_path

    def delete(self, model: CustomModel) -> None:
        """Delete a model with its files."""
        with transaction(self.engine) as connection:
            models.delete_model(connection, model)
        shutil.rmtree(self.artifact(model))


@pytest.fixture
def workshop(settings: Settings, engine: Engine) -> Workshop:
    return Workshop(settings, engine)


def test_raw_text_is_trained_on_and_the_model_says_so(workshop: Workshop) -> None:
    model = workshop.make("cpt", customizationType=CPT)
    assert model.customization_type == CPT
    assert model.metrics["trainingMetrics"]["trainingLoss"] > 0
    step_metrics = next(
        uri for uri in workshop.objects.content if uri.key.endswith("step_metrics.jsonl")
    )
    steps = [json.loads(line) for line in workshop.objects.content[step_metrics].splitlines()]
    # Three documents; the tiny model's context of 512 tokens holds each.
    assert len(steps) == 3


def test_base_then_raw_text_then_twice_fine_tuned_is_one_adapter_over_the_base(
    workshop: Workshop,
) -> None:
    first = workshop.make("cpt", customizationType=CPT)
    second = workshop.make("ft", first)
    third = workshop.make("ft-again", second, parameters={"adapterRank": "24"})
    arns = [(model.base_model_arn, model.foundation_model_arn) for model in (first, second, third)]
    assert arns == [(BASE_ARN, BASE_ARN), (first.arn, BASE_ARN), (second.arn, BASE_ARN)]
    workshop.delete(first)
    workshop.delete(second)
    found = read_artifact(workshop.artifact(third))
    assert found.weights is None
    assert load_adapter(workshop.artifact(third)).config.rank == 24
    parent = plan_parent({"parent": describe_parent(third)})
    assert parent is not None
    assert parent.adapter == load_adapter(workshop.artifact(third)).config


@pytest.mark.parametrize("last", ["adapter", "full"])
def test_chains_through_whole_models_have_all_they_need(workshop: Workshop, last: str) -> None:
    first = workshop.make("one")
    second = workshop.make("two", first, parameters={"method": "full"})
    third = workshop.make("three", second)
    fourth = workshop.make("four", third, parameters={"method": last})
    for model in (first, second, third):
        workshop.delete(model)
    found = read_artifact(workshop.artifact(fourth))
    assert found.weights is not None
    assert (found.adapter is None) == (last == "full")
    assert describe_parent(fourth)["adapter"] == (
        None if last == "full" else describe_parent(third)["adapter"]
    )
    assert (found.weights / "tokenizer.json").is_file(), "it can be used by itself"


def test_a_deleted_parent_whose_files_are_there_changes_nothing_for_the_job(
    workshop: Workshop,
) -> None:
    parent = workshop.make("parent")
    wanted = workshop.make("wanted", parent)
    job = workshop.held("child", parent)
    with transaction(workshop.engine) as connection:
        models.delete_model(connection, parent)
    assert workshop.run(job).artifact_digest == wanted.artifact_digest


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_parent_whose_files_are_gone_or_changed_fails_the_job_in_its_first_stage(
    workshop: Workshop, how: str
) -> None:
    parent = workshop.make("parent")
    job = workshop.held("child", parent)
    if how == "gone":
        workshop.delete(parent)
    else:
        file = workshop.artifact(parent) / "adapter_config.json"
        file.write_text(file.read_text() + " ")
    says = "are gone" if how == "gone" else "are not those that were published"
    with pytest.raises(ModelError, match=rf"custom model parent \(arn:.*\).*, {says}"):
        workshop.run(job)
    with workshop.engine.connect() as connection:
        statuses = [stage.status for stage in jobs.stages(connection, job.id).values()]
    assert statuses == ["InProgress", "NotStarted", "NotStarted"]


@pytest.mark.parametrize(
    ("customization_type", "data", "says"),
    [
        (CPT, FT, "Labelled records are for jobs of customizationType FINE_TUNING"),
        (FT, CPT, "Raw text is for jobs of customizationType CONTINUED_PRE_TRAINING"),
    ],
)
def test_data_of_the_other_type_fails_the_job_with_what_to_do(
    workshop: Workshop, customization_type: str, data: str, says: str
) -> None:
    job = workshop.held(
        "wrong",
        customizationType=customization_type,
        trainingDataConfig={"s3Uri": str(S3Uri(BUCKET, f"{data}.jsonl"))},
    )
    with pytest.raises(DataError, match=says):
        workshop.run(job)
