"""Deployments and inference profiles: made, moved, listed, refused, deleted with all they had."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import (
    ACCOUNT,
    OTHER_ACCOUNT,
    REGION,
    new_deployment,
    new_model,
    new_profile,
)

from outcrop.errors import (
    ConflictException,
    ServiceQuotaExceededException,
    ValidationException,
)
from outcrop.store import deployments, models, policies, profiles, readiness, tags
from outcrop.store.database import transaction
from outcrop.store.rows_endpoints import Deployment, InferenceProfile
from outcrop.store.tokens import request_token

SCOPE = (ACCOUNT, REGION)
OLD, NEW = "arn:old", "arn:new"
TOKEN = request_token(*SCOPE, "Create", {"clientRequestToken": "t"})


def deploy(engine: Engine, name: str = "d", *, active: bool = True, **fields: Any) -> Deployment:
    """A deployment of the model OLD."""
    with transaction(engine) as connection:
        deployments.create_deployment(
            connection, new_deployment(name, OLD, **fields), max_deployments=9
        )
        if active:
            deployments.mark_active(connection, "tiny")
    return there(engine, name, fields.get("account", ACCOUNT))


def there(engine: Engine, name: str = "d", account: str = ACCOUNT) -> Deployment:
    with engine.connect() as connection:
        found = deployments.get_deployment(connection, account, REGION, name)
    assert found is not None
    return found


def update(engine: Engine, found: Deployment, weights: str = "large") -> None:
    with transaction(engine) as connection:
        deployments.update_deployment(connection, found, NEW, weights)


def test_a_deployment_is_active_once_its_server_was_up(engine: Engine) -> None:
    made = deploy(engine, active=False)
    assert (made.status, made.update_status) == ("Creating", None)
    with transaction(engine) as connection:
        assert readiness.awaited_weights(connection) == {"tiny"}
        assert readiness.weights_are_served(connection, "large") == 0
        assert readiness.weights_are_served(connection, "tiny") == 1
        assert readiness.awaited_weights(connection) == set()
    assert there(engine).status == "Active"
    assert there(engine).last_updated_at > made.created_at


def test_a_deployment_whose_server_does_not_start_has_failed_and_says_why(engine: Engine) -> None:
    deploy(engine, active=False)
    with transaction(engine) as connection:
        assert readiness.weights_failed(connection, "tiny", "no memory") == 1
    failed = there(engine)
    assert (failed.status, failed.failure_message) == ("Failed", "no memory")
    with pytest.raises(ValidationException, match="has failed and cannot be updated"):
        update(engine, failed)
    with transaction(engine) as connection:
        deployments.delete_deployment(connection, failed)


def test_a_deployments_old_model_answers_until_the_new_ones_server_is_up(engine: Engine) -> None:
    update(engine, deploy(engine))
    moving = there(engine)
    assert (moving.status, moving.model_arn, moving.weights) == ("Active", OLD, "tiny")
    assert (moving.update_status, moving.update_model_arn) == ("Updating", NEW)
    with transaction(engine) as connection:
        assert readiness.awaited_weights(connection) == {"large"}
        assert readiness.weights_are_served(connection, "large") == 1
    moved = there(engine)
    assert (moved.status, moved.model_arn, moved.weights) == ("Active", NEW, "large")
    assert (moved.update_status, moved.update_model_arn) == ("UpdateCompleted", NEW)


def test_an_update_that_fails_leaves_the_old_model_and_can_be_tried_again(engine: Engine) -> None:
    update(engine, deploy(engine))
    with transaction(engine) as connection:
        assert readiness.weights_failed(connection, "large", "no memory") == 1
    failed = there(engine)
    assert (failed.status, failed.model_arn, failed.weights) == ("Active", OLD, "tiny")
    assert (failed.update_status, failed.failure_message) == ("UpdateFailed", "no memory")
    update(engine, failed)
    again = there(engine)
    assert (again.update_status, again.failure_message) == ("Updating", None)


@pytest.mark.parametrize("updating", [False, True])
def test_what_is_created_or_updated_is_in_a_mutating_state(engine: Engine, updating: bool) -> None:
    found = deploy(engine, active=updating)
    if updating:
        update(engine, found)
    with pytest.raises(ValidationException, match=r"^Custom model deployment is in a mutating s"):
        update(engine, there(engine))
    with (
        pytest.raises(ValidationException, match=r"^Custom model deployment is in a mutating s"),
        transaction(engine) as connection,
    ):
        deployments.delete_deployment(connection, there(engine))


def test_a_model_in_use_by_deployments_is_not_deleted_and_they_are_named(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name, arn in (("old", OLD), ("new", NEW)):
            models.insert_model(connection, new_model(name, arn=arn))

    def delete(name: str) -> None:
        with transaction(engine) as connection:
            model = models.get_model(connection, *SCOPE, name)
            assert model is not None
            models.delete_model(connection, model)

    deploy(engine, "b")
    update(engine, deploy(engine, "a"))
    with pytest.raises(
        ConflictException, match=r"old is in use by .* deployment a, .* deployment b\. "
    ):
        delete("old")
    with pytest.raises(ConflictException, match=r"new is in use by .* deployment a\. Delete"):
        delete("new")
    with transaction(engine) as connection:
        readiness.weights_failed(connection, "large", "no memory")
    delete("new")


def test_a_deployments_name_is_unique_in_its_account_and_their_number_is_bounded(
    engine: Engine,
) -> None:
    deploy(engine, "a")
    deploy(engine, "a", account=OTHER_ACCOUNT)
    with pytest.raises(ValidationException, match="name is currently in use"):
        deploy(engine, "a")
    says = r"has 1 custom model deployments; 1 are .*max_model_deployments"
    with (
        pytest.raises(ServiceQuotaExceededException, match=says),
        transaction(engine) as connection,
    ):
        deployments.create_deployment(connection, new_deployment("b", OLD), max_deployments=1)


def test_a_deployment_is_found_by_arn_name_and_id_and_listed_by_status_and_model(
    engine: Engine,
) -> None:
    made = deploy(engine, "a")
    deploy(engine, "b", active=False)
    with engine.connect() as connection:
        for identifier in (made.arn, "a", made.id):
            assert deployments.get_deployment(connection, *SCOPE, identifier) == made
            assert deployments.get_deployment(connection, OTHER_ACCOUNT, REGION, identifier) is None

        def listed(**filters: Any) -> list[str]:
            page = deployments.list_deployments(connection, *SCOPE, ascending=True, **filters)
            return [item.name for item in page.items]

        assert listed() == ["a", "b"]
        assert listed(status="Active") == ["a"]
        assert listed(status="Creating") == ["b"]
        assert listed(model_arn=OLD) == ["a", "b"]
        assert listed(model_arn=NEW) == []
        assert listed(name_contains="b") == ["b"]


def test_a_repeated_token_makes_one_deployment_and_none_after_it_was_deleted(
    engine: Engine,
) -> None:
    with transaction(engine) as connection:
        first, again = (
            deployments.create_deployment(
                connection, new_deployment("d", OLD), token=TOKEN, max_deployments=1
            )
            for _ in range(2)
        )
        assert again == first
        deployments.mark_active(connection, "tiny")
        tags.put_tags(connection, *SCOPE, first.arn, {"k": "v"})
        policies.put_policy(connection, *SCOPE, first.arn, "{}")
        deployments.delete_deployment(connection, first)
        assert tags.list_tags(connection, *SCOPE, first.arn) == {}
        assert policies.get_policy(connection, *SCOPE, first.arn) is None
    with pytest.raises(ConflictException, match="was deleted"), transaction(engine) as connection:
        deployments.create_deployment(
            connection, new_deployment("d", OLD), token=TOKEN, max_deployments=1
        )


# --- inference profiles --------------------------------------------------------------------------


def make_profile(engine: Engine, name: str = "p", **options: Any) -> InferenceProfile:
    with transaction(engine) as connection:
        return profiles.create_profile(
            connection, new_profile(name), **{"max_profiles": 9, **options}
        )


def test_a_profile_is_found_by_arn_and_id_not_by_its_name_which_others_may_have(
    engine: Engine,
) -> None:
    first, second = make_profile(engine), make_profile(engine)
    with engine.connect() as connection:
        for made in (first, second):
            for identifier in (made.arn, made.id):
                assert profiles.get_profile(connection, *SCOPE, identifier) == made
        assert profiles.get_profile(connection, *SCOPE, "p") is None
        assert profiles.get_profile(connection, OTHER_ACCOUNT, REGION, first.arn) is None
        page = profiles.list_profiles(connection, *SCOPE, limit=1)
        assert [item.id for item in page.items] == [second.id]
        page = profiles.list_profiles(connection, *SCOPE, limit=1, after=page.next)
        assert [item.id for item in page.items] == [first.id]


def test_profiles_are_bounded_and_a_repeated_token_makes_one(engine: Engine) -> None:
    first = make_profile(engine, token=TOKEN, max_profiles=1)
    assert make_profile(engine, token=TOKEN, max_profiles=1) == first
    says = r"has 1 application inference profiles; 1 are .*max_inference_profiles"
    with pytest.raises(ServiceQuotaExceededException, match=says):
        make_profile(engine, max_profiles=1)
    with transaction(engine) as connection:
        tags.put_tags(connection, *SCOPE, first.arn, {"k": "v"})
        policies.put_policy(connection, *SCOPE, first.arn, "{}")
        profiles.delete_profile(connection, first)
        assert tags.list_tags(connection, *SCOPE, first.arn) == {}
        assert policies.get_policy(connection, *SCOPE, first.arn) is None
    with pytest.raises(ConflictException, match="was deleted"):
        make_profile(engine, token=TOKEN)


def test_a_policy_is_kept_to_the_character_replaced_and_removed(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert policies.get_policy(connection, *SCOPE, "arn:x") is None
        assert not policies.remove_policy(connection, *SCOPE, "arn:x")
        policies.put_policy(connection, *SCOPE, "arn:x", " {}\n")
        policies.put_policy(connection, OTHER_ACCOUNT, REGION, "arn:x", "other")
        assert policies.get_policy(connection, *SCOPE, "arn:x") == " {}\n"
        policies.put_policy(connection, *SCOPE, "arn:x", "{}")
        assert policies.get_policy(connection, *SCOPE, "arn:x") == "{}"
        assert policies.remove_policy(connection, *SCOPE, "arn:x")
        assert policies.get_policy(connection, OTHER_ACCOUNT, REGION, "arn:x") == "other"
