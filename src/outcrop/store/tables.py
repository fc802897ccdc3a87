"""Every table. Account and region are in each of them and in every unique key.

Instants are stored as integers, microseconds since 1970 in UTC: they sort, compare and index
alike in every database.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

GLOBAL_REGION = "aws-global"
"""The region of identities, which belong to an account in all regions."""
SERVICE_ACCOUNT = "service"
"""The account of rows that belong to the service itself."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_microseconds(instant: datetime) -> int:
    """Return an aware instant as it is stored."""
    return (instant - _EPOCH) // _MICROSECOND


def _from_microseconds(value: int | None) -> datetime | None:
    return None if value is None else _EPOCH + value * _MICROSECOND


class Instant(TypeDecorator[datetime]):
    """An aware UTC datetime in Python, microseconds since 1970 in the database."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> int | None:
        """Store an instant; a naive datetime is a mistake of the caller."""
        if value is None:
            return None
        assert value.tzinfo is not None, "an instant must be aware of its time zone"
        return to_microseconds(value)

    def result_processor(
        self, dialect: Any, coltype: object
    ) -> Callable[[int | None], datetime | None]:
        """Read an instant; in one call each, because a page of 1,000 jobs has 8,000."""
        return _from_microseconds


metadata = sa.MetaData()


def _scope() -> tuple[sa.Column[str], sa.Column[str]]:
    return (
        sa.Column("account", sa.String(12), nullable=False),
        sa.Column("region", sa.String(32), nullable=False),
    )


def _required(name: str, kind: Any, **options: Any) -> sa.Column[Any]:
    return sa.Column(name, kind, nullable=False, **options)


schema_version = sa.Table(
    "schema_version",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    _required("applied_at", Instant),
)

iam_user = sa.Table(
    "iam_user",
    metadata,
    *_scope(),
    _required("name", sa.String(64)),
    _required("created_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "name"),
)

access_key = sa.Table(
    "access_key",
    metadata,
    *_scope(),
    # An id names its account, so it must be unique over all of them.
    _required("access_key_id", sa.String(128), unique=True),
    _required("secret", sa.String(128)),
    _required("user_name", sa.String(64)),
    _required("active", sa.Boolean),
    _required("created_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "access_key_id"),
)

api_key = sa.Table(
    "api_key",
    metadata,
    *_scope(),
    # A key is looked up by its digest alone, so that must be unique over all accounts.
    _required("digest", sa.String(64), unique=True),
    _required("key_id", sa.String(128)),
    _required("user_name", sa.String(64)),
    _required("active", sa.Boolean),
    _required("created_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "key_id"),
)

iam_role = sa.Table(
    "iam_role",
    metadata,
    *_scope(),
    _required("name", sa.String(576)),
    _required("trust_policy", sa.Text),
    _required("created_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "name"),
)

iam_policy = sa.Table(
    "iam_policy",
    metadata,
    *_scope(),
    _required("owner_kind", sa.String(8)),
    _required("owner_name", sa.String(576)),
    _required("name", sa.String(128)),
    _required("document", sa.Text),
    sa.PrimaryKeyConstraint("account", "region", "owner_kind", "owner_name", "name"),
)

job = sa.Table(
    "job",
    metadata,
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
    _required("created_at", Instant),
    _required("last_modified_at", Instant),
    sa.Column("ended_at", Instant),
    # The queue: who holds the job, under which fence, and whether the holder still lives.
    _required("attempts", sa.Integer),
    sa.Column("worker", sa.String(128)),
    _required("fence", sa.Integer),
    _required("heartbeat", sa.BigInteger),
    _required("cores", sa.Integer),
    _required("memory_bytes", sa.BigInteger),
    # Order without a clock: its place among all jobs, and that of its last claim among claims.
    _required("number", sa.BigInteger, server_default="0"),
    _required("claim_number", sa.BigInteger, server_default="0"),
    _required("lost_attempts", sa.Integer, server_default="0"),
    # What was decided for its run, once: every attempt computes with it, on whatever machine.
    _required("run_plan", sa.JSON, server_default="{}"),
    # The custom model that it works with, which stays until the job has ended.
    sa.Column("uses_model_arn", sa.String(1011)),
    # Of a batch job: what its status does not say by itself, and until when it may run.
    _required("phase", sa.String(20), server_default=""),
    sa.Column("expires_at", Instant),
    sa.UniqueConstraint("account", "region", "kind", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("job_queue", "status", "number"),
    sa.Index("job_turns", "account", "claim_number"),
    # The largest of each is asked for at every creation, and at every claim.
    sa.Index("job_number", "number"),
    sa.Index("job_claims", "claim_number"),
    # With the name, so that a search for a part of it reads the index alone.
    sa.Index("job_list", "account", "region", "kind", "created_at", "id", "name"),
    sa.Index("job_list_status", "account", "region", "kind", "status", "created_at", "id", "name"),
    sa.Index("job_uses_model", "account", "region", "uses_model_arn"),
)

being_made = sa.text("status IN ('queued', 'running', 'stopping')")
"""In these words, because a database takes the index below only where it sees that they are its."""
sa.Index(
    "job_model_being_made",
    *(job.c.account, job.c.region, job.c.model_name),
    unique=True,
    sqlite_where=being_made,
    postgresql_where=being_made,
)

job_stage = sa.Table(
    "job_stage",
    metadata,
    *_scope(),
    _required("job_id", sa.String(12)),
    _required("position", sa.Integer),
    _required("stage", sa.String(32)),
    _required("status", sa.String(16)),
    sa.Column("created_at", Instant),
    sa.Column("last_modified_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "stage"),
    sa.Index("job_stage_job", "job_id"),
)

job_event = sa.Table(
    "job_event",
    metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    *_scope(),
    _required("job_id", sa.String(12)),
    _required("at", Instant),
    _required("level", sa.String(8)),
    _required("type", sa.String(64)),
    _required("message", sa.Text),
    _required("data", sa.JSON),
    sa.Index("job_event_job", "job_id", "id"),
)

job_metric = sa.Table(
    "job_metric",
    metadata,
    *_scope(),
    _required("job_id", sa.String(12)),
    # "step" or "validation"; both count from 0, and only steps have what may be absent here.
    _required("kind", sa.String(16)),
    _required("step", sa.BigInteger),
    _required("epoch", sa.Integer),
    _required("loss", sa.Double),
    sa.Column("perplexity", sa.Double),
    sa.Column("learning_rate", sa.Double),
    sa.Column("gradient_norm", sa.Double),
    sa.Column("tokens", sa.Integer),
    sa.Column("seconds", sa.Double),
    sa.Column("peak_memory_bytes", sa.BigInteger),
    sa.Column("micro_batch_tokens", sa.Integer),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "kind", "step"),
)

custom_model = sa.Table(
    "custom_model",
    metadata,
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
    _required("created_at", Instant),
    # Of a model that a job of ours makes out of weights in S3: its row is there before it is.
    sa.Column("creation_job_id", sa.String(12)),
    sa.Column("failure_message", sa.Text),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("custom_model_list", "account", "region", "created_at", "id"),
    sa.Index("custom_model_creation", "creation_job_id"),
)

imported_model = sa.Table(
    "imported_model",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(63)),
    _required("job_arn", sa.String(1011)),
    _required("job_name", sa.String(63)),
    _required("weights", sa.String(128)),
    _required("architecture", sa.String(128)),
    _required("instruct", sa.Boolean),
    _required("spec", sa.JSON),
    _required("digest", sa.String(64)),
    _required("num_bytes", sa.BigInteger),
    _required("created_at", Instant),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("imported_model_list", "account", "region", "created_at", "id"),
)

throughput = sa.Table(
    "throughput",
    metadata,
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
    sa.Column("commitment_expires_at", Instant),
    sa.Column("failure_message", sa.Text),
    _required("created_at", Instant),
    _required("last_modified_at", Instant),
    _required("desired_weights", sa.String(128), server_default=""),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("throughput_list", "account", "region", "created_at", "id"),
)

deployment = sa.Table(
    "deployment",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(63)),
    sa.Column("description", sa.Text),
    _required("weights", sa.String(128)),
    _required("model_arn", sa.String(1011)),
    _required("status", sa.String(16)),
    sa.Column("failure_message", sa.Text),
    # The last update: null where there was none.
    sa.Column("update_status", sa.String(16)),
    sa.Column("update_model_arn", sa.String(1011)),
    sa.Column("update_weights", sa.String(128)),
    _required("created_at", Instant),
    _required("last_updated_at", Instant),
    sa.UniqueConstraint("account", "region", "name"),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("deployment_list", "account", "region", "created_at", "id"),
)

inference_profile = sa.Table(
    "inference_profile",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_scope(),
    _required("arn", sa.String(1011)),
    _required("name", sa.String(64)),
    sa.Column("description", sa.Text),
    _required("model_arn", sa.String(1011)),
    _required("created_at", Instant),
    sa.UniqueConstraint("account", "region", "arn"),
    sa.Index("inference_profile_list", "account", "region", "created_at", "id"),
)

resource_policy = sa.Table(
    "resource_policy",
    metadata,
    *_scope(),
    _required("resource_arn", sa.String(1011)),
    _required("document", sa.Text),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn"),
)

tag = sa.Table(
    "tag",
    metadata,
    *_scope(),
    _required("resource_arn", sa.String(1011)),
    _required("key", sa.String(128)),
    _required("value", sa.String(256)),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "key"),
)

request_token = sa.Table(
    "request_token",
    metadata,
    *_scope(),
    _required("operation", sa.String(128)),
    _required("token", sa.String(256)),
    _required("digest", sa.String(64)),
    _required("resource_id", sa.String(12)),
    _required("created_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "operation", "token"),
)

model_server = sa.Table(
    "model_server",
    metadata,
    *_scope(),
    _required("key", sa.String(128)),
    _required("state", sa.String(16)),
    sa.Column("address", sa.String(1024)),
    sa.Column("pid", sa.Integer),
    sa.Column("error", sa.Text),
    _required("wanted_at", Instant),
    _required("last_used_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "key"),
)

token_usage = sa.Table(
    "token_usage",
    metadata,
    *_scope(),
    _required("model_arn", sa.String(1011)),
    # Empty on demand: a key's column cannot be null.
    _required("throughput_arn", sa.String(1011)),
    _required("hour", Instant),
    _required("requests", sa.BigInteger),
    _required("input_tokens", sa.BigInteger),
    _required("output_tokens", sa.BigInteger),
    # Of the deployment or inference profile that was asked, else empty.
    _required("endpoint_arn", sa.String(1011), server_default=""),
    # Whether a batch job asked: such tokens have a price of their own.
    _required("batch", sa.Boolean, server_default=sa.false()),
    sa.PrimaryKeyConstraint(
        "account", "region", "hour", "model_arn", "throughput_arn", "endpoint_arn", "batch"
    ),
)

invocation_logging = sa.Table(
    "invocation_logging",
    metadata,
    *_scope(),
    _required("config", sa.JSON),
    _required("updated_at", Instant),
    sa.PrimaryKeyConstraint("account", "region"),
)

delivery_count = sa.Table(
    "delivery_count",
    metadata,
    *_scope(),
    # What is delivered to where: "invocation-logs", or a target of events.
    _required("channel", sa.String(128)),
    _required("outcome", sa.String(32)),
    _required("number", sa.BigInteger),
    _required("last_at", Instant),
    _required("detail", sa.Text),
    sa.PrimaryKeyConstraint("account", "region", "channel", "outcome"),
)

event_outbox = sa.Table(
    "event_outbox",
    metadata,
    sa.Column(
        "id",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    *_scope(),
    _required("event_id", sa.String(36), unique=True),
    _required("job_id", sa.String(12)),
    _required("at", Instant),
    # What changes of a job, as it stood; the rest never changes and is read from the job's row.
    _required("snapshot", sa.JSON),
)

event_settled = sa.Table(
    "event_settled",
    metadata,
    *_scope(),
    _required("outbox_id", sa.BigInteger),
    _required("target", sa.String(128)),
    # "delivered", or "dead": given up.
    _required("outcome", sa.String(16)),
    _required("detail", sa.Text),
    _required("at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "outbox_id", "target"),
    sa.Index("event_settled_outbox", "outbox_id"),
)

metered_span = sa.Table(
    "metered_span",
    metadata,
    *_scope(),
    _required("resource_arn", sa.String(1011)),
    _required("kind", sa.String(16)),
    _required("name", sa.String(63)),
    # Of the base model at the root: prices are its.
    _required("model_arn", sa.String(1011)),
    _required("quantity", sa.Integer),
    sa.Column("commitment", sa.String(16)),
    _required("begun_at", Instant),
    sa.Column("ended_at", Instant),
    # A commitment is paid to its end, also where the resource went before.
    sa.Column("billed_until", Instant),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "kind"),
)

metered_training = sa.Table(
    "metered_training",
    metadata,
    *_scope(),
    _required("job_id", sa.String(12)),
    # Under which the job ended: one that is taken up again ends again, with what it trained since.
    _required("fence", sa.Integer),
    _required("job_arn", sa.String(1011)),
    _required("job_name", sa.String(63)),
    _required("model_arn", sa.String(1011)),
    _required("status", sa.String(16)),
    _required("tokens", sa.BigInteger),
    _required("begun_at", Instant),
    _required("ended_at", Instant),
    sa.PrimaryKeyConstraint("account", "region", "job_id", "fence", "status"),
    sa.Index("metered_training_end", "account", "region", "ended_at"),
)

deleted_tag = sa.Table(
    "deleted_tag",
    metadata,
    *_scope(),
    _required("resource_arn", sa.String(1011)),
    _required("key", sa.String(128)),
    _required("value", sa.String(256)),
    sa.PrimaryKeyConstraint("account", "region", "resource_arn", "key"),
)
