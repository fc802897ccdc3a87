"""Where an attempt of a job runs. An executor starts it, says whether it runs, and ends it."""

from __future__ import annotations

from typing import Protocol

from outcrop.store.rows import Job


class Attempt(Protocol):
    """One running attempt."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""

    def ask_to_stop(self) -> None:
        """Tell it to end soon; it looks between micro-batches."""

    def kill(self) -> None:
        """End it now."""


class Executor(Protocol):
    """Starts attempts."""

    def submit(self, job: Job) -> Attempt:
        """Start an attempt of a claimed job; it ends the job's row itself under the job's fence."""
