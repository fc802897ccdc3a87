"""Where a model in S3 lies that is to be brought here: its folder, and what is in it.

Asked when a request names it, and again by the job, with the permissions of the role that the
request passes. Names and sizes only; nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import Connection

from outcrop.errors import AccessDeniedException, ModelError, ValidationException
from outcrop.identity.authorize import assume_role_for_service, authorize_all
from outcrop.identity.principals import Principal
from outcrop.ids import S3Uri
from outcrop.jobs.places import check_bucket_readable, place
from outcrop.models import incoming
from outcrop.models.incoming import Listed
from outcrop.objects.client import ObjectInfo, ObjectStore

IMPORT_MEMBER = "modelDataSource.s3DataSource.s3Uri"
CREATION_MEMBER = "modelSourceConfig.s3DataSource.s3Uri"
"""The members of requests that name a model's folder."""


@dataclass(frozen=True)
class Found:
    """What lies below a prefix, its subfolders aside."""

    prefix: S3Uri
    objects: dict[str, ObjectInfo]

    @property
    def listed(self) -> Listed:
        """The names and sizes."""
        sizes = {name: info.num_bytes for name, info in self.objects.items()}
        return Listed(str(self.prefix), sizes)


def model_prefix(member: str, text: str) -> S3Uri:
    """Read an S3 URI that names a folder: its key is empty or ends in a slash.

    Raises:
        ValidationException: it is no S3 URI; `member` names it.
    """
    uri = place(member, text)
    return S3Uri(uri.bucket, uri.key.rstrip("/") + "/" if uri.key.strip("/") else "")


def find_model(
    connection: Connection, objects: ObjectStore, account: str, role_arn: str, prefix: S3Uri
) -> Found:
    """List what lies below a prefix, once the role may list and read it.

    Raises:
        ValidationException: there is no such role or bucket, or the role may not.
        ModelError: there are too many files.
        ObjectStoreError: the store is away.
    """
    role = assume_role_for_service(connection, account, role_arn)
    _check_allowed(connection, role, prefix, (), "ListBucket")
    check_bucket_readable(objects, prefix)
    found: dict[str, ObjectInfo] = {}
    for number, info in enumerate(objects.list(prefix.bucket, prefix.key), 1):
        if number > incoming.MAX_FILES:
            raise ModelError(
                f"{prefix} holds more than {incoming.MAX_FILES:,} objects, the most that a model "
                "may have. Name the folder of the model itself."
            )
        name = info.uri.key.removeprefix(prefix.key)
        if name and "/" not in name:
            found[name] = info
    _check_allowed(connection, role, prefix, found, "GetObject")
    return Found(prefix, found)


def _check_allowed(
    connection: Connection, role: Principal, prefix: S3Uri, names: Iterable[str], what: str
) -> None:
    bucket = f"arn:aws:s3:::{prefix.bucket}"
    wanted = [("s3:GetObject", f"{bucket}/{prefix.key}{name}") for name in names]
    if what == "ListBucket":
        wanted = [("s3:ListBucket", bucket)]
    try:
        authorize_all(connection, role, wanted)
    except AccessDeniedException as error:
        raise ValidationException(
            f"Could not validate {what} permissions to access Amazon S3 bucket: {prefix.bucket} at "
            f"key {prefix.key}. {error.message}"
        ) from error
