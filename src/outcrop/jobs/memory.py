"""How much memory a job needs, is given, and died of.

A job asks for what the worst of its model's allowed records would take. On the machine that runs it
it is given that, or what the machine has. In the validation stage, when its records are known, its
steps are cut so that they fit; what cannot be made to fit is refused there.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from outcrop.data.records import Example
from outcrop.errors import OutOfMemoryError
from outcrop.models.catalog import BaseModel, LoraConfig
from outcrop.models.weights import SHIPPED_KEY, weights_folder
from outcrop.train.plan import TrainPlan
from outcrop.train.portions import KEPT_TOKENS, LEAST_TOKENS, Portions, gibibytes
from outcrop.train.prediction import MEMORY_TOLERANCE, SHIPPED_SHAPE, ModelShape, predict_memory

if TYPE_CHECKING:
    from outcrop.settings import Settings

MEMORY_FOR_THE_REST = 2 << 30
"""Bytes left to the gateway, the object store and a model server."""
MEMORY_KILLS = "memoryKills"
"""In a job's run plan: how often the system ended an attempt for its memory."""
MEMORY_CUTS = "memoryCuts"
"""In a job's run plan: how often portions are to be made smaller because of such ends."""
OOM_SCORE = 500
"""Added to an attempt's score, so that the kernel ends it and not the database or the gateway."""
KEPT_STEP = 128
"""Tokens between two lengths that are tried for the longest record that keeps its activations."""
NEAR_ITS_BOUND = 0.9
"""A process that was killed with such a share of its memory resident may have died of it."""

