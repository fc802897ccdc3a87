"""Imported models and models that are being made: published with their job's end, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_job,
    new_model,
    new_throughput,
)

from outcrop.errors import ConflictException, ServiceQuotaExceededException
from outcrop.ids import imported_key, imported_model_arn, imported_path, new_id
from outcrop.store import imported_models, jobs, models, publication, tags, throughputs
from outcrop.store.database import transaction
from outcrop.store.rows import COPY, CREATION, IMPORT, ImportedModel, Job, NewImportedModel

SCOPE = (ACCOUNT, REGION)


def new_imported(name: str, account: str = ACCOUNT, **fields: Any) -> NewImportedModel:
    model_id = new_id()
    values: dict[str, Any] = {
        "arn": imported_model_arn(REGION, account, model_id),
        "job_arn": "arn",
        "job_name": "job",
        "weights": imported_key(model_id, 1),
        "architecture": "LlamaForCausalLM",
        "instruct": True,
        "spec": {},
        "digest": "0" * 64,
        "num_bytes": 7,
        **fields,
    }
    return NewImportedModel(id=model_id, account=account, region=REGION, name=name, **values)


def publish(engine: Engine, name: str, **fields: Any) -> ImportedModel:
    with transaction(engine) as connection:
        imported_models.insert_imported_model(connection, new_imported(name, **fields))
        found = imported_models.get_imported_model(connection, *SCOPE, name)
    assert found is not None
    return found


def held(engine: Engine, kind: str, name: str = "mine", **fields: Any) -> Job:
    new = new_job(f"job-{name}", kind=kind, model_name=name, **fields)
    with transaction(engine) as connection:
        return claimed(connection, jobs.create_job(connection, new))


def test_an_imported_model_is_found_and_listed_in_its_account_and_region(engine: Engine) -> None:
    model = publish(engine, "mine", tags={"team": "a"})
    with engine.connect() as connection:
        assert imported_models.get_imported_model(connection, *SCOPE, model.arn) == model
        assert imported_models.get_imported_model(connection, OTHER_ACCOUNT, REGION, "mine") is None
        assert imported_models.get_imported_model(connection, ACCOUNT, "eu-west-1", "mine") is None
        assert imported_models.list_imported_models(connection, *SCOPE).items == [model]
        assert tags.list_tags(connection, *SCOPE, model.arn) == {"team": "a"}


def test_an_imported_model_in_use_is_not_deleted(engine: Engine) -> None:
    model = publish(engine, "mine")
    with transaction(engine) as connection:
        throughputs.create_throughput(
            connection,
            new_throughput("pt", model.arn),
            max_throughputs=2,
            max_model_units=1,
            machine_model_units=9,
        )
        with pytest.raises(ConflictException, match=r"imported model mine is in use by .* pt"):
            imported_models.delete_imported_model(connection, model)


def test_a_deleted_imported_model_leaves_no_tags_but_what_needs_its_weights_does(
    engine: Engine,
) -> None:
    model = publish(engine, "mine", tags={"team": "a"})
    path = imported_path(model.weights)
    with transaction(engine) as connection:
        assert path in models.artifact_paths(connection)
        child = new_model("child", spec={"weights": model.weights})
        models.insert_model(connection, child)
        imported_models.delete_imported_model(connection, model)
        assert imported_models.get_imported_model(connection, *SCOPE, "mine") is None
        assert tags.list_tags(connection, *SCOPE, model.arn) == {}
        assert path in models.artifact_paths(connection)
        found = models.get_model(connection, *SCOPE, "child")
        assert found is not None
        models.delete_model(connection, found)
        assert path not in models.artifact_paths(connection)


def test_names_of_imported_and_custom_models_are_one(engine: Engine) -> None:
    publish(engine, "mine")
    with transaction(engine) as connection, pytest.raises(ConflictException, match="in use"):
        jobs.create_job(connection, new_job("job", model_name="mine"))


def test_the_quota_counts_imports_under_way(engine: Engine) -> None:
    publish(engine, "one")
    with engine.connect() as connection:
        imported_models.check_quota(connection, *SCOPE, 2)
    held(engine, IMPORT, "two")
    with (
        engine.connect() as connection,
        pytest.raises(ServiceQuotaExceededException, match="2 imported models"),
    ):
        imported_models.check_quota(connection, *SCOPE, 2)


def test_an_import_ends_with_its_model_and_an_old_fence_with_none(engine: Engine) -> None:
    job = held(engine, IMPORT)
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "lost")
        now = claimed(connection, job)
        model = new_imported("mine")
        assert not publication.complete_import(connection, job, result={}, model=model)
        assert imported_models.get_imported_model(connection, *SCOPE, "mine") is None
        assert publication.complete_import(connection, now, result={}, model=model)
        assert imported_models.get_imported_model(connection, *SCOPE, "mine") is not None


def creating(engine: Engine) -> Job:
    job = held(engine, CREATION)
    with transaction(engine) as connection:
        models.insert_model(connection, new_model("mine"), creation_job_id=job.id)
    return job


def test_a_model_that_is_creating_is_found_but_not_used_nor_deleted(engine: Engine) -> None:
    creating(engine)
    with transaction(engine) as connection:
        assert models.get_model(connection, *SCOPE, "mine") is None
        found = models.find_model(connection, *SCOPE, "mine")
        assert found is not None
        assert (found.status, found.is_own_base) == ("Creating", False)
        with pytest.raises(ConflictException, match="mine is Creating"):
            models.delete_model(connection, found)


def test_a_model_becomes_active_with_the_end_of_its_job(engine: Engine) -> None:
    job = creating(engine)
    values = {"artifact_path": imported_path(imported_key(new_id(), 1))}
    with transaction(engine) as connection:
        jobs.requeue(connection, job.id, job.fence, "lost")
        now = claimed(connection, job)
        assert not publication.complete_creation(connection, job, result={}, values=values)
        assert models.get_model(connection, *SCOPE, "mine") is None
        assert publication.complete_creation(connection, now, result={}, values=values)
        found = models.get_model(connection, *SCOPE, "mine")
    assert found is not None
    assert found.is_own_base


def test_a_model_fails_with_its_job(engine: Engine) -> None:
    job = creating(engine)
    with transaction(engine) as connection:
        assert jobs.fail_job(connection, job.id, job.fence, "no weights")
        found = models.find_model(connection, *SCOPE, "mine")
        assert found is not None
        assert (found.status, found.failure_message) == ("Failed", "no weights")
        models.delete_model(connection, found)


def test_copies_are_listed_by_what_they_copy(engine: Engine) -> None:
    spec = {"sourceModelArn": "arn:one", "sourceAccountId": ACCOUNT}
    job = held(engine, COPY, "target-one", spec=spec)
    held(engine, COPY, "target-two", spec={**spec, "sourceModelArn": "arn:two"})

    def listed(**filters: Any) -> list[str]:
        with engine.connect() as connection:
            return [one.id for one in jobs.list_jobs(connection, *SCOPE, COPY, **filters).items]

    assert listed(spec_equals={"sourceModelArn": "arn:one", "sourceAccountId": None}) == [job.id]
    assert listed(model_name_contains="-one") == [job.id]
    assert len(listed(model_name_contains="target")) == 2
    assert listed(spec_equals={"sourceAccountId": "other"}) == []
