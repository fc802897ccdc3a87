"""How a machine's cores are best used for a model: measured once, then kept.

Lanes compute whole rows apart and meet once a step. Where there is only one row, because a batch
is one record, threads can share out every operation of it; but then they meet hundreds of times a
step, and where other processes want the cores, they may be slower together than one of them alone.
How much that gains depends on machine and model, so it is measured with the model itself.

What was found decides in which order sums are rounded. It is therefore part of a job's record, and
a job that goes on uses what it began with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from outcrop.data.records import Example
from outcrop.models.compiled import processor
from outcrop.models.kernels import are_compiled
from outcrop.models.lanes import LARGEST_SHARE
from outcrop.store.files import write_private
from outcrop.train.gradients import gather_gradients
from outcrop.train.methods import Trainable

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the kept files; raised when the passes change so much that old ones mislead."""
WARM_UP_TOKENS = 16
MEASURED_TOKENS = 128
"""Of the row that is measured with: a short record, alone in its batch."""
OTHER_LOAD = 0.5
"""Threads that may want the cores besides as many as the cores are, for measuring to make sense."""
ROUNDS = 2
"""The best of so many counts: other load only ever makes it slower."""


@dataclass(frozen=True)
class ThreadPlan:
    """How a run uses its cores."""

    lanes: int
    """Rows at the same time, each computed by one thread."""
    row_threads: int
    """Threads that compute a single row together."""
    speedup: float
    """How many times as fast those are as one thread."""

    @property
    def largest_share(self) -> float:
        """Share of a step's tokens that one lane may get; with more, a single row is faster."""
        return min(1.0, 1.0 / self.speedup)


def assumed_threads(threads: int, *, has_lanes: bool) -> ThreadPlan:
    """Return the plan where nothing is measured: as on a quiet machine."""
    speedup = 1.0 if threads == 1 else 1 / LARGEST_SHARE
    return ThreadPlan(threads if has_lanes else 1, threads, speedup)


def choose_threads(trainable: Trainable, threads: int, folder: Path) -> ThreadPlan:
    """Return the kept plan for this machine and model, or measure and keep one.

    Args:
        threads: cores that the run may use.
        folder: where plans are kept.
    """
    file = folder / f"threads-{_key(trainable, threads)}.json"
    if file.is_file():
        try:
            return ThreadPlan(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("%s cannot be used and is measured again: %s", file.name, error)
    if os.getloadavg()[0] > threads + OTHER_LOAD:
        # Measuring would take minutes and tell of the other work, not of the machine.
        logger.info("other work wants the cores: every row is computed by one thread")
        return ThreadPlan(threads if trainable.flat is not None else 1, 1, 1.0)
    plan = _measure(trainable, threads)
    logger.info("measured for %d cores: %s", threads, plan)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_private(file, json.dumps(asdict(plan)).encode(), replace=True)
    except OSError as error:
        logger.warning("%s could not be kept: %s", file.name, error)
    return plan


def _measure(trainable: Trainable, threads: int) -> ThreadPlan:
    config: Any = trainable.model.config

    def compute(num_tokens: int, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        ids = [place % config.vocab_size for place in range(num_tokens + 1)]
        example = Example(ids, [place >= num_tokens * 7 / 8 for place in range(len(ids))])
        gather_gradients(trainable, [example])
        trainable.drop_gradients()

    before = torch.get_num_threads()
    seconds = {1: math.inf, threads: math.inf}
    try:
        compute(WARM_UP_TOKENS, threads)
        for _ in range(ROUNDS):
            for count in seconds:
                started = time.perf_counter()
                compute(MEASURED_TOKENS, count)
                seconds[count] = min(seconds[count], time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    speedup = max(1.0, round(seconds[1] / seconds[threads], 3))
    return ThreadPlan(
        # Lanes wait for each other once a step only: no load makes them slower than one of them.
        lanes=threads if trainable.flat is not None else 1,
        row_threads=threads if speedup > 1 else 1,
        speedup=speedup,
    )


def _key(trainable: Trainable, threads: int) -> str:
    """Return what says that a measurement still holds."""
    config: Any = trainable.model.config
    dtype = next(trainable.model.parameters()).dtype
    described = {
        "version": VERSION,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": threads,
        "dtype": str(dtype),
        "compiled": are_compiled(dtype),
        "method": trainable.plan.method,
        "model": config.to_json_string(use_diff=False),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]
