"""Jobs that start from a custom model, or train on raw text: what is created, refused and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.unit.api.conftest import Context
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import (
    ACCOUNT,
    BASE,
    BASE_ARN,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_model,
)

from outcrop.api import base_models, custom_models, customization_jobs
from outcrop.api.context import Services
from outcrop.errors import AccessDeniedException, ConflictException, ValidationException
from outcrop.identity import accounts
from outcrop.identity.bootstrap import CUSTOMIZATION_ROLE
from outcrop.ids import S3Uri, role_arn
from outcrop.jobs import gc
from outcrop.models.catalog import Catalog
from outcrop.models.weights import SHIPPED_KEY
from outcrop.objects.client import ObjectInfo
from outcrop.store import jobs, models, tables
from outcrop.store.database import transaction
from outcrop.store.rows import NewCustomModel

TITAN = "amazon.titan-text-lite-v1"
REQUEST: dict[str, Any] = {
    "jobName": "job",
    "customModelName": "child",
    "roleArn": role_arn(ACCOUNT, CUSTOMIZATION_ROLE),
    "baseModelIdentifier": TITAN,
    "trainingDataConfig": {"s3Uri": f"s3://{BUCKET}/train.jsonl"},
    "outputDataConfig": {"s3Uri": f"s3://{BUCKET}/out"},
}
CREATE = "CreateModelCustomizationJob"


@pytest.fixture(autouse=True)
def _objects(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = MemoryStore(**{"train.jsonl": b"{}"})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))


@pytest.fixture
def publish(services: Services) -> Callable[..., NewCustomModel]:
    """Makes a custom model with a file."""

    def make(name: str, account: str = ACCOUNT, **fields: Any) -> NewCustomModel:
        fields.setdefault("spec", spec(adapter={"rank": 8, "alpha": 4.0, "targets": ["q_proj"]}))
        fields.setdefault("metrics", {"trainingMetrics": {}, "validationMetrics": []})
        model = new_model(name, account, **fields)
        with transaction(services.engine) as connection:
            models.insert_model(connection, model)
        folder = services.settings.data_dir / model.artifact_path
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        return model

    return make


def spec(**fields: Any) -> dict[str, Any]:
    """What the job that made a model leaves in its row."""
    places = {name: REQUEST[name] for name in ("trainingDataConfig", "outputDataConfig")}
    return {"weights": SHIPPED_KEY, **places, **fields}


def create(context: Context, **changes: Any) -> dict[str, Any]:
    """Create a job and return what GetModelCustomizationJob answers."""
    caller = context(CREATE)
    arn = customization_jobs.create(caller, {**REQUEST, **changes})["jobArn"]
    return customization_jobs.get(caller, {"jobIdentifier": arn})


def spec_of(services: Services, arn: str) -> dict[str, Any]:
    with services.engine.connect() as connection:
        job = jobs.get_job(connection, ACCOUNT, REGION, "customization", arn)
    assert job is not None
    return job.spec


# --- customization types --------------------------------------------------------------------------


def test_continued_pre_training_is_shown_wherever_a_type_is(
    services: Services, context: Context
) -> None:
    made = create(context, customizationType="CONTINUED_PRE_TRAINING")
    assert made["customizationType"] == "CONTINUED_PRE_TRAINING"
    assert made["hyperParameters"]["epochCount"] == "5"
    caller = context("ListModelCustomizationJobs")
    (listed,) = customization_jobs.list_(caller, {})["modelCustomizationJobSummaries"]
    assert listed["customizationType"] == "CONTINUED_PRE_TRAINING"
    found = base_models.list_foundation_models(
        context("ListFoundationModels"), {"byCustomizationType": "CONTINUED_PRE_TRAINING"}
    )["modelSummaries"]
    assert {item["modelId"].partition(":")[0] for item in found} == {
        "amazon.titan-text-express-v1",
        "amazon.titan-text-lite-v1",
        "huggingfacetb.smollm2-135m-instruct-v1",
    }
    for item in found:
        assert item["customizationsSupported"] == ["FINE_TUNING", "CONTINUED_PRE_TRAINING"]


def test_a_job_that_names_no_type_is_fine_tuning(context: Context) -> None:
    assert create(context)["customizationType"] == "FINE_TUNING"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {
                "customizationType": "CONTINUED_PRE_TRAINING",
                "baseModelIdentifier": "cohere.command-text-v14",
            },
            "cannot be customized by CONTINUED_PRE_TRAINING. Offered for it: FINE_TUNING",
        ),
        (
            {"customizationType": "DISTILLATION"},
            "DISTILLATION is not offered yet. Offered: FINE_TUNING, CONTINUED_PRE_TRAINING",
        ),
        (
            {"customizationType": "REINFORCEMENT_FINE_TUNING"},
            "FINE_TUNING is not offered yet. Offered: FINE_TUNING, CONTINUED_PRE_TRAINING",
        ),
        (
            {"customizationConfig": {"distillationConfig": {}}},
            "distillationConfig belongs to .* Offered: FINE_TUNING, CONTINUED_PRE_TRAINING",
        ),
    ],
)
def test_a_type_that_is_not_there_is_refused(
    context: Context, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationException, match=says):
        create(context, **changes)


def test_our_own_hyperparameters_are_answered_only_where_they_were_sent(context: Context) -> None:
    plain = create(context)["hyperParameters"]
    assert set(plain) == {"epochCount", "batchSize", "learningRate", "learningRateWarmupSteps"}
    sent = {"method": "full", "epochCount": "2"}
    made = create(context, jobName="other", customModelName="other", hyperParameters=sent)
    assert made["hyperParameters"] == {**plain, **sent}


# --- a custom model as the base -------------------------------------------------------------------


@pytest.mark.parametrize("form", ["arn", "name", "arn of the name"])
def test_a_custom_model_is_a_base_by_each_of_its_names(
    services: Services, context: Context, publish: Callable[..., NewCustomModel], form: str
) -> None:
    parent = publish("parent")
    identifier = {
        "arn": parent.arn,
        "name": "parent",
        "arn of the name": f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/parent",
    }[form]
    made = create(context, baseModelIdentifier=identifier)
    assert made["baseModelArn"] == parent.arn
    assert made["jobArn"].split("/")[1] == BASE, "the ARN carries the model at the root"
    caller = context("ListModelCustomizationJobs")
    (listed,) = customization_jobs.list_(caller, {})["modelCustomizationJobSummaries"]
    assert listed["baseModelArn"] == parent.arn
    found = spec_of(services, made["jobArn"])
    assert found["foundationModelArn"] == BASE_ARN
    assert found["parent"]["artifactPath"] == parent.artifact_path


def test_a_chained_job_has_the_weights_that_its_parent_was_made_from(
    services: Services, context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    publish("parent")
    others = tuple(replace(base, weights="others-of-today") for base in services.catalog.models)
    caller = context(CREATE)
    caller = replace(caller, services=replace(services, catalog=Catalog(others)))
    arn = customization_jobs.create(caller, {**REQUEST, "baseModelIdentifier": "parent"})["jobArn"]
    assert spec_of(services, arn)["weights"] == SHIPPED_KEY
    publish("orphan", spec=spec(weights="gone"))
    with pytest.raises(ValidationException, match="base weights of the custom model orphan are"):
        create(context, baseModelIdentifier="orphan", jobName="b", customModelName="b")


def test_the_parents_adapter_bounds_the_childs(
    context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    publish("parent")
    with pytest.raises(ValidationException, match="adapterRank is 4; the custom model parent"):
        create(context, baseModelIdentifier="parent", hyperParameters={"adapterRank": "4"})
    publish("whole", spec=spec(adapter=None))
    create(context, baseModelIdentifier="whole", hyperParameters={"adapterRank": "4"})
    publish("old", spec=spec())
    with pytest.raises(ValidationException, match="has an adapter of rank 16"):
        create(
            context,
            baseModelIdentifier="old",
            hyperParameters={"adapterRank": "8"},
            jobName="b",
            customModelName="b",
        )


def test_a_model_of_another_account_is_no_base(
    context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    other = publish("theirs", OTHER_ACCOUNT)
    for identifier in (other.arn, "theirs"):
        with pytest.raises(ValidationException, match="The provided model identifier is invalid"):
            create(context, baseModelIdentifier=identifier)


def test_who_may_not_start_from_a_model_is_refused(
    services: Services, context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    parent, other = publish("parent"), publish("other")
    caller = context(CREATE, allowed=(f"bedrock:{CREATE}", parent.arn))
    statements = [
        {
            "Effect": "Allow",
            "Action": f"bedrock:{CREATE}",
            "Resource": f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-customization-job/*",
        },
        {"Effect": "Allow", "Action": "iam:PassRole", "Resource": "*"},
    ]
    document = json.dumps({"Version": "2012-10-17", "Statement": statements})
    with transaction(services.engine) as connection:
        accounts.put_user_policy(connection, ACCOUNT, "somebody", "jobs", document)
    for refused in (other.arn, "other", "nothing-of-this-name"):
        with pytest.raises(AccessDeniedException):
            customization_jobs.create(caller, {**REQUEST, "baseModelIdentifier": refused})
    assert customization_jobs.create(caller, {**REQUEST, "baseModelIdentifier": "parent"})


def test_a_parent_that_is_deleted_while_the_job_is_created_is_refused(
    services: Services,
    context: Context,
    publish: Callable[..., NewCustomModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publish("parent")

    class Deletes(MemoryStore):
        """A store during whose last answer somebody deletes the model."""

        def head(self, uri: S3Uri) -> ObjectInfo | None:
            custom_models.delete(context("DeleteCustomModel"), {"modelIdentifier": "parent"})
            return super().head(uri)

    objects = Deletes(**{"train.jsonl": b"{}"})
    monkeypatch.setattr(Services, "objects", property(lambda self: objects))
    with pytest.raises(ValidationException, match="parent was deleted while the job was created"):
        create(context, baseModelIdentifier="parent")
    listed = customization_jobs.list_(context("ListModelCustomizationJobs"), {})
    assert listed["modelCustomizationJobSummaries"] == []


# --- deleting the parent --------------------------------------------------------------------------


def garbage(services: Services) -> list[Path]:
    return [
        item.path for item in gc.find_garbage(services.settings, services.engine, young_seconds=0)
    ]


@pytest.mark.parametrize("state", ["queued", "running", "stopping"])
def test_a_parent_is_in_use_until_the_jobs_that_start_from_it_have_ended(
    services: Services, context: Context, publish: Callable[..., NewCustomModel], state: str
) -> None:
    parent = publish("parent")
    files = services.settings.data_dir / parent.artifact_path
    made = create(context, baseModelIdentifier="parent")
    with transaction(services.engine) as connection:
        job = jobs.get_job(connection, ACCOUNT, REGION, "customization", made["jobArn"])
        assert job is not None
        if state != "queued":
            job = claimed(connection, job)
        if state == "stopping":
            jobs.request_stop(connection, job.id)
    caller, identifier = context("DeleteCustomModel"), {"modelIdentifier": "parent"}
    with pytest.raises(ConflictException, match="parent is in use by model customization job job"):
        custom_models.delete(caller, identifier)
    assert files.is_dir()
    assert files not in garbage(services)
    with transaction(services.engine) as connection:
        if state == "queued":
            jobs.request_stop(connection, job.id)
        else:
            jobs.fail_job(connection, job.id, job.fence, "over")
    custom_models.delete(caller, identifier)
    assert not files.exists()
    again = customization_jobs.get(context("GetModelCustomizationJob"), {"jobIdentifier": "job"})
    assert again["baseModelArn"] == parent.arn, "what it came from is still told"


def test_a_deleted_models_files_go_with_it_and_no_others_do(
    services: Services, context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    parent, other = publish("parent"), publish("other")
    custom_models.delete(context("DeleteCustomModel"), {"modelIdentifier": "other"})
    assert not (services.settings.data_dir / other.artifact_path).exists()
    assert (services.settings.data_dir / parent.artifact_path).exists()


def test_a_model_that_is_not_active_is_no_base(
    services: Services, context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    publish("parent")
    with transaction(services.engine) as connection:
        connection.execute(sa.update(tables.custom_model).values(status="Creating"))
    with pytest.raises(
        ValidationException, match=r"parent is Creating\. Only a model that is Active"
    ):
        create(context, baseModelIdentifier="parent")


# --- lineage --------------------------------------------------------------------------------------


def test_models_are_listed_by_their_direct_base_and_by_the_model_at_their_root(
    context: Context, publish: Callable[..., NewCustomModel]
) -> None:
    parent = publish("parent")
    child = publish("child", base_model_arn=parent.arn)
    publish("grandchild", base_model_arn=child.arn)
    caller = context("ListCustomModels")

    def listed(**filters: str) -> set[str]:
        found = custom_models.list_(caller, filters)["modelSummaries"]
        return {item["modelName"] for item in found}

    plain = f"arn:aws:bedrock:{REGION}::foundation-model/{TITAN}"
    named = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/parent"
    assert listed(baseModelArnEquals=parent.arn) == listed(baseModelArnEquals=named) == {"child"}
    assert listed(baseModelArnEquals=child.arn) == {"grandchild"}
    assert listed(baseModelArnEquals=BASE_ARN) == listed(baseModelArnEquals=plain) == {"parent"}
    every = {"parent", "child", "grandchild"}
    assert listed(foundationModelArnEquals=BASE_ARN) == every
    assert listed(foundationModelArnEquals=plain) == every
    assert listed(foundationModelArnEquals=plain + "x") == set()
    custom_models.delete(context("DeleteCustomModel"), {"modelIdentifier": "parent"})
    assert listed(baseModelArnEquals=parent.arn) == {"child"}, "deleting it changes no child"
    found = custom_models.get(context("GetCustomModel"), {"modelIdentifier": "child"})
    assert found["baseModelArn"] == parent.arn


# --- training on invocation logs ------------------------------------------------------------------


def logs(source: str = f"s3://{BUCKET}/logs", **more: Any) -> dict[str, Any]:
    config = {"usePromptResponse": True, "invocationLogSource": {"s3Uri": source}, **more}
    return {"invocationLogsConfig": config}


def test_a_job_can_train_on_invocation_logs_and_shows_that(
    services: Services, context: Context
) -> None:
    services.objects.write(S3Uri(BUCKET, "logs/AWSLogs/a.json.gz"), b"x")
    config = logs(requestMetadataFilters={"equals": {"team": "red"}})
    made = create(context, trainingDataConfig=config)
    assert made["trainingDataConfig"] == config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (logs(f"s3://{BUCKET}/empty"), "There are no invocation logs at"),
        (logs("s3://gone/logs"), "There are no invocation logs at"),
        (logs(usePromptResponse=False), "usePromptResponse must be true"),
        (logs(requestMetadataFilters={"equals": {}}), "requestMetadataFilters"),
        ({**logs(), "s3Uri": f"s3://{BUCKET}/train.jsonl"}, "must name the training data once"),
        ({}, "must name the training data once"),
    ],
)
def test_logs_that_cannot_be_trained_on_are_refused_at_once(
    context: Context, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationException, match=said):
        create(context, trainingDataConfig=config)


def test_logs_are_no_documents(context: Context) -> None:
    with pytest.raises(ValidationException, match="is for FINE_TUNING here"):
        create(context, trainingDataConfig=logs(), customizationType="CONTINUED_PRE_TRAINING")
