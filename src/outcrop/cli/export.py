"""`outcrop models export`: a custom model of the data directory, written where others can use it.

Works on the data directory alone, so it needs no running service; its owner may read all that is
there. A folder is written beside its place and renamed when it is whole. Objects are written with
the caller's own credentials, wherever AWS clients of this shell point, the manifest last.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from outcrop.errors import ModelError, ObjectStoreError
from outcrop.ids import S3Uri, parse_s3_uri
from outcrop.jobs.exporting import write_export
from outcrop.jobs.subjects import describe_subject
from outcrop.models.artifact import check_digest
from outcrop.models.exported import check_form, files_of
from outcrop.settings import Settings
from outcrop.store import models
from outcrop.store.database import check_version, connect
from outcrop.store.files import sync, sync_tree


def export_model(
    settings: Settings, name: str, destination: str, form: str, data_type: str | None
) -> tuple[str, dict[str, Any]]:
    """Write a custom model; returns where it is, and its manifest.

    Args:
        name: of the model, or its ARN.
        destination: a folder that does not exist or is empty, or `s3://bucket/prefix`.
        form, data_type: as `check_form` takes them.
    Raises:
        ModelError: there is no such model, it cannot be written so, or the folder is in use.
        ValidationException: the form is not known, or cannot hold that.
        ObjectStoreError: the objects cannot be written.
    """
    data_type = check_form(form, data_type)
    engine = connect(settings.effective_database_url)
    check_version(engine)
    try:
        with engine.connect() as connection:
            model = models.get_model(connection, settings.account, settings.region, name)
    finally:
        engine.dispose()
    if model is None:
        raise ModelError(
            f"There is no custom model {name} in account {settings.account} and region "
            f"{settings.region}. ListCustomModels lists them."
        )
    artifact = settings.data_dir / model.artifact_path
    check_digest(artifact, model.artifact_digest)
    subject = describe_subject(model)
    if destination.startswith("s3://"):
        uri = parse_s3_uri(destination)
        if uri is None:
            raise ModelError(f"{destination} names no place. Write s3://bucket/prefix.")
        with tempfile.TemporaryDirectory(prefix="outcrop-export-") as scratch:
            work = Path(scratch) / "export"
            manifest = write_export(settings, subject, artifact, work, form, data_type)
            _upload(work, uri)
        return str(uri), manifest
    folder = Path(destination).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is there already. Name a folder that is new or empty.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
    try:
        manifest = write_export(settings, subject, artifact, work, form, data_type)
        sync_tree(work)
        work.replace(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return str(folder), manifest


def _upload(folder: Path, prefix: S3Uri) -> None:
    import boto3
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3")
    for path in files_of(folder):
        uri = prefix.join(path.relative_to(folder).as_posix())
        try:
            client.upload_file(str(path), uri.bucket, uri.key)
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            raise ObjectStoreError(
                "ServiceUnavailable",
                f"{uri} cannot be written: {error}. `outcrop env` prints the variables that point "
                "AWS clients here.",
            ) from error
