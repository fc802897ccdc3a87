"""Rows of what leaves the service by itself: invocation logs, and events of jobs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class DeliveryCount:
    """How often something came of a delivery, for one account."""

    channel: str
    """"invocation-logs", or the name of a target of events."""
    outcome: str
    """"delivered", why it was dropped, or "failing" for tries that are repeated."""
    number: int
    last_at: datetime
    detail: str
    """Of the last one: the reason in words."""


@dataclass(frozen=True)
class OutboxEvent:
    """A change of a job's state that waits to be told."""

    id: int
    """Grows: the order of a job's events."""
    account: str
    region: str
    event_id: str
    """The same at every try."""
    job_id: str
    at: datetime
    snapshot: dict[str, Any]


@dataclass(frozen=True)
class DeadEvent:
    """An event that a target was never told."""

    event: OutboxEvent
    target: str
    detail: str
    """Why the last try failed."""
    given_up_at: datetime
