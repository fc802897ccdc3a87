"""What a custom model's folder holds: an adapter, a whole model, or both.

    adapter_config.json, adapter_model.safetensors     an adapter over the base weights
    config.json, *.safetensors, tokenizer files        a whole model, in Hugging Face's layout
    the same, and adapter/ with the first two files    a whole model and an adapter over it

The last comes of an adapter that was trained over a whole model. It is not merged into the weights,
because in bfloat16 a weight does not move under a change of less than half its last place. It lies
in a folder of its own, because some programs take a whole model with an adapter_config.json beside
it for an adapter alone. Loads no torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from outcrop.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FOLDER = "adapter"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True)
class Artifact:
    """The parts of a custom model's folder; at least one is there."""

    weights: Path | None
    """Folder of the whole model; None where the base weights are its own."""
    adapter: Path | None
    """Folder of the adapter; None where there is none."""


def read_artifact(folder: Path) -> Artifact:
    """Say what a custom model's folder holds; the files themselves are not read.

    Raises:
        ModelError: it holds neither an adapter nor a whole model, or is not there.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return Artifact(None, folder)
    if not (folder / MODEL_CONFIG).is_file():
        raise ModelError(f"{folder} holds neither an adapter nor a whole model.")
    adapter = folder / ADAPTER_FOLDER
    return Artifact(folder, adapter if (adapter / ADAPTER_CONFIG).is_file() else None)


def check_digest(folder: Path, digest: str | None) -> None:
    """Refuse a folder that is not as it was published.

    Args:
        digest: what `folder_digest` said then; None checks nothing.
    Raises:
        ModelError: a file was changed, added or removed, or cannot be read.
    """
    if digest is None:
        return
    try:
        found = folder_digest(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error}") from error
    if found != digest:
        raise ModelError(
            f"{folder} is not what was published: its digest is {found}, and was {digest}."
        )


def copy_weights(weights: Path, folder: Path) -> None:
    """Bring the files of a whole model into a new artifact, without an adapter beside them.

    They are linked, not copied, where the file system can: artifacts are never written to, and a
    linked file outlives the folder it came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(weights.iterdir()):
        if file.is_file():
            try:
                os.link(file, folder / file.name)
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, folder / file.name)


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 in hex over the names and bytes of the files of a folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
