"""One attempt of one job, in a process of its own: `python -m outcrop.jobs.attempt JOB FENCE`.

Ends the job's row itself (completed, failed, stopped) as long as its fence holds, and then exits
with 0. Any other exit code means that the attempt could not end the row; the worker then decides
whether to try again.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from types import FrameType

from safetensors import SafetensorError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.errors import (
    ApiError,
    DataError,
    LeaseLost,
    ModelError,
    ObjectStoreError,
    StopRequested,
    TrainingError,
)
from outcrop.jobs import (
    artifacts,
    checkpoints,
    copying,
    customization,
    data_task,
    from_checkpoint,
    importing,
    memory,
    model_export,
)
from outcrop.jobs.batch import stages as batch
from outcrop.objects.client import IS_AWAY
from outcrop.settings import Settings, load_settings
from outcrop.store import jobs
from outcrop.store.database import connect, transaction
from outcrop.store.rows import (
    BATCH,
    COPY,
    CREATION,
    CUSTOMIZATION,
    DATA_TASK,
    EXPORT,
    FROM_CHECKPOINT,
    IMPORT,
    Job,
)
from outcrop.train.memory import is_out_of_memory, peak_memory_bytes, spoils_the_process
from outcrop.train.portions import gibibytes

logger = logging.getLogger("outcrop.attempt")

EXIT_UNFINISHED = 1
STAGES: dict[str, Callable[[Settings, Engine, Job, StopFlag], None]] = {
    CUSTOMIZATION: customization.run,
    DATA_TASK: data_task.run,
    BATCH: batch.run,
    IMPORT: importing.run_import,
    CREATION: importing.run_creation,
    COPY: copying.run,
    EXPORT: model_export.run,
    FROM_CHECKPOINT: from_checkpoint.run,
}
"""What a job of each kind does."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write that trying again cannot mend: full disk, quota, limit on a file's size."""


