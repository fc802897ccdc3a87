"""What a batch job's status and phase are called on the wire.

Source: API reference, "GetModelInvocationJob": Submitted, Validating, Scheduled, InProgress, then
Completed, PartiallyCompleted, Failed, Stopped or Expired.
"""

from __future__ import annotations

from outcrop.store.batches import EXPIRED, IN_PROGRESS, PARTIAL, SCHEDULED, VALIDATING
from outcrop.store.rows import JobStatus

SUBMITTED = "Submitted"
PHASES = ("", VALIDATING, SCHEDULED, IN_PROGRESS, PARTIAL, EXPIRED)
_WAITING = {"": SUBMITTED, VALIDATING: SUBMITTED, SCHEDULED: SCHEDULED, IN_PROGRESS: IN_PROGRESS}
_HELD = {"": VALIDATING, VALIDATING: VALIDATING, SCHEDULED: SCHEDULED, IN_PROGRESS: IN_PROGRESS}

WIRE: dict[JobStatus, dict[str, str]] = {
    "queued": _WAITING,
    "running": _HELD,
    "stopping": dict.fromkeys(_HELD, "Stopping"),
    "stopped": dict.fromkeys(_HELD, "Stopped"),
    "failed": {**dict.fromkeys(_HELD, "Failed"), EXPIRED: EXPIRED},
    "completed": {IN_PROGRESS: "Completed", PARTIAL: PARTIAL},
}
"""By status and phase. What was begun goes on showing as InProgress while it waits for its next
attempt."""


def wire_status(status: JobStatus, phase: str) -> str:
    """Return what a batch job is called in answers."""
    return WIRE[status][phase]


def states_of(wire: str) -> list[tuple[JobStatus, str]]:
    """Return the statuses, with their phases, that show as this one."""
    return [
        (status, phase)
        for status, names in WIRE.items()
        for phase, name in names.items()
        if name == wire
    ]
