"""Models whose weights an account brought: where they lie, and how they stand for a base model.

Each has a folder below `models/imported/` in Hugging Face's layout, with a record beside the
weights that says what they are. The folder is made whole by the attempt that imports it and never
written to again. Its key names model and attempt, so that an attempt that lost its lease has made
another one, where nobody looks. Whose it is stands in the database; here are files only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from outcrop.errors import ModelError
from outcrop.ids import imported_path
from outcrop.models.files import read_json
from outcrop.settings import Settings

if TYPE_CHECKING:
    from outcrop.models.catalog import BaseModel

RECORD_FILE = "outcrop.json"
"""What the weights are, in their folder; written last."""
BODY_FAMILY = "imported"
"""Whose bodies InvokeModel takes."""
LIKE = "smollm2"
"""The family whose hyperparameters and quotas they have: the one whose bounds are our own."""
_REMEDY = "Import the model again."


@dataclass(frozen=True)
class Imported:
    """What the record of imported weights says."""

    name: str
    """As its owner called it."""
    architecture: str
    """As config.json names it."""
    instruct: bool
    """Whether it has a chat template."""
    dtype: str
    """What most of the weights are in, as safetensors names it."""
    num_parameters: int
    num_bytes: int
    """Of the weights."""
    context_tokens: int
    adapter_targets: tuple[str, ...]
    """Last part of the names of the linear layers."""
    files: Mapping[str, int]
    """Name -> bytes."""


def imported_folder(settings: Settings, key: str) -> Path:
    """Return the folder of imported weights by their key; it need not be there."""
    return settings.data_dir / imported_path(key)


def write_record(folder: Path, record: Imported) -> None:
    """Say in a folder what its weights are: the last thing that is written there."""
    value = {**vars(record), "adapter_targets": list(record.adapter_targets)}
    value["files"] = dict(record.files)
    (folder / RECORD_FILE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> Imported:
    """Read what `write_record` wrote.

    Raises:
        ModelError: the folder or its record is gone.
    """
    stamp = folder / RECORD_FILE
    try:
        changed_at = stamp.stat().st_mtime_ns
    except OSError as error:
        raise ModelError(f"The weights in {folder} are gone. {_REMEDY}") from error
    return _read(folder, changed_at)


@lru_cache(maxsize=256)
def _read(folder: Path, changed_at: int) -> Imported:
    value = read_json(folder / RECORD_FILE)
    value["adapter_targets"] = tuple(value["adapter_targets"])
    return Imported(**value)


def check_unchanged(folder: Path) -> None:
    """Refuse a folder whose files are gone or have another size than when they were imported.

    Raises:
        ModelError: so it is; the message names the file.
    """
    for name, size in read_record(folder).files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            now = "is gone" if found is None else f"has {found} bytes now"
            raise ModelError(f"{file} {now}; it had {size} when it was imported. {_REMEDY}")


def imported_base(settings: Settings, key: str, like: BaseModel) -> BaseModel | None:
    """Return the base model that imported weights are; None where they are gone.

    Args:
        like: a model of the family whose bounds it has.
    """
    try:
        record = read_record(imported_folder(settings, key))
    except ModelError:
        return None
    return replace(
        like,
        model_id=key,
        customization_id=key,
        aliases=(),
        body_family=BODY_FAMILY,
        model_name=record.name[:20],
        provider_name="imported",
        full_name=record.name,
        license="as its owner has it",
        quantization=f"as imported ({record.dtype})",
        origin="imported by its owner",
        weights=key,
        context_tokens=record.context_tokens,
        bedrock_output_tokens=record.context_tokens,
        token_limits=(),
        lora=replace(like.lora, targets=record.adapter_targets),
        sources=(),
        takes_messages=record.instruct,
    )
