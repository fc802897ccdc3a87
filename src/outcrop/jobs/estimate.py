"""What a job will take and cost, and whether it can fit at all: said before anything has run.

Memory is foretold from the model's shape, disk from what an attempt writes. Where the data were
read, the longest record and the tokens are counted; where not, what holds for any data. What cannot
fit, whatever the data, is refused when the job is created. No torch is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from outcrop.errors import ApiError, ServiceQuotaExceededException, ValidationException
from outcrop.jobs import memory
from outcrop.meter import money, prices
from outcrop.meter.prices import PriceBook
from outcrop.models.catalog import ADAPTER, BaseModel, LoraConfig
from outcrop.models.weights import RECORD_FILE, SHIPPED_KEY, weights_folder
from outcrop.settings import Settings
from outcrop.train.own_parameters import CLEAN
from outcrop.train.plan import TrainPlan
from outcrop.train.portions import gibibytes
from outcrop.train.prediction import WIDE_BYTES, ModelShape, computing_bytes

KEPT_CHECKPOINTS = 3
"""Two that are kept, and one that is being written; train/checkpoint.py says how many are kept."""
STATE_NUMBERS = 3
"""Of each trained number in a checkpoint: itself and both moments."""
BEST_STATES = 2
"""Where a job may stop early: the best state, and one that takes its place."""
DATA_COPIES = 2
"""The attempt's own copy, and the one for the owner in the embedded object store."""
PUBLISHED_BYTES = 2
"""Of a number of converted base weights: bfloat16."""


@dataclass(frozen=True)
class Counts:
    """What was counted in the data of a job."""

    tokens_per_epoch: int
    """Of the training records, without those that are drawn off for validation."""
    longest_tokens: int
    """Of the longest of them."""


@dataclass(frozen=True)
class MemoryNeed:
    """In bytes, of a training process."""

    needed: int
    """For its longest record; for the longest that it may have where the data were not read."""
    least: int
    """However short its records are."""
    allowed: int
    machine: int


@dataclass(frozen=True)
class DiskNeed:
    """In bytes, in the data directory while a job runs."""

    data: int
    checkpoints: int
    artifact: int
    weights: int
    """Of base weights that are still to be converted."""
    free: int

    @property
    def needed(self) -> int:
        """All of it together."""
        return self.data + self.checkpoints + self.artifact + self.weights


@dataclass(frozen=True)
class Estimate:
    """What is known of a job that has not begun."""

    plan: TrainPlan
    counts: Counts | None
    memory: MemoryNeed
    disk: DiskNeed
    tokens_per_second: float | None
    """Of the account's last job of the same weights and method."""
    measured_by: str
    currency: str
    training_price: Decimal | None
    """Of 1,000 tokens."""
    storage_price: Decimal | None
    """Of the model for a month."""
    refusal: ApiError | None
    """Why it would be refused when it is created."""

    @property
    def num_tokens(self) -> int | None:
        """Of all epochs; None where the data were not read."""
        return None if self.counts is None else self.plan.num_epochs * self.counts.tokens_per_epoch


def estimate_job(
    settings: Settings,
    base: BaseModel,
    plan: TrainPlan,
    *,
    cores: int,
    data_bytes: int,
    book: PriceBook,
    parent: Path | None = None,
    counts: Counts | None = None,
    speed: tuple[str, float] | None = None,
) -> Estimate:
    """Return what a job will take and cost on this machine.

    Args:
        cores: of the job.
        data_bytes: of its training and validation files.
        parent: the artifact of the custom model that it starts from.
        counts: None where the data were not read.
        speed: name and tokens a second of an earlier job of the same weights and method.
    Raises:
        ModelError: the weights do not exist, or do not tell their shape.
    """
    shape = memory.model_shape(settings, base.weights)
    needs_memory = memory_need(settings, base, plan, cores, counts)
    needs_disk = disk_need(settings, base, plan, shape, data_bytes, parent)
    root = base.customization_id
    training = book.find(prices.TRAINING, root)
    storage = book.find(prices.STORAGE, root)
    return Estimate(
        plan=plan,
        counts=counts,
        memory=needs_memory,
        disk=needs_disk,
        tokens_per_second=None if speed is None else speed[1],
        measured_by="" if speed is None else speed[0],
        currency=book.currency,
        training_price=None if training is None else training.amount,
        storage_price=None if storage is None else storage.amount,
        refusal=_too_much_memory(settings, base, plan, needs_memory) or _no_disk(needs_disk),
    )


def check_fits(
    settings: Settings,
    base: BaseModel,
    plan: TrainPlan,
    *,
    cores: int,
    data_bytes: int,
    parent: Path | None = None,
) -> None:
    """Refuse a job that cannot fit into this machine, unless the settings say not to look.

    Raises:
        ValidationException: it needs more memory than it may have, however short its records.
        ServiceQuotaExceededException: it needs more disk than is free.
    """
    if not settings.refuse_unfit_jobs:
        return
    shape = memory.model_shape(settings, base.weights)
    refusal = _too_much_memory(
        settings, base, plan, memory_need(settings, base, plan, cores)
    ) or _no_disk(disk_need(settings, base, plan, shape, data_bytes, parent))
    if refusal is not None:
        raise refusal


