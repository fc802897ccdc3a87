"""The custom model that a job starts from: what its row records of it, and where its files are.

The artifact is read where it lies. While a job that starts from it has not ended, the model cannot
be deleted, and the job's row tells `outcrop gc` of its files. So nothing has to be copied, and
there is no instant at which a crash could lose it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.artifact import folder_digest
from outcrop.models.catalog import ADAPTER, LoraConfig
from outcrop.settings import Settings
from outcrop.store.rows import CustomModel
from outcrop.train.plan import Parent, TrainPlan

ADAPTER_MEMBER = "adapter"
"""In the row of a model: the shape of its adapter, None where it has none."""


def describe_adapter(plan: TrainPlan) -> dict[str, Any] | None:
    """Return the adapter that a plan leaves behind, for the model's row; None for none."""
    if plan.method != ADAPTER:
        return None
    return {"rank": plan.lora_rank, "alpha": plan.lora_alpha, "targets": list(plan.lora_targets)}


def describe_parent(model: CustomModel) -> dict[str, Any]:
    """Return what the row of a job records of the model that it starts from."""
    return {
        "name": model.name,
        "modelArn": model.arn,
        "artifactPath": model.artifact_path,
        "artifactDigest": model.artifact_digest,
        ADAPTER_MEMBER: _adapter(model.spec),
    }


def plan_parent(spec: Mapping[str, Any]) -> Parent | None:
    """Return what a job's plan must know of its parent; None where it starts from a base model."""
    parent = spec.get("parent")
    if parent is None:
        return None
    adapter = parent[ADAPTER_MEMBER]
    return Parent(parent["name"], None if adapter is None else _lora(adapter))


def parent_artifact(settings: Settings, spec: Mapping[str, Any]) -> Path | None:
    """Return the folder a job goes on from, whole; None where it starts from a base model.

    Raises:
        ModelError: the folder is gone, or is not what was published.
    """
    parent = spec.get("parent")
    if parent is None:
        return None
    folder: Path = settings.data_dir / parent["artifactPath"]
    whose = (
        f"of the custom model {parent['name']} ({parent['modelArn']}), which the job starts from"
    )
    if not folder.is_dir():
        raise ModelError(
            f"The files {whose}, are gone. Create a job that starts from another model."
        )
    if folder_digest(folder) != parent["artifactDigest"]:
        raise ModelError(
            f"The files {whose}, are not those that were published: they are damaged or were "
            "changed. Create a job that starts from another model."
        )
    return folder


def _adapter(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    if ADAPTER_MEMBER in spec:
        found: dict[str, Any] | None = spec[ADAPTER_MEMBER]
        return found
    old = LoraConfig()  # models from before the shape could be chosen
    return {"rank": old.rank, "alpha": old.alpha, "targets": list(old.targets)}


def _lora(adapter: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(int(adapter["rank"]), float(adapter["alpha"]), tuple(adapter["targets"]))
