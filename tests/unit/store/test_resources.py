"""Custom models, throughputs, tags, model servers: made, listed, used, refused, deleted."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import (
    ACCOUNT,
    BASE_ARN,
    OTHER_ACCOUNT,
    REGION,
    new_model,
    new_throughput,
    queued,
)

from outcrop.errors import (
    ConflictException,
    ServiceQuotaExceededException,
    TooManyTagsException,
    ValidationException,
)
from outcrop.ids import new_id
from outcrop.store import models, servers, tags, throughputs
from outcrop.store.database import transaction
from outcrop.store.rows import CustomModel
from outcrop.store.tokens import request_token

QUOTAS: dict[str, Any] = {
    "max_throughputs": 2,
    "max_model_units": 1,
    "machine_model_units": 9,
}
SCOPE = (ACCOUNT, REGION)


def publish(engine: Engine, name: str, account: str = ACCOUNT, **fields: Any) -> CustomModel:
    new = new_model(name, account, **fields)
    with transaction(engine) as connection:
        models.insert_model(connection, new)
        model = models.get_model(connection, account, REGION, new.arn)
    assert model is not None
    return model


def test_model_is_found_by_arn_by_name_and_by_the_arn_that_examples_write(engine: Engine) -> None:
    model = publish(engine, "mine")
    by_name = f"arn:aws:bedrock:{REGION}:{ACCOUNT}:custom-model/mine"
    with engine.connect() as connection:
        for identifier in (model.arn, "mine", by_name):
            assert models.get_model(connection, *SCOPE, identifier) == model
        for identifier in (
            "other",
            by_name.replace(ACCOUNT, OTHER_ACCOUNT),
            by_name.replace(REGION, "eu-west-1"),
            by_name.replace("custom-model", "provisioned-model"),
        ):
            assert models.get_model(connection, *SCOPE, identifier) is None
        assert models.get_model(connection, OTHER_ACCOUNT, REGION, model.arn) is None


def test_used_model_is_not_deleted_and_its_users_are_named(engine: Engine) -> None:
    model = publish(engine, "mine")
    with transaction(engine) as connection:
        for name in ("pt-b", "pt-a"):
            throughputs.create_throughput(connection, new_throughput(name, model.arn), **QUOTAS)
    with (
        pytest.raises(
            ConflictException,
            match=r"mine is in use by provisioned throughput pt-a, provisioned throughput pt-b\. ",
        ),
        transaction(engine) as connection,
    ):
        models.delete_model(connection, model)


def test_deleted_model_takes_its_tags_along_and_frees_its_name(engine: Engine) -> None:
    model = publish(engine, "mine", tags={"a": "1"})
    with transaction(engine) as connection:
        assert models.artifact_paths(connection) == {model.artifact_path}
        models.delete_model(connection, model)
        assert tags.list_tags(connection, *SCOPE, model.arn) == {}
        assert models.artifact_paths(connection) == set()
        assert queued(connection, "again", model_name="mine").status == "queued"


def test_models_are_listed_by_parent_root_and_status(engine: Engine) -> None:
    child = publish(engine, "child", base_model_arn="arn:parent")
    root = publish(engine, "root")
    with engine.connect() as connection:

        def listed(**filters: Any) -> list[str]:
            page = models.list_models(connection, *SCOPE, ascending=True, **filters)
            return [model.name for model in page.items]

        assert listed() == ["child", "root"]
        assert listed(base_model_arn="arn:parent") == [child.name]
        assert listed(base_model_arn=BASE_ARN) == [root.name]
        assert listed(foundation_model_arn=BASE_ARN) == ["child", "root"]
        assert listed(status="Active") == ["child", "root"]
        assert listed(status="Failed") == []
        assert models.count_models(connection, *SCOPE) == 2


def test_throughput_quotas_name_number_limit_and_setting(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name in ("a", "b"):
            throughputs.create_throughput(connection, new_throughput(name), **QUOTAS)
        # A commitment does not count towards those without.
        throughputs.create_throughput(
            connection, new_throughput("c", commitment="OneMonth"), **QUOTAS
        )
    for new, text in (
        (new_throughput("d"), r"has 2 .* without commitment; 2 are .*max_provisioned_models"),
        (new_throughput("d", model_units=3), r"modelUnits is 3; 1 are .*max_model_units"),
    ):
        with (
            pytest.raises(ServiceQuotaExceededException, match=text),
            transaction(engine) as connection,
        ):
            throughputs.create_throughput(connection, new, **QUOTAS)


def test_a_purchase_beyond_the_machines_units_is_refused_whosever_they_are(
    engine: Engine,
) -> None:
    quotas: dict[str, Any] = {
        "max_throughputs": 5,
        "max_model_units": 5,
        "machine_model_units": 3,
    }

    def buy(name: str, units: int, account: str = ACCOUNT, **fields: Any) -> None:
        with transaction(engine) as connection:
            new = new_throughput(name, account=account, model_units=units, **fields)
            throughputs.create_throughput(connection, new, **quotas)

    buy("failed", 3)
    with transaction(engine) as connection:
        throughputs.mark_failed(connection, "tiny", "it did not start")
    buy("a", 2, commitment="OneMonth")
    says = r"modelUnits is 2, .* machine's 3 model units only 1 are left: .* hold 2.*"
    with pytest.raises(ServiceQuotaExceededException, match=says + "machine_model_units"):
        buy("b", 2, OTHER_ACCOUNT, weights="another model")
    buy("b", 1, OTHER_ACCOUNT, weights="another model")
    quotas["machine_model_units"] = 2  # an operator who cuts the machine anew later
    with pytest.raises(ServiceQuotaExceededException, match="only 0 are left"):
        buy("c", 1)
    with transaction(engine) as connection:
        found = throughputs.get_throughput(connection, OTHER_ACCOUNT, REGION, "b")
        assert found is not None
        throughputs.delete_throughput(connection, found, now=datetime.now(UTC))
    quotas["machine_model_units"] = 3
    buy("c", 1)


def test_throughput_name_is_unique_in_its_account(engine: Engine) -> None:
    with transaction(engine) as connection:
        throughputs.create_throughput(connection, new_throughput("a"), **QUOTAS)
        throughputs.create_throughput(
            connection, new_throughput("a", account=OTHER_ACCOUNT), **QUOTAS
        )
    with (
        pytest.raises(ValidationException, match="name is currently in use"),
        transaction(engine) as connection,
    ):
        throughputs.create_throughput(connection, new_throughput("a"), **QUOTAS)


def test_the_machines_units_are_sold_once_to_accounts_that_come_at_once(engine: Engine) -> None:
    barrier = threading.Barrier(6)
    outcomes: list[str] = []

    def buy(number: int) -> None:
        barrier.wait()
        new = new_throughput("t", account=f"{number:012}")
        try:
            with transaction(engine) as connection:
                throughputs.create_throughput(
                    connection, new, **{**QUOTAS, "machine_model_units": 2}
                )
            outcomes.append("made")
        except ServiceQuotaExceededException:
            outcomes.append("refused")

    threads = [threading.Thread(target=buy, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] * 2 + ["refused"] * 4


def test_throughput_quota_holds_against_requests_that_come_at_once(engine: Engine) -> None:
    barrier = threading.Barrier(5)
    outcomes: list[str] = []

    def create(name: str) -> None:
        barrier.wait()
        try:
            with transaction(engine) as connection:
                throughputs.create_throughput(connection, new_throughput(name), **QUOTAS)
            outcomes.append("made")
        except ServiceQuotaExceededException:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(f"pt{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["made"] * 2 + ["refused"] * 3


def test_repeated_token_returns_the_first_throughput_until_that_is_deleted(engine: Engine) -> None:
    token = request_token(*SCOPE, "CreatePT", {"clientRequestToken": "t", "x": 1})
    with transaction(engine) as connection:
        first = throughputs.create_throughput(
            connection, new_throughput("a"), token=token, **QUOTAS
        )
    with transaction(engine) as connection:
        again = throughputs.create_throughput(
            connection, new_throughput("a"), token=token, **QUOTAS
        )
        assert again == first
        throughputs.delete_throughput(connection, first, now=datetime.now(UTC))
    with (
        pytest.raises(ConflictException, match="was deleted"),
        transaction(engine) as connection,
    ):
        throughputs.create_throughput(connection, new_throughput("a"), token=token, **QUOTAS)


def test_request_without_token_has_none() -> None:
    assert request_token(*SCOPE, "CreatePT", {"x": 1}) is None


def test_throughput_is_in_service_once_its_weights_are_served(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name, weights in (("a", "tiny"), ("b", "large")):
            new = new_throughput(name, weights=weights)
            made = throughputs.create_throughput(connection, new, **QUOTAS)
            assert made.status == "Creating"
        assert throughputs.awaited_weights(connection) == {"tiny", "large"}
        assert throughputs.mark_in_service(connection, "tiny") == 1
        assert throughputs.mark_failed(connection, "large", "no memory") == 1
        assert throughputs.mark_failed(connection, "tiny", "too late") == 0
        first = throughputs.get_throughput(connection, *SCOPE, "a")
        second = throughputs.get_throughput(connection, *SCOPE, "b")
        assert first is not None
        assert second is not None
        assert first.status == "InService"
        assert (second.status, second.failure_message) == ("Failed", "no memory")


def test_throughput_is_found_by_arn_name_and_id_and_listed_by_status_and_model(
    engine: Engine,
) -> None:
    with transaction(engine) as connection:
        made = throughputs.create_throughput(connection, new_throughput("a"), **QUOTAS)
        throughputs.create_throughput(connection, new_throughput("b", "arn:other"), **QUOTAS)
        throughputs.mark_in_service(connection, "tiny")
    with engine.connect() as connection:
        for identifier in (made.arn, "a", made.id):
            found = throughputs.get_throughput(connection, *SCOPE, identifier)
            assert found is not None
            assert found.id == made.id
        assert throughputs.get_throughput(connection, OTHER_ACCOUNT, REGION, "a") is None

        def listed(**filters: Any) -> list[str]:
            page = throughputs.list_throughputs(connection, *SCOPE, ascending=True, **filters)
            return [item.name for item in page.items]

        assert listed() == ["a", "b"]
        assert listed(status="InService") == ["a", "b"]
        assert listed(status="Creating") == []
        assert listed(model_arn="arn:other") == ["b"]


def test_committed_throughput_is_deleted_only_after_its_term(engine: Engine) -> None:
    now = datetime.now(UTC)
    new = new_throughput("a", commitment="OneMonth", commitment_expires_at=now + timedelta(days=30))
    with transaction(engine) as connection:
        made = throughputs.create_throughput(connection, new, **QUOTAS)
        tags.put_tags(connection, *SCOPE, made.arn, {"k": "v"})
        with pytest.raises(ConflictException, match="commitment of OneMonth until 2"):
            throughputs.delete_throughput(connection, made, now=now)
        throughputs.delete_throughput(connection, made, now=now + timedelta(days=31))
        assert throughputs.get_throughput(connection, *SCOPE, "a") is None
        assert tags.list_tags(connection, *SCOPE, made.arn) == {}


def test_tags_are_added_replaced_listed_and_removed(engine: Engine) -> None:
    with transaction(engine) as connection:
        tags.put_tags(connection, *SCOPE, "arn:x", {"b": "2", "a": "1"})
        tags.put_tags(connection, *SCOPE, "arn:x", {"b": "3"})
        tags.put_tags(connection, *SCOPE, "arn:x", {})
        tags.put_tags(connection, OTHER_ACCOUNT, REGION, "arn:x", {"c": "4"})
        assert list(tags.list_tags(connection, *SCOPE, "arn:x").items()) == [("a", "1"), ("b", "3")]
        tags.remove_tags(connection, *SCOPE, "arn:x", ["a", "unknown"])
        assert tags.list_tags(connection, *SCOPE, "arn:x") == {"b": "3"}
        assert tags.list_tags(connection, OTHER_ACCOUNT, REGION, "arn:x") == {"c": "4"}


def test_fifty_tags_are_allowed_counting_those_that_are_there(engine: Engine) -> None:
    many = {f"k{number}": "v" for number in range(tags.MAX_TAGS)}
    with transaction(engine) as connection:
        tags.put_tags(connection, *SCOPE, "arn:x", many)
        tags.put_tags(connection, *SCOPE, "arn:x", {"k0": "replaced"})
    with (
        pytest.raises(TooManyTagsException, match="51 tags; 50 are") as refused,
        transaction(engine) as connection,
    ):
        tags.put_tags(connection, *SCOPE, "arn:x", {"one-more": "v"})
    assert refused.value.members == {"resourceName": "arn:x"}
    with engine.connect() as connection:
        assert len(tags.list_tags(connection, *SCOPE, "arn:x")) == tags.MAX_TAGS


def test_model_server_goes_from_wanted_to_ready(engine: Engine) -> None:
    with transaction(engine) as connection:
        assert servers.get(connection, "tiny") is None
        servers.want(connection, "tiny")
        servers.want(connection, "tiny")
        (row,) = servers.list_servers(connection)
        assert row.state == "wanted"
        assert not servers.mark_ready(connection, "tiny", 1)
        assert servers.mark_starting(connection, "tiny", "/run/1.sock")
        assert not servers.mark_starting(connection, "tiny", "/run/2.sock")
        assert servers.mark_ready(connection, "tiny", 42)
        servers.want(connection, "tiny")
        ready = servers.get(connection, "tiny")
        assert ready is not None
        assert (ready.state, ready.address, ready.pid) == ("ready", "/run/1.sock", 42)


def test_failed_model_server_can_be_wanted_again(engine: Engine) -> None:
    with transaction(engine) as connection:
        servers.want(connection, "tiny")
        servers.mark_starting(connection, "tiny", "/run/1.sock")
        assert servers.mark_failed(connection, "tiny", "no memory")
        failed = servers.get(connection, "tiny")
        assert failed is not None
        assert (failed.state, failed.error, failed.address) == ("failed", "no memory", None)
        servers.want(connection, "tiny")
        again = servers.get(connection, "tiny")
        assert again is not None
        assert (again.state, again.error) == ("wanted", None)


def test_model_server_wanted_by_many_at_once_has_one_row(engine: Engine) -> None:
    barrier = threading.Barrier(5)
    failures: list[BaseException] = []

    def want() -> None:
        barrier.wait()
        try:
            with transaction(engine) as connection:
                servers.want(connection, "tiny")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=want) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with engine.connect() as connection:
        assert len(servers.list_servers(connection)) == 1


def test_use_of_a_model_server_is_remembered_and_servers_are_forgotten(engine: Engine) -> None:
    with transaction(engine) as connection:
        for key in ("tiny", "large"):
            servers.want(connection, key)
        before = servers.get(connection, "tiny")
        assert servers.touch(connection, "tiny")
        assert not servers.touch(connection, new_id())
        after = servers.get(connection, "tiny")
        assert before is not None
        assert after is not None
        assert after.last_used_at > before.last_used_at
        assert 0 <= servers.idle_seconds(after) < 60
        servers.remove(connection, "tiny")
        assert [row.key for row in servers.list_servers(connection)] == ["large"]
        servers.forget_all(connection)
        assert servers.list_servers(connection) == []
