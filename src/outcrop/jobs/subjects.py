"""What an export is of: a custom model, as the row of the export records it. Loads no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.catalog import BaseModel, Catalog
from outcrop.store.rows import CustomModel

WRITING, UPLOADING = "writing", "uploading"
"""The stages of an export."""
OUTPUT_MEMBER = "outputDataConfig.s3Uri"


def describe_subject(model: CustomModel) -> dict[str, Any]:
    """Return what the row of an export records of the model, for its card."""
    spec = model.spec
    return {
        "modelName": model.name,
        "modelArn": model.arn,
        "artifactDigest": model.artifact_digest,
        "baseModelId": spec.get("baseModelId", model.base_model_id),
        "weights": spec.get("weights"),
        "customizationType": model.customization_type,
        "createdAt": f"{model.created_at:%Y-%m-%dT%H:%M:%SZ}",
        "jobName": model.job_name,
        "modelHyperParameters": dict(model.hyper_parameters),
        "metrics": dict(model.metrics),
        "data": [
            {name: row[name] for name in ("role", "sha256", "numBytes") if name in row}
            for row in spec.get("data", ())
        ],
    }


def base_of(catalog: Catalog, subject: dict[str, Any]) -> BaseModel:
    """Return the base model at the root, with the weights that the custom model was made from.

    Raises:
        ModelError: no model of the catalogue has them any more.
    """
    key = subject["weights"]
    for base in catalog.models:
        if base.weights == key:
            return base
    imported = catalog.resolve(key) if key else None  # imported weights are in no list
    if imported is not None:
        return imported
    named = catalog.resolve(subject["baseModelId"])
    if named is None:
        raise ModelError(
            f"The base model {subject['baseModelId']} of {subject['modelName']} is not in the "
            "catalogue any more. Add it again with `outcrop models add`."
        )
    return replace(named, weights=key or named.weights)
