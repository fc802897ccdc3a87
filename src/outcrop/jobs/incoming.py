"""A model in S3 that is brought here: asked for with the permissions of a role, checked, copied.

What can be known of the weights without them (names, sizes, headers) is looked at before they are
copied, because copying takes minutes; and again of the copy, because objects change. What an
earlier attempt has copied whole is taken over, as long as the object is still the same.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from outcrop.data.trial import try_folder
from outcrop.errors import ModelError, StopRequested
from outcrop.ids import S3Uri
from outcrop.jobs import artifacts
from outcrop.jobs.inputs import asking
from outcrop.jobs.model_places import Found, find_model
from outcrop.models import incoming
from outcrop.models.artifact import folder_digest
from outcrop.models.imported import Imported, write_record
from outcrop.models.incoming import Listed
from outcrop.models.operator import CONTEXT_KEYS
from outcrop.models.safetensors_header import TensorEntry, read_header
from outcrop.objects.client import ObjectInfo, ObjectStore
from outcrop.settings import Settings
from outcrop.store.rows import Job

logger = logging.getLogger("outcrop.attempt")

ROOM_BYTES = 1 << 30
"""What copying a model must leave of the disk."""
_BLOCK_BYTES = 1 << 20
Stop = Callable[[], bool]
Headers = dict[str, dict[str, TensorEntry]]


@dataclass(frozen=True)
class Brought:
    """A whole model in the attempt's folder, with its record."""

    folder: Path
    record: Imported
    digest: str
    """Of the folder, its record included."""


def bring_model(
    settings: Settings,
    engine: Engine,
    objects: ObjectStore,
    job: Job,
    prefix: S3Uri,
    name: str,
    should_stop: Stop,
) -> Brought:
    """Bring a whole model in Hugging Face's layout into the attempt's folder, and check all of it.

    Args:
        name: what its owner calls it, for the record.
    Raises:
        ValidationException: the places are gone, or the role may not any more.
        ModelError: it is not a model that can be used; the message names file, tensor and value.
        ObjectStoreError: an object is gone, or the store is away.
        StopRequested: `should_stop` answered True.
    """
    with engine.connect() as connection:
        found = find_model(connection, objects, job.account, job.spec["roleArn"], prefix)
    listed = found.listed
    listed.check_model()
    folder = brought_folder(settings, job, job.fence)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = (incoming.CONFIG, incoming.TOKENIZER, incoming.TOKENIZER_CONFIG, *incoming.OPTIONAL)
    small = [one for one in wanted if one in found.objects]
    _copy(settings, objects, job, found, small, folder, should_stop)
    config = incoming.check_config(folder, listed.where)
    index = _index(objects, found)
    files = incoming.weight_files(listed, index)
    _check_headers(listed, index, {one: _remote_header(objects, found, one) for one in files})
    _check_room(settings, found, files)
    logger.info("%d files of weights are copied", len(files))
    _copy(settings, objects, job, found, files, folder, should_stop)
    headers = {one: _local_header(folder, listed.where, one) for one in files}
    dtype = _check_headers(listed, index, headers)
    if index is not None:
        _write_index(folder, headers)
    trial = try_folder(folder, listed.where)
    if trial.vocabulary > config["vocab_size"]:
        raise ModelError(
            f"The tokenizer of {listed.where} has {trial.vocabulary:,} tokens, and config.json "
            f"says {config['vocab_size']:,} (vocab_size): they do not belong together."
        )
    num_parameters = _check_numbers(folder, headers, listed.where, should_stop)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    record = Imported(
        name=name,
        architecture=config["architectures"][0],
        instruct=trial.has_template,
        dtype=dtype,
        num_parameters=num_parameters,
        num_bytes=sum(sizes[one] for one in files),
        context_tokens=next(config[key] for key in CONTEXT_KEYS if config.get(key)),
        adapter_targets=incoming.linear_layers(headers),
        files=sizes,
    )
    write_record(folder, record)
    return Brought(folder, record, folder_digest(folder))


