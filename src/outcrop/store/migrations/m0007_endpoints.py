"""Schema 7: deployments, inference profiles, resource policies; throughputs that change model.

Usage is told apart by the deployment or inference profile that was asked, so its key has one column
more; no database changes a key in the same words, so the rows move to a new table.

Copies of the tables as they were then: see schema 1.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

_metadata = sa.MetaData()


def _scope() -> tuple[sa.Column[str], sa.Column[str]]:
    return (
        sa.Column("account", sa.String(12), nullable=False),
        sa.Column("region", sa.String(32), nullable=False),
    )


sa.Table(
    "deployment",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    sa.Column("arn", sa.String(1011), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("weights", sa.String(128), nullable=False),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("failure_message", sa.Text),
    sa.Column("update_status", sa.String(16)),
    sa.Column("update_model_arn", sa.String(1011)),
    sa.Column("update_weights", sa.String(128)),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("last_updated_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("deployment_list", "account", "region", "created_at", "id"),
)

sa.Table(
    "inference_profile",
    _metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    sa.Column("arn", sa.String(1011), nullable=False),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("description", sa.Text),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("inference_profile_list", "account", "region", "created_at", "id"),
)

sa.Table(
    "resource_policy",
    _metadata,
    *_scope(),
    sa.Column("resource_arn", sa.String(1011), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn"),
)

sa.Table(
    "token_usage",
    _metadata,
    *_scope(),
    sa.Column("model_arn", sa.String(1011), nullable=False),
    sa.Column("throughput_arn", sa.String(1011), nullable=False),
    sa.Column("hour", sa.BigInteger, nullable=False),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("input_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("endpoint_arn", sa.String(1011), nullable=False, server_default=""),
    sa.PrimaryKeyConstraint(
        "account", "region", "hour", "model_arn", "throughput_arn", "endpoint_arn"
    ),
)

_COLUMNS = "account, region, model_arn, throughput_arn, hour, requests, input_tokens, output_tokens"
_BEFORE = (
    "ALTER TABLE throughput ADD COLUMN desired_weights VARCHAR(128) DEFAULT '' NOT NULL",
    "UPDATE throughput SET desired_weights = weights",
    "ALTER TABLE token_usage RENAME TO token_usage_until_6",
)
_AFTER = (
    f"INSERT INTO token_usage ({_COLUMNS}) SELECT {_COLUMNS} FROM token_usage_until_6",
    "DROP TABLE token_usage_until_6",
)


def apply(connection: Connection) -> None:
    """Make the tables, and change those of throughputs and usage."""
    for statement in _BEFORE:
        connection.execute(sa.text(statement))
    _metadata.create_all(connection)
    for statement in _AFTER:
        connection.execute(sa.text(statement))
