"""One frozen dataclass a table: what other rooms see of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from functools import cache
from typing import Any, Generic, Literal, TypeVar, cast

import sqlalchemy as sa

from outcrop.ids import IMPORTED_FOLDER

JobStatus = Literal["queued", "running", "stopping", "completed", "failed", "stopped"]
T = TypeVar("T")
CUSTOMIZATION, DATA_TASK, BATCH = "customization", "data", "batch"
"""The kinds of jobs: one trains a model, one works on data, one asks a model. Each kind has a line
of its own."""
IMPORT, CREATION, COPY = "import", "creation", "copy"
"""Those that bring a model: one imports one, one makes a custom model of weights in S3, one copies
a custom model from another region."""
EXPORT, FROM_CHECKPOINT = "export", "checkpoint"
"""Those that export a model, and make one of a stopped job's checkpoint."""


@dataclass(frozen=True)
class NewJob:
    """A job to be queued."""

    id: str
    account: str
    region: str
    kind: str
    """What it does, one of the kinds above."""
    arn: str
    name: str
    owner_principal: str
    """ARN of who created it."""
    spec: dict[str, Any]
    """What is to be done, as its kind understands it."""
    stages: tuple[str, ...]
    """Names of its stages in order."""
    cores: int
    memory_bytes: int
    model_name: str | None = None
    """Name of the model it will make."""
    uses_model_arn: str | None = None
    """ARN of the custom model that it works with, which cannot be deleted before the job's end."""
    expires_at: datetime | None = None
    """Until when a batch job may run."""
    run_plan: dict[str, Any] = field(default_factory=dict)
    """What was decided for its run already, where it goes on from another job."""


@dataclass(frozen=True)
class Job:
    """A job as it stands."""

    id: str
    account: str
    region: str
    kind: str
    arn: str
    name: str
    status: JobStatus
    owner_principal: str
    spec: dict[str, Any]
    model_name: str | None
    result: dict[str, Any] | None
    """What came of it, once it is completed."""
    failure_message: str | None
    progress: dict[str, Any]
    """What its attempt last reported."""
    created_at: datetime
    last_modified_at: datetime
    ended_at: datetime | None
    attempts: int
    """How often a worker has claimed it."""
    lost_attempts: int
    """How many of them ended without having ended the job and without having been asked to."""
    worker: str | None
    fence: int
    """Grows with every claim; writes of an older claim change nothing."""
    heartbeat: int
    """Grows while its holder lives."""
    cores: int
    memory_bytes: int
    run_plan: dict[str, Any]
    """What was decided for its run, once, so that every attempt computes the same."""
    phase: str
    """Of a batch job: what its status does not say by itself, see `store/batches.py`."""
    expires_at: datetime | None
    """Until when a batch job may run."""


@dataclass(frozen=True)
class JobSummary:
    """What a list says of a job: less to read than all of it."""

    id: str
    arn: str
    name: str
    status: JobStatus
    spec: dict[str, Any]
    result: dict[str, Any] | None
    failure_message: str | None
    created_at: datetime
    last_modified_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True)
class LiveJob:
    """What the queue needs to know of a job that has not ended."""

    id: str
    account: str
    status: JobStatus
    worker: str | None
    fence: int
    heartbeat: int
    lost_attempts: int
    cores: int
    memory_bytes: int
    kind: str


@dataclass(frozen=True)
class Stage:
    """A part of a job, as statusDetails shows it."""

    status: str
    created_at: datetime | None
    last_modified_at: datetime | None


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job."""

    id: int
    at: datetime
    level: str
    type: str
    message: str
    data: dict[str, Any]


@dataclass(frozen=True)
class StepMetric:
    """What a job measured in one optimizer step."""

    step: int
    """Counts from 0."""
    epoch: int
    loss: float
    perplexity: float | None
    """None where it is infinite."""
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float
    peak_memory_bytes: int
    micro_batch_tokens: int


@dataclass(frozen=True)
class ValidationMetric:
    """A job's loss on its validation records at one moment."""

    step: int
    """How many steps had been taken: 0 is the base model."""
    epoch: int
    loss: float
    perplexity: float | None
    """None where it is infinite."""


