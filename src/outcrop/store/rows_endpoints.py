"""What other rooms see of rows by which a model is asked: deployments and inference profiles."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class NewDeployment:
    """A custom model deployment to be created."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    weights: str
    """Key of the base weights that serve it."""
    model_arn: str
    description: str | None = None


@dataclass(frozen=True)
class Deployment:
    """A custom model deployment."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    description: str | None
    weights: str
    model_arn: str
    """Of the custom model that answers."""
    status: str
    """Creating, Active or Failed."""
    failure_message: str | None
    update_status: str | None
    """Of the last update: Updating, UpdateCompleted or UpdateFailed; None where there was none."""
    update_model_arn: str | None
    """Of the custom model that it moves to, or moved to, or could not move to."""
    update_weights: str | None
    created_at: datetime
    last_updated_at: datetime


@dataclass(frozen=True)
class NewInferenceProfile:
    """An application inference profile to be created."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    model_arn: str
    """Of the base model that it was made from."""
    description: str | None = None


@dataclass(frozen=True)
class InferenceProfile:
    """An application inference profile; it never changes."""

    id: str
    account: str
    region: str
    arn: str
    name: str
    model_arn: str
    description: str | None
    created_at: datetime
