"""The places in S3 that a job uses: their form, whether they are there, whether its role may.

Asked when a job is created, so that a mistake is refused at once, and again by the job itself,
because places and permissions change. The texts begin as Bedrock's do. Source: user guide,
"Troubleshooting model customization issues", and AWS's knowledge-centre article on fine-tuning
errors.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from sqlalchemy import Connection

from outcrop.errors import (
    AccessDeniedException,
    ApiError,
    ObjectStoreError,
    ValidationException,
)
from outcrop.identity.authorize import authorize
from outcrop.identity.principals import Principal
from outcrop.ids import ID_LENGTH, S3Uri, parse_s3_uri
from outcrop.jobs.artifacts import WRITE_CHECK, step_metrics_object, validation_metrics_objects
from outcrop.objects.client import IS_AWAY, ObjectInfo, ObjectStore
from outcrop.objects.keys import check_key

TRAINING, VALIDATION = "trainingDataConfig.s3Uri", "validationDataConfig.validators.s3Uri"
"""The members of a request that name files to read."""
BATCH_INPUT = "inputDataConfig.s3InputDataConfig.s3Uri"
BATCH_OUTPUT = "outputDataConfig.s3OutputDataConfig.s3Uri"
"""The members of a batch inference job that name its places."""


def place(member: str, text: str) -> S3Uri:
    """Read an S3 URI; `member` names it in the error."""
    uri = parse_s3_uri(text)
    if uri is None:
        raise ValidationException(
            f"The provided S3 URI is invalid: {member} is {text!r}. It must be of the form "
            "s3://bucket/key."
        )
    _check_key(member, uri)
    return uri


def output_place(member: str, text: str) -> S3Uri:
    """Read an S3 URI below which a job's files can have their keys."""
    uri = place(member, text)
    nobody = "x" * ID_LENGTH
    for file in (step_metrics_object(uri, nobody), *validation_metrics_objects(uri, nobody)):
        _check_key(member, file)
    return uri


def _check_key(member: str, uri: S3Uri) -> None:
    try:
        check_key(uri.key)
    except ApiError as error:
        raise ValidationException(
            f"The provided S3 URI is invalid: {member} leads to {uri}. {error.message}"
        ) from error


def file_place(member: str, text: str) -> S3Uri:
    """Read an S3 URI that must name one object, not a folder."""
    uri = place(member, text)
    if not uri.key or uri.key.endswith("/"):
        raise folder_error(uri, member)
    return uri


def folder_error(uri: S3Uri, member: str) -> ValidationException:
    """Return the error for a URI that names a folder where a file is wanted (Bedrock's text)."""
    kind = "validation" if member.startswith("validation") else "training"
    return ValidationException(
        f"Invalid {kind} input data configuration. Check the input data S3 Uris (Uri should be a "
        f"file, not a directory) and retry request: {member} is {uri}."
    )


def check_readable(
    connection: Connection, role: Principal, uri: S3Uri, *, is_folder: bool = False
) -> None:
    """Refuse unless the job's role may read the object.

    Args:
        is_folder: whether it may be a folder, too, of which the role may read some object.
    """
    if is_folder and not uri.key.endswith("/"):
        below = replace(uri, key=f"{uri.key}/")
        with suppress(ValidationException):
            return check_readable(connection, role, below)
    try:
        authorize(connection, role, "s3:GetObject", f"arn:aws:s3:::{uri.bucket}/{uri.key}")
    except AccessDeniedException as error:
        raise ValidationException(
            "Could not validate GetObject permissions to access Amazon S3 bucket: "
            f"{uri.bucket} at key {uri.key}. {error.message}"
        ) from error


def check_writable(connection: Connection, role: Principal, output: S3Uri) -> None:
    """Refuse unless the job's role may write below the output's prefix."""
    probe = output.join(WRITE_CHECK)
    try:
        authorize(connection, role, "s3:PutObject", f"arn:aws:s3:::{probe.bucket}/{probe.key}")
    except AccessDeniedException as error:
        raise ValidationException(
            "Amazon S3 perms missing (PutObject): Could not validate PutObject permissions to "
            f"access S3 bucket: {probe.bucket} at key {probe.key}. {error.message}"
        ) from error


def check_bucket(objects: ObjectStore, uri: S3Uri) -> None:
    """Refuse unless the bucket to write to exists.

    Raises:
        ValidationException: so it is.
        ObjectStoreError: the store is away; nothing is known of the bucket.
    """
    _check_bucket(objects, uri, "PutObject")


def check_bucket_readable(objects: ObjectStore, uri: S3Uri) -> None:
    """Refuse unless the bucket to read from exists. Raises as `check_bucket`."""
    _check_bucket(objects, uri, "ListBucket")


def _check_bucket(objects: ObjectStore, uri: S3Uri, what: str) -> None:
    try:
        if objects.bucket_exists(uri.bucket):
            return
        reason = "The bucket does not exist."
    except ObjectStoreError as error:
        if error.code == IS_AWAY:
            raise
        reason = str(error)
    raise ValidationException(
        f"Could not validate {what} permissions to access S3 bucket: {uri.bucket}. {reason}"
    )


def check_present(objects: ObjectStore, uri: S3Uri, member: str) -> ObjectInfo:
    """Return what the store tells of the object; refuse unless it exists: a missing bucket, a
    missing key and a folder are told apart.

    Args:
        member: names the URI in the error.
    Raises:
        ValidationException: so it is.
        ObjectStoreError: the store is away; nothing is known of the object.
    """
    try:
        found = objects.head(uri)
        if found is not None:
            return found
        if not objects.bucket_exists(uri.bucket):
            reason = "The bucket does not exist."
        elif next(iter(objects.list(uri.bucket, uri.key + "/")), None) is not None:
            raise folder_error(uri, member)
        else:
            reason = "There is no object with this key."
    except ObjectStoreError as error:
        if error.code == IS_AWAY:
            raise
        reason = str(error)
    raise ValidationException(
        "Could not validate GetObject permissions to access Amazon S3 bucket: "
        f"{uri.bucket} at key {uri.key}. {reason}"
    )
