"""Schema 1: accounts, jobs, custom models, throughputs, tags, request tokens, model servers.

A copy of tables.py as it was then: a migration must do the same for ever, whatever the tables have
become since.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()


def _scope() -> tuple[sa.Column[str], sa.Column[str]]:
    return (
        sa.Column("account", sa.String(12), nullable=False),
        sa.Column("region", sa.String(32), nullable=False),
    )


def _required(name: str, kind: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **options)


sa.Table(
    "iam_user",
    _metadata,
    *_scope(),
    _required("name", sa.String(64)),
    _required("created_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "name"),
)

sa.Table(
    "access_key",
    _metadata,
    *_scope(),
    # An id names its account, so it must be unique over all of them.
    _required("access_key_id", sa.String(128), unique=True),
    _required("secret", sa.String(128)),
    _required("user_name", sa.String(64)),
    _required("active", sa.Boolean),
    _required("created_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "access_key_id"),
)

sa.Table(
    "iam_role",
    _metadata,
    *_scope(),
    _required("name", sa.String(576)),
    _required("trust_policy", sa.Text),
    _required("created_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "name"),
)

sa.Table(
    "iam_policy",
    _metadata,
    *_scope(),
    _required("owner_kind", sa.String(8)),
    _required("owner_name", sa.String(576)),
    _required("name", sa.String(128)),
    _required("document", sa.Text),
    sa.PrimaryKeyConstraint("account", "region", "owner_kind", "owner_name", "name"),
)

sa.Table(
    "job",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("kind", sa.String(32)),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(63)),
    _required("status", sa.String(16)),
    _required("owner_principal", sa.String(2048)),
    _required("spec", sa.JSON),
    sa.Column("model_name", sa.String(63)),
    sa.Column("result", sa.JSON),
    sa.Column("failure_message", sa.Text),
    _required("progress", sa.JSON),
    _required("created_at", sa.BigInteger),
    _required("last_modified_at", sa.BigInteger),
    sa.Column("ended_at", sa.BigInteger),
    # The queue: who holds the job, under which fence, and whether the holder still lives.
    _required("attempts", sa.Integer, default=0),
    sa.Column("worker", sa.String(128)),
    _required("fence", sa.Integer, default=0),
    _required("heartbeat", sa.BigInteger, default=0),
    _required("cores", sa.Integer),
    _required("memory_bytes", sa.BigInteger),
    sa.UniqueConstraint("account", "region", "kind", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("job_queue", "status", "created_at"),
    sa.Index("job_list", "account", "region", "kind", "created_at", "id"),
)

sa.Table(
    "job_stage",
    _metadata,
    *_scope(),
    _required("job_id", sa.String(12)),
    _required("position", sa.Integer),
    _required("stage", sa.String(32)),
    _required("status", sa.String(16)),
    sa.Column("created_at", sa.BigInteger),
    sa.Column("last_modified_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "stage"),
    sa.Index("job_stage_job", "job_id"),
)

sa.Table(
    "job_event",
    _metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    *_scope(),
    _required("job_id", sa.String(12)),
    _required("at", sa.BigInteger),
    _required("level", sa.String(8)),
    _required("type", sa.String(64)),
    _required("message", sa.Text),
    _required("data", sa.JSON),
    sa.Index("job_event_job", "job_id", "id"),
)

sa.Table(
    "custom_model",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(63)),
    sa.Column("job_arn", sa.String(1011)),
    sa.Column("job_name", sa.String(63)),
    _required("base_model_id", sa.String(140)),
    _required("base_model_arn", sa.String(1011)),
    _required("foundation_model_arn", sa.String(1011)),
    _required("customization_type", sa.String(32)),
    _required("hyper_parameters", sa.JSON),
    _required("spec", sa.JSON),
    _required("metrics", sa.JSON),
    _required("artifact_path", sa.String(1024)),
    _required("artifact_digest", sa.String(64)),
    _required("status", sa.String(16)),
    _required("created_at", sa.BigInteger),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("custom_model_list", "account", "region", "created_at", "id"),
)

sa.Table(
    "throughput",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(63)),
    _required("weights", sa.String(128)),
    _required("model_arn", sa.String(1011)),
    _required("desired_model_arn", sa.String(1011)),
    _required("foundation_model_arn", sa.String(1011)),
    _required("model_units", sa.Integer),
    _required("desired_model_units", sa.Integer),
    _required("status", sa.String(16)),
    sa.Column("commitment", sa.String(16)),
    sa.Column("commitment_expires_at", sa.BigInteger),
    sa.Column("failure_message", sa.Text),
    _required("created_at", sa.BigInteger),
    _required("last_modified_at", sa.BigInteger),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("throughput_list", "account", "region", "created_at", "id"),
)

sa.Table(
    "tag",
    _metadata,
    *_scope(),
    _required("resource_arn", sa.String(1011)),
    _required("key", sa.String(128)),
    _required("value", sa.String(256)),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "key"),
)

sa.Table(
    "request_token",
    _metadata,
    *_scope(),
    _required("operation", sa.String(128)),
    _required("token", sa.String(256)),
    _required("digest", sa.String(64)),
    _required("resource_id", sa.String(12)),
    _required("created_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "operation", "token"),
)

sa.Table(
    "model_server",
    _metadata,
    *_scope(),
    _required("key", sa.String(128)),
    _required("state", sa.String(16)),
    sa.Column("address", sa.String(1024)),
    sa.Column("pid", sa.Integer),
    sa.Column("error", sa.Text),
    _required("wanted_at", sa.BigInteger),
    _required("last_used_at", sa.BigInteger),
    sa.PrimaryKeyConstraint("account", "region", "key"),
)


def apply(connection: Connection) -> None:
    """Make the tables."""
    _metadata.create_all(connection)
