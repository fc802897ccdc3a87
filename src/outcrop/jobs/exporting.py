"""Write a custom model into a folder so that others can use it: files, card, and manifest last.

Called by an export's attempt and by `outcrop models export`. Begins to load torch when it is
called, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outcrop.data.render import FALLBACK_TEMPLATE
from outcrop.ids import is_imported
from outcrop.jobs.subjects import base_of
from outcrop.models.artifact import folder_digest, read_artifact
from outcrop.models.catalog import BaseModel, load_catalog
from outcrop.models.describe import describe_model
from outcrop.models.exported import (
    ADAPTER,
    CARD,
    GGUF,
    Origin,
    model_card,
    write_manifest,
)
from outcrop.models.tokenizer import Tokenizer
from outcrop.models.weights import ensure_weights, weights_folder
from outcrop.settings import Settings

_BEGINNING = "{{ bos_token if adds_bos else '' }}"
"""Of the template that stands in for one; no other program knows `adds_bos`."""


def write_export(
    settings: Settings,
    subject: dict[str, Any],
    artifact: Path,
    folder: Path,
    form: str,
    data_type: str,
) -> dict[str, Any]:
    """Write a custom model into a folder that is made for it; returns the manifest.

    The same model gives the same bytes.

    Args:
        subject: of `subjects.describe_subject`.
        artifact: the model's folder.
        form, data_type: of `check_form`.
    Raises:
        ModelError: the model, or its base, cannot be read or not be written so.
    """
    # It brings torch, which takes seconds.
    from outcrop.models import export
    from outcrop.models.gguf_file import Described

    base = base_of(load_catalog(settings), subject)
    weights = ensure_weights(settings, base.weights)
    origin = _origin(settings, base, subject, artifact)
    template = _portable_template(weights)
    folder.mkdir(parents=True)
    if form == ADAPTER:
        export.export_adapter(artifact, folder, base.full_name)
    elif form == GGUF:
        described = Described(
            origin.model_name,
            f"{origin.customization_type} of {base.full_name}, base weights {origin.base_digest}",
            base.license,
        )
        export.export_gguf(weights, artifact, folder, data_type, described, template=template)
    else:
        export.export_merged(weights, artifact, folder, data_type, template=template)
    (folder / CARD).write_text(model_card(origin, form, data_type), encoding="utf-8")
    return write_manifest(folder, origin, form, data_type)


def _origin(settings: Settings, base: BaseModel, subject: dict[str, Any], artifact: Path) -> Origin:
    found = read_artifact(artifact)
    if is_imported(base.weights):
        digest = folder_digest(weights_folder(settings, base.weights))
    else:
        digest = describe_model(settings, base)["weights"]["digest"]
    return Origin(
        model_name=subject["modelName"],
        model_arn=subject["modelArn"],
        artifact_digest=subject["artifactDigest"],
        base_name=base.full_name,
        base_license=base.license,
        base_origin=base.origin,
        base_precision=base.quantization,
        base_digest=digest,
        customization_type=subject["customizationType"],
        created_at=subject["createdAt"],
        job_name=subject["jobName"],
        method="full" if found.adapter is None else "adapter",
        has_own_weights=found.weights is not None,
        hyper_parameters=subject["modelHyperParameters"],
        metrics=subject["metrics"],
        data=tuple(subject["data"]),
    )


def _portable_template(weights: Path) -> str:
    beginning = "{{ bos_token }}" if Tokenizer(weights).adds_bos else ""
    return FALLBACK_TEMPLATE.replace(_BEGINNING, beginning)
