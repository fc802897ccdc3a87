"""Who uses a custom or imported model, and so keeps it from being deleted.

A kind of resource that works with custom models adds a function to `_USERS`. Whoever creates such a
resource looks for the model, and writes its row, under `lock_account`; whoever deletes the model
does, too. So of a deletion and a use that come at once, one is first, and the other sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.store import deployments, tables
from outcrop.store.rows import (
    BATCH,
    CUSTOMIZATION,
    DATA_TASK,
    EXPORT,
    FROM_CHECKPOINT,
    CustomModel,
    ImportedModel,
)

Model = CustomModel | ImportedModel
LIMIT_NAMED = 5
"""Users of one kind that a message names; a thousand jobs would fill it."""
_JOB_NOUNS = {
    CUSTOMIZATION: "model customization job",
    DATA_TASK: "data task",
    BATCH: "batch inference job",
    EXPORT: "model export",
    FROM_CHECKPOINT: "task that makes a model of a checkpoint",
}


def users_of(connection: Connection, model: Model) -> list[str]:
    """Return what uses a model now, each as a message names it: `provisioned throughput pt-1`.

    Of each kind the first few names, in their order, and how many more there are. An empty list
    means that the model can be deleted.
    """
    return [user for find in _USERS for user in find(connection, model)]


def _jobs(connection: Connection, model: Model) -> list[str]:
    """Jobs of every kind that work with it and have not ended."""
    columns = tables.job.c
    query = sa.select(columns.kind, columns.name).where(
        *(columns.account == model.account, columns.region == model.region),
        *(columns.uses_model_arn == model.arn, tables.being_made),
    )
    found: dict[str, list[str]] = {}
    for row in connection.execute(query):
        found.setdefault(row.kind, []).append(row.name)
    return [
        user
        for kind, names in sorted(found.items())
        for user in _named(_JOB_NOUNS.get(kind, f"{kind} job"), names)
    ]


def _throughputs(connection: Connection, model: Model) -> list[str]:
    """Provisioned throughputs that serve it, or are to."""
    columns = tables.throughput.c
    query = sa.select(columns.name).where(
        *(columns.account == model.account, columns.region == model.region),
        sa.or_(columns.model_arn == model.arn, columns.desired_model_arn == model.arn),
    )
    return _named("provisioned throughput", connection.execute(query).scalars())


def _deployments(connection: Connection, model: Model) -> list[str]:
    """Deployments that serve it, or move to it."""
    scope = (model.account, model.region)
    return _named(
        "custom model deployment", deployments.names_of_users(connection, *scope, model.arn)
    )


def _named(noun: str, names: Iterable[str]) -> list[str]:
    every = sorted(names)
    named = [f"{noun} {name}" for name in every[:LIMIT_NAMED]]
    more = len(every) - len(named)
    return [*named, *([f"{more} more of the kind {noun}"] if more else [])]


_USERS: tuple[Callable[[Connection, Model], list[str]], ...] = (
    _jobs,
    _throughputs,
    _deployments,
)
"""One function a kind of resource; each returns what `users_of` does, of its kind."""
