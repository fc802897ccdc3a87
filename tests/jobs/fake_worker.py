"""A worker with short intervals that starts fake attempts: `fake_worker.py NAME LEASE_SECONDS`."""

from __future__ import annotations

import logging
import signal
import sys

from outcrop.jobs.executors.local import LocalExecutor
from outcrop.jobs.worker import Worker, run
from outcrop.settings import load_settings
from outcrop.store.database import connect

COMMAND = (sys.executable, "-m", "tests.jobs.fake_attempt")


def main(name: str, lease_seconds: float) -> None:
    logging.basicConfig(level=logging.INFO)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    settings = load_settings()
    engine = connect(settings.effective_database_url)
    worker = Worker(
        settings,
        engine,
        name,
        LocalExecutor(settings, COMMAND, nice=0),
        heartbeat_seconds=0.1,
        stop_seconds=1.0,
        lease_seconds=lease_seconds,
    )
    run(worker, lambda: bool(asked), poll_seconds=0.02)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
