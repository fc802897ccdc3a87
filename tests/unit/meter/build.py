"""Rows of the ledger with fixed instants, and the database that they are in."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, REGION

from outcrop.ids import custom_model_arn, foundation_model_arn, provisioned_model_arn
from outcrop.meter.lines import Line, ledger_lines
from outcrop.meter.prices import PriceBook, published_prices
from outcrop.store import ledger, tables, tags
from outcrop.store.database import transaction
from outcrop.store.rows import TokenUsage, UsageKey
from outcrop.store.rows_ledger import Span
from outcrop.store.usage import add_usage

SCOPE = (ACCOUNT, REGION)
EXPRESS, LITE = "amazon.titan-text-express-v1:0:8k", "amazon.titan-text-lite-v1:0:4k"
LLAMA2, LLAMA3 = "meta.llama2-13b-v1:0:4k", "meta.llama3-1-8b-instruct-v1:0"


def at(month: int, day: int, hour: int = 0, minute: int = 0, *, year: int = 2026) -> datetime:
    """An instant of 2026 in UTC."""
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


def arn_of(name: str, kind: str = ledger.STORAGE, model: str = EXPRESS) -> str:
    """The ARN of a resource whose id is made of its name."""
    identifier = name.ljust(12, "0")
    if kind == ledger.STORAGE:
        return custom_model_arn(REGION, ACCOUNT, model, identifier)
    return provisioned_model_arn(REGION, ACCOUNT, identifier)


def there(
    engine: Engine,
    name: str,
    begun: datetime,
    ended: datetime | None = None,
    *,
    kind: str = ledger.STORAGE,
    model: str = EXPRESS,
    units: int = 1,
    commitment: str | None = None,
    billed_until: datetime | None = None,
    tagged: Mapping[str, str] | None = None,
) -> str:
    """A resource that is there from an instant on; returns its ARN."""
    arn = arn_of(name, kind, model)
    root = foundation_model_arn(REGION, model)
    with transaction(engine) as connection:
        ledger.begin_span(connection, Span(*SCOPE, arn, kind, name, root, units, begun, commitment))
        if tagged:
            tags.put_tags(connection, *SCOPE, arn, tagged)
        if ended is not None:
            ledger.end_span(*(connection, *SCOPE, arn, kind), at=ended, billed_until=billed_until)
            tags.remove_tags(connection, *SCOPE, arn)
    return arn


def trained(
    engine: Engine, name: str, tokens: int, ended: datetime, status: str = "completed",
    model: str = EXPRESS,
) -> None:  # fmt: skip
    """A job that ended."""
    row = {
        "account": ACCOUNT, "region": REGION, "job_id": name.ljust(12, "0"), "fence": 1,
        "job_arn": f"arn:aws:bedrock:{REGION}:{ACCOUNT}:model-customization-job/{model}/{name}",
        "job_name": name, "model_arn": foundation_model_arn(REGION, model), "status": status,
        "tokens": tokens, "begun_at": ended, "ended_at": ended,
    }  # fmt: skip
    with transaction(engine) as connection:
        connection.execute(sa.insert(tables.metered_training).values(**row))


def answered(
    engine: Engine,
    model_arn: str,
    hour: datetime,
    input: int,
    output: int,
    through: str = "",
    *,
    endpoint: str = "",
    batch: bool = False,
) -> None:
    """Tokens of one hour."""
    key = UsageKey(*SCOPE, model_arn, through, hour, endpoint_arn=endpoint, batch=batch)
    with transaction(engine) as connection:
        add_usage(connection, {key: TokenUsage(1, input, output)})


def lines(
    engine: Engine,
    since: datetime,
    until: datetime,
    *,
    now: datetime | None = None,
    zone: tzinfo = UTC,
    book: PriceBook | None = None,
    **changes: Any,
) -> list[Line]:
    """The ledger of a time."""
    with engine.connect() as connection:
        return ledger_lines(
            connection, *SCOPE, since=since, until=until, now=now or until, zone=zone,
            book=book or published_prices(), **changes,
        )  # fmt: skip