_CGROUP_LIMITS = (
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""Where Linux has a driver of a GPU that torch computes on; asking torch itself takes seconds."""
_KILL_COUNTS = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that this process is in."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            found.append(int(Path(file).read_text(encoding="ascii")))
    return min(found)


def memory_for_jobs() -> int:
    """Return what of this machine's memory all jobs together may take."""
    total = machine_memory()
    return max(total - MEMORY_FOR_THE_REST, total // 2)


def model_shape(settings: Settings, weights: str) -> ModelShape:
    """Return the shape of a model's weights, also of those that are not converted yet.

    Raises:
        ModelError: they do not exist, or do not tell their shape.
    """
    folder = weights_folder(settings, weights)
    if weights == SHIPPED_KEY and not (folder / "config.json").is_file():
        return SHIPPED_SHAPE
    return ModelShape.read(folder)


def asked_for(settings: Settings, base: BaseModel, plan: TrainPlan, lanes: int) -> int:
    """Return the bytes that a job asks for: enough for the longest records that it may have.

    Args:
        lanes: rows that are computed at the same time: one for each core of the job.
    """
    limit = base.token_limit(plan.batch_size)
    longest = min(base.context_tokens, (limit and limit.total) or base.context_tokens)
    portions = Portions.preferred(longest, lanes)
    needed = _needed(model_shape(settings, base.weights), plan, portions, longest, lanes)
    return round(needed * (1 + MEMORY_TOLERANCE))


def given(settings: Settings, asked: int) -> int:
    """Return the bytes that an attempt of a job may take on this machine."""
    return min(asked, machine_memory() if settings.job_slots else memory_for_jobs())


def choose_portions(
    shape: ModelShape,
    plan: TrainPlan,
    examples: Sequence[Example],
    allowed: int,
    lanes: int = 2,
) -> Portions:
    """Return the largest useful portions that fit into the allowed bytes.

    Args:
        lanes: rows that are computed at the same time: one for each core of the job.

    Raises:
        OutOfMemoryError: not even the longest record fits alone; with the figures.
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    for portions in _preferred(longest, lanes):
        if _needed(shape, plan, portions, longest, lanes) <= allowed:
            return portions
    needed = _needed(shape, plan, portions, longest, lanes)
    raise OutOfMemoryError(_refusal(examples, longest, needed, allowed))


def least_needed(shape: ModelShape, plan: TrainPlan, lanes: int) -> int:
    """Return the bytes of memory that a job needs however short its records are: the last portions
    that `choose_portions` tries, and no record longer than those.
    """
    return _needed(shape, plan, Portions(LEAST_TOKENS, 0), 1, lanes)


def needed_for(shape: ModelShape, plan: TrainPlan, longest: int, allowed: int, lanes: int) -> int:
    """Return the bytes of memory that a job takes with the portions that it would be given; the
    least that it can do with where none fit.

    Args:
        longest: tokens of its longest record.
        lanes: rows that are computed at the same time: one for each core of the job.
    """
    needed = 0
    for portions in _preferred(longest, lanes):
        needed = _needed(shape, plan, portions, longest, lanes)
        if needed <= allowed:
            break
    return needed


def may_use_gpu(settings: Settings) -> bool:
    """Say whether a job may train on a GPU of this machine: then its memory is not what counts."""
    return settings.train_device != "cpu" and any(Path(path).exists() for path in _GPU_FILES)


def portions_of_job(
    settings: Settings,
    shape: ModelShape,
    plan: TrainPlan,
    examples: Sequence[Example],
    allowed: int,
    lanes: int,
) -> Portions:
    """Return the portions of a job; where a GPU may train it, this machine's memory refuses none.

    Raises:
        OutOfMemoryError: not even the longest record fits alone, and there is no GPU.
    """
    try:
        return choose_portions(shape, plan, examples, allowed, lanes)
    except OutOfMemoryError:
        if not may_use_gpu(settings):
            raise
        return Portions(LEAST_TOKENS, 0)


def _preferred(longest: int, lanes: int) -> Iterator[Portions]:
    """Yield portions, the fastest first: long records alone compute their activations twice, then
    micro-batches get smaller, and only then all activations are computed twice.
    """
    sizes = [Portions.preferred(longest, lanes).tokens]
    while sizes[-1] > LEAST_TOKENS:
        sizes.append(max(sizes[-1] // 2, LEAST_TOKENS))
    for tokens in sizes:
        yield Portions(tokens, max(KEPT_TOKENS, tokens))
        if longest > tokens:
            for kept in range(KEPT_TOKENS - KEPT_STEP, tokens - 1, -KEPT_STEP):
                yield Portions(tokens, kept)
    for tokens in sizes:
        yield Portions(tokens, 0)


def _refusal(examples: Sequence[Example], longest: int, needed: int, allowed: int) -> str:
    number = next(
        number for number, example in enumerate(examples, 1) if len(example.input_ids) == longest
    )
    return (
        f"The job does not fit into memory. Training record {number}, the longest, has {longest:,} "
        f"tokens, for which a training process needs about {gibibytes(needed)}, with activations "
        f"that are computed twice; {gibibytes(allowed)} are allowed, of "
        f"{gibibytes(machine_memory())} that the machine has. Nothing was trained. Shorter "
        "records, a smaller model, adapters instead of full fine-tuning or a machine with more "
        "memory may help."
    )


def _needed(
    shape: ModelShape, plan: TrainPlan, portions: Portions, longest: int, lanes: int
) -> int:
    """Return the peak of a run with records of up to so many tokens, all of which carry loss."""
    sizes = {portions.tokens, min(longest, portions.kept_tokens), longest}
    return max(
        predict_memory(
            *(shape, plan.method, size, size),
            adapter=LoraConfig(plan.lora_rank, plan.lora_alpha, plan.lora_targets),
            is_recomputed=size > portions.kept_tokens,
            # Up to the bound there may be several records, and so rows at the same time.
            record_tokens=size // lanes if size <= portions.tokens else size,
            lanes=lanes,
        )
        for size in sizes
        if 0 < size <= max(longest, portions.tokens)
    )


def oom_kills() -> int | None:
    """Return how many processes the kernel has ended for memory since it started; None: unknown.

    Source: /proc/vmstat, oom_kill (Linux 4.13 and later; it counts those of all control groups);
    memory.events of control groups version 2, where the first cannot be read.
    """
    for file in _KILL_COUNTS:
        with contextlib.suppress(OSError, ValueError):
            for line in Path(file).read_text(encoding="ascii").splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return None


def died_of_memory(code: int, kill_was_seen: bool | None, peak: int, allowed: int) -> bool:
    """Say whether an attempt that nobody asked to end was ended by the system for its memory.

    Args:
        code: its exit code.
        kill_was_seen: whether the kernel counted an end for memory just then; None where the system
            keeps no such count, and the attempt's size has to tell.
        peak: the most that it reported to have resident, in bytes.
        allowed: what it was given, in bytes.
    """
    if code != -signal.SIGKILL:
        return False
    return peak >= NEAR_ITS_BOUND * allowed if kill_was_seen is None else kill_was_seen


def offer_to_be_killed_first() -> None:
    """Let the kernel, where it needs memory, end this process before the others of the service."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
