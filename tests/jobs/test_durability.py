"""What was acknowledged is there after kill -9, and the database is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from outcrop.settings import Settings, child_environment
from outcrop.store import jobs
from outcrop.store.database import connect, migrate

REPOSITORY = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
ROUNDS = 3
WRITES = """
from outcrop.settings import load_settings
from outcrop.store import jobs
from outcrop.store.database import connect, transaction
from tests.unit.store.build import new_job
import sys
engine = connect(load_settings().effective_database_url)
number = 0
while True:
    with transaction(engine) as connection:
        jobs.create_job(connection, new_job(f"{sys.argv[1]}-{number}"))
    sys.stdout.write(f"{sys.argv[1]}-{number}\\n")
    sys.stdout.flush()
    number += 1
"""


def test_acknowledged_jobs_survive_kill_9_of_their_writer(data_dir: Path) -> None:
    settings = Settings(data_dir=data_dir)
    engine = connect(settings.effective_database_url)
    migrate(engine)
    environment = {**child_environment(settings), "PYTHONPATH": PYTHONPATH}
    acknowledged: list[str] = []
    for number in range(ROUNDS):
        command = [sys.executable, "-c", WRITES, f"round{number}"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(5):
                acknowledged.append(writer.stdout.readline().decode().strip())
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read().decode().split("\n")[:-1]
            acknowledged += rest
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        live = [jobs.get_job_by_id(connection, job.id) for job in jobs.live_jobs(connection)]
    engine.dispose()
    created = [job.name for job in live if job is not None]
    assert set(acknowledged) <= set(created)
    assert len(created) - len(acknowledged) <= ROUNDS, "at most the write that was cut off"
