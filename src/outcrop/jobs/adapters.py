"""An adapter in S3 that becomes a custom model: of which base it is, and whether it fits that.

It is in PEFT's layout, plain LoRA on linear layers. The base that it names must be of the catalogue
or an imported model of the account; it is held against that base's layers one by one, and written
anew in the form of those that are trained here, so that what serves one serves the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.errors import ModelError
from outcrop.ids import foundation_model_arn
from outcrop.jobs.incoming import copy_files
from outcrop.jobs.model_places import Found
from outcrop.jobs.parents import ADAPTER_MEMBER
from outcrop.models import incoming
from outcrop.models.artifact import folder_digest
from outcrop.models.catalog import OWN_HYPER_PARAMETERS, BaseModel, Catalog, load_catalog
from outcrop.models.files import read_json
from outcrop.models.safetensors_header import read_header
from outcrop.models.weights import ensure_weights
from outcrop.objects.client import ObjectStore
from outcrop.settings import Settings
from outcrop.store import imported_models
from outcrop.store.rows import Job

BASE_MEMBER = "base_model_name_or_path"
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "modules_to_save": (None, []),
    "use_dora": (None, False),
    "use_rslora": (None, False),
    "trainable_token_indices": (None, [], {}),
}
"""Members of adapter_config.json, and the values with which an adapter is plain LoRA."""
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SHOWN = 100


@dataclass(frozen=True)
class MadeAdapter:
    """An adapter in the attempt's folder, and what the model's row says of it."""

    folder: Path
    columns: dict[str, Any]


@dataclass(frozen=True)
class _Base:
    model: BaseModel
    arn: str


def bring_adapter(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    found: Found,
    should_stop: Callable[[], bool],
) -> MadeAdapter:
    """Bring an adapter here and check that it fits the base it names.

    Raises:
        ModelError: it cannot be used; the message names the member or the tensor, and what is
            allowed.
        ObjectStoreError: an object is gone, or the store is away.
        StopRequested: `should_stop` answered True.
    """
    listed = found.listed
    listed.check_names()
    names = (incoming.ADAPTER_CONFIG, incoming.ADAPTER_WEIGHTS)
    if incoming.ADAPTER_WEIGHTS not in found.objects:
        raise ModelError(f"{listed.where} has no {incoming.ADAPTER_WEIGHTS}.")
    listed.check_sizes((incoming.ADAPTER_CONFIG,))
    folder = copy_files(settings, objects, job, found, names, should_stop)
    try:
        config = read_json(folder / incoming.ADAPTER_CONFIG)
    except (ModelError, RecursionError) as error:
        raise ModelError(
            f"{listed.where}{incoming.ADAPTER_CONFIG} is not a JSON object: {error}"
        ) from None
    base = _find_base(settings, engine, job, config.get(BASE_MEMBER), listed.where)
    _check_config(config, listed.where)
    config["target_modules"] = _targets(folder, base.model, listed.where)
    (folder / incoming.ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    weights = ensure_weights(settings, base.model.weights)
    shape = _rewrite(folder, weights, base.model, listed.where)
    columns = {
        "base_model_id": base.model.customization_id,
        "base_model_arn": base.arn,
        "foundation_model_arn": base.arn,
        "artifact_digest": folder_digest(folder),
        "spec": {
            "baseModelId": base.model.model_id,
            "weights": base.model.weights,
            ADAPTER_MEMBER: shape,
        },
    }
    return MadeAdapter(folder, columns)


def _find_base(settings: Settings, engine: Engine, job: Job, named: Any, where: str) -> _Base:
    """Return the base that an adapter names: by id, ARN or real name, or an imported model."""
    catalog = load_catalog(settings)
    if isinstance(named, str) and named:
        with engine.connect() as connection:
            imported = imported_models.get_imported_model(
                connection, job.account, job.region, named
            )
        if imported is not None:
            base = catalog.resolve(imported.weights)
            if base is not None:
                return _Base(base, imported.arn)
        base = catalog.resolve(named, region=job.region) or _by_real_name(catalog, named)
        if base is not None:
            return _Base(base, foundation_model_arn(job.region, base.customization_id))
    known = dict.fromkeys(model.full_name for model in catalog.models)
    raise ModelError(
        f"{where}{incoming.ADAPTER_CONFIG}: {BASE_MEMBER} is {str(named)[:_SHOWN]!r}, which is no "
        "model of the catalogue and no imported model of the account. Give the id or ARN of one "
        f"that ListFoundationModels lists, an imported model's name, or one of {', '.join(known)}."
    )


def _by_real_name(catalog: Catalog, named: str) -> BaseModel | None:
    """Return the model that hubs call so: the last part of the name counts, in any case."""
    wanted = named.rstrip("/").rpartition("/")[2].lower()
    found = [model for model in catalog.models if model.full_name.lower() == wanted]
    # Several ids share one model; its own name is the one that ends in none of Bedrock's families.
    own = [model for model in found if wanted.split("-")[0] in model.model_id]
    return next(iter(own or found), None)


def _check_config(config: dict[str, Any], where: str) -> None:
    for name, allowed in _PLAIN.items():
        if config.get(name) not in allowed:
            raise ModelError(
                f"{where}{incoming.ADAPTER_CONFIG}: {name} is {str(config.get(name))[:_SHOWN]}. "
                f"Only plain LoRA is served: {json.dumps(allowed[-1])}."
            )
    bounds = {row.name: row for row in OWN_HYPER_PARAMETERS}
    for name, own in (("r", "adapterRank"), ("lora_alpha", "adapterAlpha")):
        value, row = config.get(name), bounds[own]
        kinds = int if name == "r" else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_number or not row.minimum <= value <= row.maximum:  # type: ignore[operator]
            raise ModelError(
                f"{where}{incoming.ADAPTER_CONFIG}: {name} is {str(value)[:_SHOWN]}; it must be "
                f"from {row.minimum:g} to {row.maximum:g}."
            )


def _targets(folder: Path, base: BaseModel, where: str) -> list[str]:
    """Return the layers that the tensors are for: what the configuration says may be a pattern."""
    path = folder / incoming.ADAPTER_WEIGHTS
    with path.open("rb") as stream:
        entries = read_header(stream, path.stat().st_size, f"{where}{path.name}")
    found = set()
    for name, entry in entries.items():
        if not name.endswith((_A, _B)) or len(entry.shape) != 2:
            raise ModelError(
                f"{where}{path.name}: the tensor {name[:_SHOWN]} of shape {list(entry.shape)} is "
                f"neither lora_A nor lora_B of a linear layer."
            )
        if entry.dtype not in incoming.WEIGHT_DTYPES:
            raise ModelError(
                f"{where}{path.name}: the tensor {name[:_SHOWN]} has the dtype {entry.dtype}; "
                f"allowed are {', '.join(incoming.WEIGHT_DTYPES)}."
            )
        found.add(name.removesuffix(_A).removesuffix(_B).rpartition(".")[2])
    odd = sorted(found - set(base.lora.targets))
    if odd:
        raise ModelError(
            f"{where}{path.name} has an adapter on {odd[0]}; {base.full_name} can have one on "
            f"{', '.join(base.lora.targets)}."
        )
    return sorted(found)


def _rewrite(folder: Path, weights: Path, base: BaseModel, where: str) -> dict[str, Any]:
    """Check the adapter's numbers and shapes, and write it as ours are; returns its shape."""
    # Here, because it brings torch and transformers, which takes seconds.
    import torch

    from outcrop.models.lora import check_fits, load_adapter, save_adapter
    from outcrop.models.shapes import described_model

    try:
        adapter = load_adapter(folder)
        check_fits(adapter, described_model(weights, base.full_name))
    except ModelError as error:
        raise ModelError(str(error).replace(str(folder), where)) from error
    for name, pair in adapter.tensors.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pair):
            raise ModelError(
                f"{where}{incoming.ADAPTER_WEIGHTS}: the adapter of {name} holds numbers that are "
                "not finite."
            )
    save_adapter(adapter, folder, base.full_name)
    config = adapter.config
    return {"rank": config.rank, "alpha": config.alpha, "targets": list(config.targets)}
