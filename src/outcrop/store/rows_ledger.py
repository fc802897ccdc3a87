"""What the ledger is computed from, as other rooms see its rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Span:
    """How long a resource was there that is paid by the hour."""

    account: str
    region: str
    resource_arn: str
    kind: str
    """`store.ledger.STORAGE` or `MODEL_UNITS`."""
    name: str
    """The resource's, when it was created."""
    model_arn: str
    """Of the base model at its root: prices are its."""
    quantity: int
    """Models, or model units."""
    begun_at: datetime
    commitment: str | None = None
    ended_at: datetime | None = None
    """None while it is there."""
    billed_until: datetime | None = None
    """Where a commitment is paid beyond the resource's end, until when."""


@dataclass(frozen=True)
class TrainedTokens:
    """What a job trained on, up to one of its ends."""

    account: str
    region: str
    job_id: str
    job_arn: str
    job_name: str
    model_arn: str
    """Of the base model at its root."""
    status: str
    """As it ended: completed, stopped or failed."""
    tokens: int
    """Of all steps that count, each record as often as it was trained on."""
    begun_at: datetime
    """When the job was created."""
    ended_at: datetime