def main(arguments: list[str]) -> int:
    """Run the attempt; see the module's docstring for the exit code."""
    job_id, fence = arguments[0], int(arguments[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = load_settings()
    engine = connect(settings.effective_database_url)
    stop = StopFlag()
    signal.signal(signal.SIGTERM, stop.set)
    memory.offer_to_be_killed_first()
    try:
        return run_attempt(settings, engine, job_id, fence, stop)
    finally:
        _clean_up(settings, engine, job_id, fence)
        engine.dispose()


def _clean_up(settings: Settings, engine: Engine, job_id: str, fence: int) -> None:
    """Remove what no later attempt needs: everything of a job that has ended, but for the last
    checkpoint of one that was stopped, and the files of an attempt that lost its
    lease. The next attempt goes on from this one's checkpoints.
    """
    try:
        with engine.connect() as connection:
            job = jobs.get_job_by_id(connection, job_id)
    except SQLAlchemyError:  # `outcrop gc` does it later
        logger.exception("the scratch files were left")
        return
    if job is not None and checkpoints.is_kept(settings, job):
        checkpoints.keep_last_only(settings, job_id)
    elif job is None or job.ended_at is not None:
        shutil.rmtree(artifacts.job_folder(settings, job_id), ignore_errors=True)
    elif job.fence != fence:
        shutil.rmtree(artifacts.work_folder(settings, job_id, fence), ignore_errors=True)


class StopFlag:
    """Set by SIGTERM; looked at between micro-batches and between stages."""

    def __init__(self) -> None:
        self._set = False

    def set(self, number: int = 0, frame: FrameType | None = None) -> None:
        """Ask the attempt to end soon; has the form of a signal handler."""
        self._set = True

    def __call__(self) -> bool:
        """Return whether the attempt is to end."""
        return self._set


def run_attempt(
    settings: Settings,
    engine: Engine,
    job_id: str,
    fence: int,
    stop: StopFlag,
    *,
    run: Callable[[Settings, Engine, Job, StopFlag], None] | None = None,
) -> int:
    """Run the job's stages and end its row. Returns the process's exit code.

    Args:
        run: the stages; None takes those of the job's kind, and tests have their own.
    """
    try:
        with engine.connect() as connection:
            job = jobs.get_job_by_id(connection, job_id)
        if job is None or job.fence != fence or job.status not in jobs.HELD:
            logger.warning("job %s is not held under fence %d any more", job_id, fence)
            return 0
        (run or STAGES[job.kind])(settings, engine, job, stop)
    except StopRequested:
        return _end_stopped(engine, job_id, fence)
    except LeaseLost:
        logger.warning("the lease on job %s was lost; nothing more is written", job_id)
        return 0
    except ObjectStoreError as error:
        if error.code == IS_AWAY:
            raise  # another attempt may find it back
        return _fail(engine, job_id, fence, str(error))
    except (ApiError, DataError, ModelError, TrainingError) as error:
        return _fail(engine, job_id, fence, str(error))
    except (OSError, SafetensorError) as error:
        if _error_number(error) not in NO_ROOM:
            raise
        made = "The task's files" if _is_task(job) else "The model"
        return _fail(engine, job_id, fence, _no_room(error, made))
    except (MemoryError, RuntimeError) as error:
        if job is not None and spoils_the_process(error):
            return _hand_over(engine, job, str(error))
        if not is_out_of_memory(error):
            raise
        if _is_task(job):
            return _fail(engine, job_id, fence, _no_memory_for_task(error))
        allowed = memory.given(settings, job.memory_bytes) if job is not None else 0
        return _fail(engine, job_id, fence, _no_memory(error, allowed))
    return 0


def _end_stopped(engine: Engine, job_id: str, fence: int) -> int:
    """End the row as stopped, if its owner asked for it; a service that shuts down did not."""
    with transaction(engine) as connection:
        ended = jobs.end_stopped(connection, job_id, fence)
    logger.info("stopped by its owner" if ended else "interrupted; the job goes back to the queue")
    return 0 if ended else EXIT_UNFINISHED


def _fail(engine: Engine, job_id: str, fence: int, message: str) -> int:
    # What a stranger's file says may hold halves of characters, which no database takes.
    message = message.encode("utf-8", "replace").decode("utf-8")
    logger.error("failed: %s", message)
    with transaction(engine) as connection:
        jobs.fail_job(connection, job_id, fence, message)
    return 0


def _error_number(error: OSError | SafetensorError) -> int | None:
    """Return the system's number of an error; safetensors tells it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _is_task(job: Job | None) -> bool:
    return job is not None and job.kind != CUSTOMIZATION


def _no_room(error: OSError | SafetensorError, made: str) -> str:
    number = _error_number(error)
    assert number is not None
    file = error.filename if isinstance(error, OSError) else None
    where = f" ({file})" if file else ""
    return (
        f"The disk is full, or a quota is used up{where}: {os.strerror(number)}. {made} could "
        "not be written, and nothing was published. Free some space in the data directory and "
        "create the job again."
    )


def _hand_over(engine: Engine, job: Job, error: str) -> int:
    """Let another process go on from the last checkpoint, in smaller portions."""
    cuts = int(job.run_plan.get(memory.MEMORY_CUTS, 0)) + 1
    reason = f"Memory ran out where this process cannot go on, but a new one can: {error}"
    with transaction(engine) as connection:
        now = jobs.get_job_by_id(connection, job.id)
        assert now is not None
        plan = {**now.run_plan, memory.MEMORY_CUTS: cuts}
        jobs.requeue(connection, job.id, job.fence, reason, run_plan=plan)
    logger.warning("%s", reason)
    return 0


def _no_memory_for_task(error: BaseException) -> str:
    return (
        f"The task does not fit into memory: the peak of its process was "
        f"{gibibytes(peak_memory_bytes())}, and the machine has "
        f"{gibibytes(memory.machine_memory())}. Free some memory, or give it less to do. The "
        f"last thing that was refused: {str(error)[:300] or type(error).__name__}"
    )


def _no_memory(error: BaseException, allowed: int) -> str:
    return (
        f"The job does not fit into memory: the process was allowed {gibibytes(allowed)}, its peak "
        f"was {gibibytes(peak_memory_bytes())}, and the machine has "
        f"{gibibytes(memory.machine_memory())}. It was refused more outside of a step, so smaller "
        "portions would not help. Nothing was published. A smaller model, adapters instead of full "
        "fine-tuning, or a machine with more memory may help. The last thing that was refused: "
        f"{str(error)[:300] or type(error).__name__}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
