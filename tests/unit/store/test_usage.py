"""Usage is added up, by whoever and however often, and read by account and hour."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine
from tests.unit.store.build import ACCOUNT, OTHER_ACCOUNT, REGION

from outcrop.store.database import transaction
from outcrop.store.rows import TokenUsage, UsageKey
from outcrop.store.usage import add_usage, list_usage

HOUR = datetime(2026, 3, 1, 12, tzinfo=UTC)


def key(account: str = ACCOUNT, hour: int = 0, model: str = "m", throughput: str = "") -> UsageKey:
    return UsageKey(account, REGION, model, throughput, HOUR + timedelta(hours=hour))


def test_usage_is_added_to_what_is_there(engine: Engine) -> None:
    first, second = key(), key(throughput="t")
    for _ in range(2):
        with transaction(engine) as connection:
            add_usage(connection, {first: TokenUsage(1, 2, 3), second: TokenUsage(1, 10**12, 0)})
    with engine.connect() as connection:
        found = list_usage(connection, ACCOUNT, REGION, since=HOUR, until=HOUR + timedelta(hours=1))
    assert found == {first: TokenUsage(2, 4, 6), second: TokenUsage(2, 2 * 10**12, 0)}


def test_an_account_and_an_hour_are_read_alone(engine: Engine) -> None:
    keys = [key(), key(hour=1), key(hour=2), key(OTHER_ACCOUNT), key(model="n")]
    with transaction(engine) as connection:
        add_usage(connection, dict.fromkeys(keys, TokenUsage(1, 1, 1)))
    with engine.connect() as connection:
        found = list_usage(connection, ACCOUNT, REGION, since=HOUR, until=HOUR + timedelta(hours=2))
    assert set(found) == {keys[0], keys[1], keys[4]}


def test_writers_at_the_same_time_lose_nothing(engine: Engine) -> None:
    def add(number: int) -> None:
        for turn in range(5):
            keys = [key(model=name) for name in ("m", "n", "o")]
            if (number + turn) % 2:
                keys.reverse()
            with transaction(engine) as connection:
                add_usage(connection, dict.fromkeys(keys, TokenUsage(1, 2, 3)))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with engine.connect() as connection:
        found = list_usage(connection, ACCOUNT, REGION, since=HOUR, until=HOUR + timedelta(hours=1))
    assert set(found.values()) == {TokenUsage(20, 40, 60)}
