"""Rows of before deployments: counted usage and bought throughputs are what they were."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from tests.unit.store.build import ACCOUNT, BASE_ARN, REGION, new_throughput

from outcrop.store import throughputs
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.migrations import MIGRATIONS, m0007_endpoints
from outcrop.store.rows import TokenUsage, UsageKey
from outcrop.store.tables import to_microseconds
from outcrop.store.usage import add_usage, list_usage

HOUR = datetime(2026, 3, 1, 12, tzinfo=UTC)


def test_usage_and_throughputs_of_an_older_database_are_kept(url: str) -> None:
    engine = connect(url)
    migrate(engine, migrations=MIGRATIONS[: MIGRATIONS.index(m0007_endpoints.apply)])
    bought = new_throughput("pt", weights="tiny")
    instant = to_microseconds(HOUR)
    with transaction(engine) as connection:
        connection.execute(
            sa.text(
                "INSERT INTO token_usage (account, region, model_arn, throughput_arn, hour, "
                "requests, input_tokens, output_tokens) VALUES (:a, :r, 'm', 't', :h, 1, 2, 3)"
            ),
            {"a": ACCOUNT, "r": REGION, "h": instant},
        )
        connection.execute(
            sa.text(
                "INSERT INTO throughput (id, account, region, arn, name, weights, model_arn, "
                "desired_model_arn, foundation_model_arn, model_units, desired_model_units, status,"
                " created_at, last_modified_at) VALUES (:id, :a, :r, :arn, 'pt', 'tiny', :m, :m, "
                ":m, 1, 1, 'InService', :h, :h)"
            ),
            {"id": bought.id, "a": ACCOUNT, "r": REGION, "arn": bought.arn, "m": BASE_ARN}
            | {"h": instant},
        )
    migrate(engine)
    key = UsageKey(ACCOUNT, REGION, "m", "t", HOUR)
    with transaction(engine) as connection:
        add_usage(connection, {key: TokenUsage(1, 1, 1)})
        found = list_usage(connection, ACCOUNT, REGION, since=HOUR, until=datetime.now(UTC))
        kept = throughputs.get_throughput(connection, ACCOUNT, REGION, "pt")
        assert throughputs.awaited_weights(connection) == set()
    assert found == {key: TokenUsage(2, 3, 4)}
    assert kept is not None
    assert (kept.weights, kept.desired_weights, kept.status) == ("tiny", "tiny", "InService")
    engine.dispose()
