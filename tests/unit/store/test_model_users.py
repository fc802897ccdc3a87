"""Who uses a custom model, as a refusal names them."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    claimed,
    new_job,
    new_model,
    new_task,
)

from outcrop.errors import ConflictException
from outcrop.store import jobs, models
from outcrop.store.database import transaction
from outcrop.store.model_users import LIMIT_NAMED, users_of
from outcrop.store.rows import BATCH, CustomModel


def publish(engine: Engine, name: str, account: str = ACCOUNT) -> CustomModel:
    with transaction(engine) as connection:
        models.insert_model(connection, new_model(name, account))
        model = models.get_model(connection, account, REGION, name)
    assert model is not None
    return model


def test_jobs_of_every_kind_are_users_until_they_have_ended(engine: Engine) -> None:
    model = publish(engine, "mine")
    uses = {"uses_model_arn": model.arn}
    with transaction(engine) as connection:
        assert users_of(connection, model) == []
        made = [
            jobs.create_job(connection, new_job("train", **uses)),
            jobs.create_job(connection, new_task("task", **uses)),
            jobs.create_job(connection, new_job("ask", kind=BATCH, model_name=None, **uses)),
        ]
        jobs.create_job(connection, new_job("other", uses_model_arn="arn:another"))
        jobs.create_job(connection, new_job("theirs", OTHER_ACCOUNT, **uses))
        assert users_of(connection, model) == [
            "batch inference job ask",
            "model customization job train",
            "data task task",
        ]
        for job in made:
            held = claimed(connection, job)
            jobs.request_stop(connection, job.id)
            assert any(job.name in user for user in users_of(connection, model)), "it is stopping"
            jobs.end_stopped(connection, job.id, held.fence)
        assert users_of(connection, model) == []
        models.delete_model(connection, model)


def test_many_users_are_named_in_part_and_counted(engine: Engine) -> None:
    model = publish(engine, "mine")
    with transaction(engine) as connection:
        for number in range(LIMIT_NAMED + 2):
            jobs.create_job(connection, new_job(f"j{number}", uses_model_arn=model.arn))
        with pytest.raises(ConflictException) as refused:
            models.delete_model(connection, model)
    assert "model customization job j4, 2 more of the kind model customization job." in str(
        refused.value
    )


def test_what_a_job_works_with_is_no_garbage_while_it_has_not_ended(engine: Engine) -> None:
    with transaction(engine) as connection:
        spec = {"artifactPath": "models/custom/m/1"}
        job = jobs.create_job(connection, new_job("ask", kind=BATCH, model_name=None, spec=spec))
        assert models.artifact_paths(connection) == {"models/custom/m/1"}
        jobs.request_stop(connection, job.id)
        assert models.artifact_paths(connection) == set()
