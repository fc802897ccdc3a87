"""A throughput's commitment, its move to another model, and what stands in their way."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, REGION, new_model, new_throughput

from outcrop.errors import ConflictException, ValidationException
from outcrop.store import models, readiness, throughputs
from outcrop.store.database import transaction
from outcrop.store.rows import ProvisionedModel

SCOPE = (ACCOUNT, REGION)
OLD, NEW = "arn:old", "arn:new"


def buy(engine: Engine, name: str = "pt", **fields: Any) -> ProvisionedModel:
    """A throughput of the model OLD that is in service."""
    now = fields.pop("now", None)
    with transaction(engine) as connection:
        throughputs.create_throughput(
            *(connection, new_throughput(name, OLD, **fields)),
            max_throughputs=9,
            max_model_units=9,
            machine_model_units=9,
            now=now,
        )
        throughputs.mark_in_service(connection, "tiny")
    return there(engine, name, fields.get("account", ACCOUNT))


def there(engine: Engine, name: str = "pt", account: str = ACCOUNT) -> ProvisionedModel:
    with engine.connect() as connection:
        found = throughputs.get_throughput(connection, account, REGION, name)
    assert found is not None
    return found


def desire(engine: Engine, found: ProvisionedModel, weights: str = "large") -> None:
    with transaction(engine) as connection:
        throughputs.desire_model(connection, found, NEW, weights)


# --- commitment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bought", "commitment", "number", "ends"),
    [
        ("2026-01-15", "OneMonth", 1, "2026-02-15"),
        ("2026-01-31", "OneMonth", 1, "2026-02-28"),
        ("2028-01-31", "OneMonth", 1, "2028-02-29"),
        ("2026-01-31", "OneMonth", 2, "2026-03-31"),
        ("2026-12-31", "OneMonth", 1, "2027-01-31"),
        ("2026-08-31", "SixMonths", 1, "2027-02-28"),
        ("2026-08-31", "SixMonths", 2, "2027-08-31"),
    ],
)
def test_a_term_is_of_calendar_months_in_utc(
    bought: str, commitment: str, number: int, ends: str
) -> None:
    start = datetime.fromisoformat(f"{bought}T13:05:07Z")
    wanted = datetime.fromisoformat(f"{ends}T13:05:07Z")
    assert throughputs.term_end(start, commitment, number) == wanted
    elsewhere = start.astimezone(timezone(timedelta(hours=14)))
    assert throughputs.term_end(elsewhere, commitment, number) == wanted


def test_a_committed_throughput_is_kept_for_its_first_term_and_then_renews_until_deleted(
    engine: Engine,
) -> None:
    bought = datetime(2026, 1, 31, 12, tzinfo=UTC)
    made = buy(engine, commitment="OneMonth", now=bought)
    first, second = (datetime(2026, 2, 28, 12, tzinfo=UTC), datetime(2026, 3, 31, 12, tzinfo=UTC))
    assert made.commitment_expires_at == first
    instant = timedelta(microseconds=1)
    assert throughputs.current_term_end(made, first - instant) == first
    assert throughputs.current_term_end(made, first) == second
    assert throughputs.current_term_end(made, second - instant) == second
    with (
        pytest.raises(ConflictException, match="OneMonth until 2026-02-28T12:00:00Z"),
        transaction(engine) as connection,
    ):
        throughputs.delete_throughput(connection, made, now=first - instant)
    with transaction(engine) as connection:
        throughputs.delete_throughput(connection, made, now=first)
        assert throughputs.get_throughput(connection, *SCOPE, "pt") is None


def test_without_commitment_there_is_no_term(engine: Engine) -> None:
    made = buy(engine)
    assert made.commitment_expires_at is None
    assert throughputs.current_term_end(made, datetime.now(UTC)) is None


# --- updates -------------------------------------------------------------------------------------


def test_the_old_model_stays_until_the_new_ones_server_is_up(engine: Engine) -> None:
    desire(engine, buy(engine))
    found = there(engine)
    assert (found.status, found.model_arn, found.weights) == ("Updating", OLD, "tiny")
    assert (found.desired_model_arn, found.desired_weights) == (NEW, "large")
    with transaction(engine) as connection:
        assert readiness.awaited_weights(connection) == {"large"}
        assert readiness.weights_are_served(connection, "tiny") == 0
        assert readiness.weights_are_served(connection, "large") == 1
    found = there(engine)
    assert (found.status, found.model_arn, found.weights) == ("InService", NEW, "large")
    assert (found.desired_model_arn, found.desired_weights) == (NEW, "large")


def test_a_server_that_does_not_start_leaves_the_old_model_in_service(engine: Engine) -> None:
    desire(engine, buy(engine))
    with transaction(engine) as connection:
        assert readiness.weights_failed(connection, "large", "no memory") == 1
    found = there(engine)
    assert (found.status, found.model_arn, found.desired_model_arn) == ("InService", OLD, OLD)
    assert (found.weights, found.desired_weights) == ("tiny", "tiny")
    assert found.failure_message == throughputs.UPDATE_FAILED
    desire(engine, found)
    assert there(engine).failure_message is None, "the next try is told by itself"


def test_while_one_is_updating_it_is_neither_updated_nor_deleted(engine: Engine) -> None:
    desire(engine, buy(engine))
    found = there(engine)
    with pytest.raises(ValidationException, match="is Updating and cannot be updated"):
        desire(engine, found)
    with (
        pytest.raises(ValidationException, match="is Updating and cannot be updated"),
        transaction(engine) as connection,
    ):
        throughputs.rename_throughput(connection, found, "other")
    with (
        pytest.raises(ConflictException, match="is Updating and cannot be deleted"),
        transaction(engine) as connection,
    ):
        throughputs.delete_throughput(connection, found, now=datetime.now(UTC))


def test_a_new_name_is_free_in_the_account_or_refused(engine: Engine) -> None:
    made = buy(engine)
    buy(engine, "taken")
    buy(engine, "elsewhere", account=OTHER_ACCOUNT)
    with (
        pytest.raises(ValidationException, match="name is currently in use"),
        transaction(engine) as connection,
    ):
        throughputs.rename_throughput(connection, made, "taken")
    with transaction(engine) as connection:
        throughputs.rename_throughput(connection, made, "pt")  # its own
        throughputs.rename_throughput(connection, made, "elsewhere")
    assert there(engine, "elsewhere").arn == made.arn
    with engine.connect() as connection:
        assert throughputs.get_throughput(connection, *SCOPE, "pt") is None


def test_a_model_that_a_throughput_leaves_or_moves_to_is_not_deleted(engine: Engine) -> None:
    with transaction(engine) as connection:
        for name, arn in (("old", OLD), ("new", NEW)):
            models.insert_model(connection, new_model(name, arn=arn))

    def delete(name: str) -> None:
        with transaction(engine) as connection:
            found = models.get_model(connection, *SCOPE, name)
            assert found is not None
            models.delete_model(connection, found)

    desire(engine, buy(engine))
    for name in ("old", "new"):
        with pytest.raises(
            ConflictException, match=f"{name} is in use by provisioned throughput pt"
        ):
            delete(name)
    with transaction(engine) as connection:
        readiness.weights_are_served(connection, "large")
    delete("old")