@dataclass(frozen=True)
class NewCustomModel:
    """A model to be published."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    base_model_id: str
    base_model_arn: str
    foundation_model_arn: str
    customization_type: str
    hyper_parameters: dict[str, str]
    spec: dict[str, Any]
    metrics: dict[str, Any]
    artifact_path: str
    """Folder, relative to the data directory."""
    artifact_digest: str
    job_arn: str | None = None
    job_name: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomModel:
    """A custom model."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    job_arn: str | None
    job_name: str | None
    base_model_id: str
    base_model_arn: str
    foundation_model_arn: str
    customization_type: str
    hyper_parameters: dict[str, str]
    spec: dict[str, Any]
    metrics: dict[str, Any]
    artifact_path: str
    artifact_digest: str
    status: str
    """Creating, Active or Failed."""
    created_at: datetime
    creation_job_id: str | None
    """The job that makes it of weights in S3; None of a model that was trained or copied."""
    failure_message: str | None

    @property
    def is_own_base(self) -> bool:
        """Whether its artifact is a whole model that needs no base weights: it is its own base."""
        return self.artifact_path.startswith(f"{IMPORTED_FOLDER}/")


@dataclass(frozen=True)
class NewImportedModel:
    """An imported model to be published."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    job_arn: str
    job_name: str
    weights: str
    """Key of its weights, which is the id of it as a base model."""
    architecture: str
    instruct: bool
    """Whether it has a chat template."""
    spec: dict[str, Any]
    """Where it came from, as it was asked for."""
    digest: str
    """Of its folder."""
    num_bytes: int
    """Of its weights."""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImportedModel:
    """An imported model."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    job_arn: str
    job_name: str
    weights: str
    architecture: str
    instruct: bool
    spec: dict[str, Any]
    digest: str
    num_bytes: int
    created_at: datetime


@dataclass(frozen=True)
class NewProvisionedModel:
    """A throughput to be created."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    weights: str
    """Key of the base weights that serve it."""
    model_arn: str
    foundation_model_arn: str
    model_units: int
    commitment: str | None = None
    """OneMonth, SixMonths or None."""
    commitment_expires_at: datetime | None = None
    """End of the first term; None has it follow from the commitment."""


@dataclass(frozen=True)
class ProvisionedModel:
    """A provisioned throughput."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    weights: str
    model_arn: str
    """Of the model that answers."""
    desired_model_arn: str
    """Another one while it is Updating."""
    desired_weights: str
    """Key of the base weights of that one."""
    foundation_model_arn: str
    model_units: int
    desired_model_units: int
    status: str
    """Creating, InService, Updating or Failed."""
    commitment: str | None
    commitment_expires_at: datetime | None
    """End of its first term, until which it cannot be deleted."""
    failure_message: str | None
    created_at: datetime
    last_modified_at: datetime


@dataclass(frozen=True)
class ModelServer:
    """A model server that somebody wants, or that runs."""

    key: str
    state: str
    """wanted, starting, ready or failed."""
    address: str | None
    pid: int | None
    error: str | None
    wanted_at: datetime
    last_used_at: datetime


@dataclass(frozen=True)
class UsageKey:
    """Who was answered by what, in which hour."""

    account: str
    region: str
    model_arn: str
    throughput_arn: str
    """Of the provisioned throughput that was asked; empty on demand."""
    hour: datetime
    """Its beginning, in UTC."""
    endpoint_arn: str = ""
    """Of the deployment or the inference profile that was asked; empty where neither was."""
    batch: bool = False
    """Whether a batch job asked."""


@dataclass(frozen=True)
class TokenUsage:
    """What was answered under one key."""

    requests: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list."""

    items: Sequence[T]
    next: tuple[int, str] | None
    """Where the next page begins; None at the end."""


def from_row(cls: type[T], row: sa.Row[Any]) -> T:
    """Build a dataclass from the columns of the same names."""
    mapping = row._mapping
    return cls(**{name: mapping[name] for name in _names(cast(Any, cls))})


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(cls))
