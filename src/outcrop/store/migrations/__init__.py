"""The steps from one schema to the next, in order; a step that has landed is never changed.

A change of tables.py comes with a module of its own here. A test compares what the steps make with
tables.py.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Connection

from outcrop.store.migrations import (
    m0001_first,
    m0002_turns,
    m0003_run_plan,
    m0004_job_metric,
    m0005_api_key,
    m0006_token_usage,
    m0007_endpoints,
    m0008_imported,
    m0009_delivery,
    m0010_ledger,
    m0011_job_lists,
    m0013_batch,
)

Migration = Callable[[Connection], None]

MIGRATIONS: tuple[Migration, ...] = (
    m0001_first.apply,
    m0002_turns.apply,
    m0003_run_plan.apply,
    m0004_job_metric.apply,
    m0005_api_key.apply,
    m0006_token_usage.apply,
    m0007_endpoints.apply,
    m0008_imported.apply,
    m0009_delivery.apply,
    m0010_ledger.apply,
    m0011_job_lists.apply,
    m0013_batch.apply,
)
