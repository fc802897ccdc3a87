"""What the command line shows of a base model, and how it adds one.

Turns a catalogue entry and the record of its weights into plain values, and a folder of the
operator's into an entry.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.models.catalog import (
    ALL_LINEARS,
    OWN_HYPER_PARAMETERS,
    BaseModel,
    families,
    load_catalog,
    shipped_models,
)
from outcrop.models.files import read_json
from outcrop.models.operator import (
    catalog_folder,
    check_folder,
    context_tokens,
    folder_digest,
    linear_layers,
    operator_entry,
)
from outcrop.models.tokenizer import Tokenizer
from outcrop.models.weights import RECORD_FILE, SHIPPED_KEY, weights_folder, weights_record
from outcrop.settings import Settings

MODEL_ID = re.compile(
    r"[a-z0-9-]{1,63}\.[a-z0-9-]{1,63}([.]?[a-z0-9-]{1,63})(:[a-z0-9-]{1,63}){0,2}"
)
"""Source: botocore's bedrock model, BaseModelIdentifier."""

MAX_NAME_LENGTH = 20
"""Source: botocore's bedrock model, BrandedName."""


def describe_model(settings: Settings, base: BaseModel) -> dict[str, Any]:
    """Return all that is known of a base model, for people: names, licence, digest, bounds."""
    folder = weights_folder(settings, base.weights)
    return {
        "modelId": base.model_id,
        "otherIds": list(base.ids[1:]),
        "realModel": base.full_name,
        "provider": base.provider_name,
        "license": base.license,
        "weights": {
            "origin": base.origin,
            "precision": base.quantization,
            "folder": str(folder),
            "digest": _digest(settings, base, folder),
        },
        "contextTokens": base.context_tokens,
        "maxOutputTokens": base.max_output_tokens,
        "customizations": list(base.customizations),
        "dataFormats": {name: list(base.formats(name)) for name in base.customizations},
        "bodyFamily": base.body_family,
        "hyperParameters": [asdict(row) for row in base.hyper_parameters],
        "learningRateFactor": dict(base.learning_rate_factor),
        "method": base.method,
        "adapter": {**asdict(base.lora), "targets": list(base.lora.targets)},
        "ownHyperParameters": [asdict(row) for row in OWN_HYPER_PARAMETERS],
        "bedrockRecordQuota": {
            name: asdict(base.record_quota(name)) for name in base.customizations
        },
        "bedrockTokenLimits": [asdict(limit) for limit in base.token_limits],
        "sources": list(base.sources),
    }


def add_model(
    settings: Settings,
    folder: Path | str,
    model_id: str,
    *,
    license: str | None = None,
    family: str | None = None,
    name: str | None = None,
    provider: str | None = None,
) -> BaseModel:
    """Offer the model of a folder under an id; the folder stays where it is.

    Args:
        folder: in Hugging Face's layout, with safetensors.
        model_id: a shipped id, which then means this model and keeps its bounds, or a new one.
        license: what the model may be used under; it is recorded, not judged.
        family: whose bounds and body a new id has; None takes "llama".
        name: the model's name as it is listed, at most 20 characters; None takes the folder's.
        provider: its maker as it is listed, at most 20 characters; None takes "operator".
    Raises:
        ModelError: the folder cannot be used, the id has not Bedrock's form or names a custom
            form of another model, or the licence is missing.
    """
    folder = Path(folder).expanduser().absolute()
    _check_names(settings, model_id, family)
    if not license:
        raise ModelError(
            f"The licence of the model in {folder} must be given: --license NAME. It is recorded "
            "and shown."
        )
    files = check_folder(folder)
    tokenizer = Tokenizer(folder)
    config = read_json(folder / "config.json")
    if tokenizer.vocab_size > config["vocab_size"]:
        raise ModelError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} tokens, the model "
            f"{config['vocab_size']}: they do not belong together."
        )
    digest = folder_digest(files)
    entry: dict[str, Any] = {
        "model_id": model_id,
        "family": family or "llama",
        "model_name": (name or folder.name)[:MAX_NAME_LENGTH],
        "provider_name": (provider or "operator")[:MAX_NAME_LENGTH],
        "full_name": name or folder.name,
        "license": license,
        "quantization": f"as in the folder ({config.get('torch_dtype') or config.get('dtype')})",
        "origin": "a folder of the operator",
        "context_tokens": context_tokens(folder, config),
        "weights": {
            "key": f"folder-{digest[:16]}",
            "folder": str(folder),
            "digest": digest,
            "files": {file.name: file.stat().st_size for file in files},
        },
    }
    layers = linear_layers(files)
    if layers and set(layers) != set(ALL_LINEARS):
        entry["adapter_targets"] = list(layers)
    _write_entry(catalog_folder(settings) / f"{_file_stem(model_id)}.toml", entry)
    added = load_catalog(settings).resolve(model_id)
    assert added is not None
    return added


def _check_names(settings: Settings, model_id: str, family: str | None) -> None:
    if not MODEL_ID.fullmatch(model_id):
        raise ModelError(
            f"{model_id!r} is no model id. It is made of [a-z0-9-], as in provider.model-v1:0."
        )
    if family is not None and family not in families():
        raise ModelError(f"There is no family {family!r}. Known are {', '.join(families())}.")
    found = load_catalog(settings).resolve(model_id)
    if found is not None and found.model_id != model_id:
        raise ModelError(f"{model_id} is another name of {found.model_id}. Add the model as that.")
    shipped = next((model for model in shipped_models() if model.model_id == model_id), None)
    if shipped is not None and family not in (None, shipped.family):
        raise ModelError(f"{model_id} is of the family {shipped.family}; leave the family out.")


def _digest(settings: Settings, base: BaseModel, folder: Path) -> str:
    """Return the recorded digest; nothing is read again or converted for it."""
    if base.weights != SHIPPED_KEY:
        return operator_entry(settings, base.weights).digest
    if (folder / RECORD_FILE).is_file():
        return str(weights_record(folder)["digest"])
    return "not converted yet: that is done at the first use"


def _file_stem(model_id: str) -> str:
    return model_id.replace(":", "_")


def _write_entry(file: Path, entry: dict[str, Any]) -> None:
    """Write the entry beside its place and rename it, so that nobody reads half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["# Written by `outcrop models add`."]
    tables: list[str] = []
    for name, value in entry.items():
        if isinstance(value, dict):
            tables.extend(_table_lines(name, value))
        else:
            lines.append(f"{name} = {_toml(value)}")
    being_written = file.with_suffix(f".tmp-{os.getpid()}")
    being_written.write_text("\n".join([*lines, *tables, ""]), encoding="utf-8")
    being_written.replace(file)


def _table_lines(name: str, table: dict[str, Any]) -> list[str]:
    plain = [
        f"{_toml(key)} = {_toml(value)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    nested = [
        line
        for key, value in table.items()
        if isinstance(value, dict)
        for line in _table_lines(f"{name}.{key}", value)
    ]
    return ["", f"[{name}]", *plain, *nested]


def _toml(value: str | int | list[str]) -> str:
    # A JSON string in ASCII is a TOML basic string, but for the escape of half a surrogate pair.
    return json.dumps(value)
