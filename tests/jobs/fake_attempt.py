"""An attempt that trains nothing: `fake_attempt.py JOB FENCE`. The job's spec says what it does.

Every start is written to `starts.txt` of the data directory, so that a test can count them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

from tests.unit.store.build import new_model

from outcrop.settings import load_settings
from outcrop.store import jobs
from outcrop.store.database import connect, transaction
from outcrop.store.rows import DATA_TASK

STARTS = "starts.txt"


def main(job_id: str, fence: int) -> int:
    settings = load_settings()
    engine = connect(settings.effective_database_url)
    with engine.connect() as connection:
        job = jobs.get_job_by_id(connection, job_id)
    assert job is not None
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    does = job.spec["does"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN if does == "is deaf" else note)
    line = f"{job_id} {fence} {os.getpid()}\n".encode()
    starts = os.open(settings.data_dir / STARTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(starts, line)
    if does == "dies":
        sys.stderr.write("the data made it die\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if does == "forgets":
        return 0
    if does in ("waits", "is deaf") or (does == "waits once" and fence == 1):
        while not asked:
            time.sleep(0.01)
        with transaction(engine) as connection:
            return 0 if jobs.end_stopped(connection, job_id, fence) else 1
    model = new_model(f"made-by-{job.name}")
    if job.kind == DATA_TASK:
        with transaction(engine) as connection:
            jobs.complete_task(connection, job_id, fence, result={"fence": fence}, message="done")
        return 0
    with transaction(engine) as connection:
        jobs.complete_job(connection, job_id, fence, result={"fence": fence}, model=model)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
