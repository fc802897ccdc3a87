"""Attempts as processes of this machine: they end with their worker, and yield to requests."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from outcrop.processes.spawn import Child, ChildSpec, spawn
from outcrop.settings import Settings, child_environment
from outcrop.store.rows import Job
from outcrop.train.threads import training_environment

NICE = 10
"""Below gateway and model servers, so that a small invocation stays quick while a job runs."""
COMMAND = (sys.executable, "-m", "outcrop.jobs.attempt")


def log_file(settings: Settings, job: Job) -> Path:
    """Return where all attempts of a job log to."""
    return settings.data_dir / "logs" / "jobs" / f"{job.id}.log"


@dataclass(frozen=True)
class LocalExecutor:
    """Runs `command JOB FENCE` as a child of this process."""

    settings: Settings
    command: tuple[str, ...] = COMMAND
    nice: int = NICE

    def submit(self, job: Job) -> LocalAttempt:
        """Start an attempt; call it from the main thread, see `spawn`."""
        spec = ChildSpec(
            name=f"job {job.id} attempt {job.attempts}",
            command=(*self.command, job.id, str(job.fence)),
            log_file=log_file(self.settings, job),
            environment={
                **training_environment(job.cores),
                **child_environment(self.settings),
            },
            nice=self.nice,
            restart=False,
            keep_log_bytes=self.settings.keep_log_bytes,
        )
        return LocalAttempt(spawn(spec))


@dataclass(frozen=True)
class LocalAttempt:
    """A running attempt."""

    child: Child

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        return self.child.poll()

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        self.child.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.child.kill()