def copy_files(
    settings: Settings,
    objects: ObjectStore,
    job: Job,
    found: Found,
    names: Iterable[str],
    should_stop: Stop,
) -> Path:
    """Copy some files into the attempt's folder, which is made anew, and return it.

    Raises: as `bring_model`.
    """
    folder = brought_folder(settings, job, job.fence)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _copy(settings, objects, job, found, names, folder, should_stop)
    return folder


def brought_folder(settings: Settings, job: Job, fence: int) -> Path:
    """Return where an attempt puts the files of a model together."""
    return artifacts.work_folder(settings, job.id, fence) / "model"


def _copy(
    settings: Settings,
    objects: ObjectStore,
    job: Job,
    found: Found,
    names: Iterable[str],
    folder: Path,
    should_stop: Stop,
) -> None:
    copied = folder.parent / "copied"
    copied.mkdir(exist_ok=True)
    for name in names:
        info = found.objects[name]
        # Earlier attempts of this job; one that still runs has lost its lease.
        for earlier in artifacts.job_folder(settings, job.id).glob(f"*/copied/{escape(name)}.etag"):
            if earlier.parent != copied and earlier.read_text() == info.etag:
                source = earlier.parent.parent / "model" / name
                if source.is_file() and source.stat().st_size == info.num_bytes:
                    source.rename(folder / name)
                    break
        else:
            _fetch(objects, info, folder / name, should_stop)
        (copied / f"{name}.etag").write_text(info.etag)


def _fetch(objects: ObjectStore, info: ObjectInfo, path: Path, should_stop: Stop) -> None:
    if should_stop():
        raise StopRequested
    num_bytes, on_progress = 0, asking(should_stop)
    with objects.open(info.uri) as stream, path.open("wb") as file:
        while block := stream.read(_BLOCK_BYTES):
            num_bytes += file.write(block)
            on_progress(num_bytes)
    if num_bytes != info.num_bytes:
        raise ModelError(
            f"{info.uri} had {info.num_bytes:,} bytes when it was listed and {num_bytes:,} when it "
            "was read: it is being written. Import the model again when it is whole."
        )


def _index(objects: ObjectStore, found: Found) -> Any:
    if incoming.INDEX not in found.objects:
        return None
    uri = found.objects[incoming.INDEX].uri
    try:
        return json.loads(objects.read(uri))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{uri} is not JSON: {error}") from None


def _remote_header(objects: ObjectStore, found: Found, name: str) -> dict[str, TensorEntry]:
    info = found.objects.get(name)
    if info is None:
        raise ModelError(f"{found.prefix} has no {name}.")
    with objects.open(info.uri) as stream:
        return read_header(stream, info.num_bytes, str(info.uri))


def _local_header(folder: Path, where: str, name: str) -> dict[str, TensorEntry]:
    path = folder / name
    with path.open("rb") as stream:
        return read_header(stream, path.stat().st_size, f"{where}{name}")


def _check_headers(listed: Listed, index: Any, headers: Headers) -> str:
    incoming.check_index(listed.where, index, headers)
    return incoming.check_weights(listed.where, headers)


def _write_index(folder: Path, headers: Headers) -> None:
    """Write which tensor is in which file, as the files themselves say."""
    table = {name: file for file, entries in headers.items() for name in entries}
    size = sum(entry.num_bytes for entries in headers.values() for entry in entries.values())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / incoming.INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")


def _check_numbers(folder: Path, headers: Headers, where: str, should_stop: Stop) -> int:
    # Here, because it brings torch and transformers, which takes seconds.
    from outcrop.models.shapes import check_finite, check_shapes, described_model

    def ask() -> None:
        if should_stop():
            raise StopRequested

    ask()
    num_parameters = check_shapes(described_model(folder, where), headers, where)
    check_finite(folder, headers, where, ask)
    return num_parameters


def _check_room(settings: Settings, found: Found, files: Iterable[str]) -> None:
    wanted = sum(found.objects[name].num_bytes for name in files)
    free = shutil.disk_usage(settings.data_dir).free
    if wanted + ROOM_BYTES > free:
        raise ModelError(
            f"The weights below {found.prefix} have {wanted:,} bytes, and the disk of the data "
            f"directory has {free:,} left, of which {ROOM_BYTES:,} stay free. Make room, and "
            "create the job again."
        )
