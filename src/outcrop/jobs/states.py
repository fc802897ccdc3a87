"""The states of a job, in one table: which move is allowed, and what each is called on the wire.

`queued` and `running` both show as InProgress.
Source: user guide, "Monitor your model customization job".
"""

from __future__ import annotations

from outcrop.store.rows import JobStatus

MOVES: dict[JobStatus, tuple[JobStatus, ...]] = {
    "queued": ("running", "stopped", "failed"),
    "running": ("queued", "stopping", "completed", "failed"),
    "stopping": ("stopped",),
    "completed": (),
    "failed": (),
    "stopped": (),
}
"""From each status, those that may follow.

`running` goes back to `queued` when its attempt is lost, and `queued` to `failed` when that has
happened too often. What goes wrong while a job is stopping does not matter any more: it is stopped.
"""

WIRE: dict[JobStatus, str] = {
    "queued": "InProgress",
    "running": "InProgress",
    "stopping": "Stopping",
    "completed": "Completed",
    "failed": "Failed",
    "stopped": "Stopped",
}


def wire_status(status: JobStatus) -> str:
    """Return what a status is called in answers."""
    return WIRE[status]


def statuses_of(wire: str) -> list[JobStatus]:
    """Return the statuses that show as this one."""
    return [status for status, name in WIRE.items() if name == wire]