def memory_need(
    settings: Settings,
    base: BaseModel,
    plan: TrainPlan,
    cores: int,
    counts: Counts | None = None,
) -> MemoryNeed:
    """Return what memory a job needs and may have on this machine."""
    shape = memory.model_shape(settings, base.weights)
    asked = memory.asked_for(settings, base, plan, cores)
    allowed = memory.given(settings, asked)
    needed = asked
    if counts is not None:
        needed = memory.needed_for(shape, plan, counts.longest_tokens, allowed, cores)
    return MemoryNeed(
        needed=needed,
        least=memory.least_needed(shape, plan, cores),
        allowed=allowed,
        machine=memory.machine_memory(),
    )


def disk_need(
    settings: Settings,
    base: BaseModel,
    plan: TrainPlan,
    shape: ModelShape,
    data_bytes: int,
    parent: Path | None = None,
) -> DiskNeed:
    """Return what disk a job needs, and what is free where the data directory is."""
    adapter = LoraConfig(plan.lora_rank, plan.lora_alpha, plan.lora_targets)
    is_adapter = plan.method == ADAPTER
    trained = shape.adapter_parameters(adapter) if is_adapter else shape.parameters
    states = KEPT_CHECKPOINTS * STATE_NUMBERS + (BEST_STATES if plan.early_stopping else 0)
    number_bytes = WIDE_BYTES if is_adapter else computing_bytes()
    return DiskNeed(
        data=data_bytes * DATA_COPIES * (2 if plan.data_policy == CLEAN else 1),
        checkpoints=states * WIDE_BYTES * trained,
        # An adapter over a custom model's own weights is published together with those.
        artifact=number_bytes * trained + (_folder_bytes(parent) if is_adapter else 0),
        weights=_unconverted_bytes(settings, base, shape),
        free=shutil.disk_usage(settings.data_dir).free,
    )


def describe_estimate(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as our operations answer it; what is not known is absent."""
    num_tokens, speed = estimate.num_tokens, estimate.tokens_per_second
    price, storage = estimate.training_price, estimate.storage_price
    disk = asdict(estimate.disk)
    members: dict[str, Any] = {
        "numEpochs": estimate.plan.num_epochs,
        "numTokens": num_tokens,
        "tokensPerSecond": speed,
        "measuredBy": estimate.measured_by or None,
        "seconds": round(num_tokens / speed, 1) if num_tokens is not None and speed else None,
        "memory": {f"{name}Bytes": value for name, value in asdict(estimate.memory).items()},
        "disk": {
            "neededBytes": estimate.disk.needed,
            "checkpointBytes": disk.pop("checkpoints"),
            **{f"{name}Bytes": value for name, value in disk.items()},
        },
        "currency": estimate.currency,
        "trainingPrice": None if price is None else money.shown(price),
        "storagePrice": None if storage is None else money.shown(storage),
        "fits": estimate.refusal is None,
        "refusal": None if estimate.refusal is None else estimate.refusal.message,
    }
    if estimate.counts is not None:
        members["tokensPerEpoch"] = estimate.counts.tokens_per_epoch
        members["longestTokens"] = estimate.counts.longest_tokens
    if price is not None and num_tokens is not None:
        members["trainingAmount"] = money.shown(money.amount(num_tokens, price, 1000))
    return {name: value for name, value in members.items() if value is not None}


def parent_folder(settings: Settings, spec: Mapping[str, Any]) -> Path | None:
    """Return where the custom model lies that a job's row says it starts from; None for none."""
    parent = spec.get("parent")
    return None if parent is None else settings.data_dir / str(parent["artifactPath"])


def _folder_bytes(folder: Path | None) -> int:
    if folder is None:
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _unconverted_bytes(settings: Settings, base: BaseModel, shape: ModelShape) -> int:
    if base.weights != SHIPPED_KEY:
        return 0  # an operator's folder is used where it stands
    is_there = (weights_folder(settings, base.weights) / RECORD_FILE).is_file()
    return 0 if is_there else PUBLISHED_BYTES * shape.parameters


def _too_much_memory(
    settings: Settings, base: BaseModel, plan: TrainPlan, need: MemoryNeed
) -> ApiError | None:
    if need.least <= need.allowed or memory.may_use_gpu(settings):
        return None
    change = (
        "A smaller adapterRank or fewer adapterTargets, a smaller base model"
        if plan.method == ADAPTER
        else "Adapters (hyperparameter method = adapter), a smaller base model"
    )
    return ValidationException(
        f"The job cannot fit into memory, whatever its data: to train {base.full_name} with method "
        f"{plan.method}, a process needs at least {gibibytes(need.least)}, however short the "
        f"records are; {gibibytes(need.allowed)} are allowed, of {gibibytes(need.machine)} that "
        f"this machine has. {change} or a machine with more memory helps; where workers run on "
        "other machines, set refuse_unfit_jobs to false."
    )


def _no_disk(need: DiskNeed) -> ApiError | None:
    if need.needed <= need.free:
        return None
    return ServiceQuotaExceededException(
        f"The job does not fit onto the disk: it needs about {gibibytes(need.needed)} in the data "
        f"directory (copies of the data {gibibytes(need.data)}, checkpoints "
        f"{gibibytes(need.checkpoints)}, the model {gibibytes(need.artifact)}, base weights that "
        f"are still to be converted {gibibytes(need.weights)}), and {gibibytes(need.free)} are "
        "free. Delete custom models or objects, run `outcrop gc`, or give the data directory more "
        "room; smaller data, or adapters instead of full fine-tuning, need less."
    )
