"""What a data command is given: a file of this machine, or an object that an S3 URI names.

Objects are read with the caller's own credentials, wherever AWS clients of this shell point.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from outcrop.data.facts import DataFile
from outcrop.data.sources import local_file
from outcrop.errors import DataError, ObjectStoreError
from outcrop.ids import S3Uri, parse_s3_uri

_READ_BYTES = 1 << 20


def open_data_file(name: str, role: str) -> DataFile:
    """Return a file to be checked.

    Args:
        name: a path, or `s3://bucket/key`.
        role: as `DataFile` has it.
    Raises:
        DataError: the URI names no object. That a file is not there is told when it is opened.
        ObjectStoreError: the object cannot be looked at.
    """
    if not name.startswith("s3://"):
        return local_file(Path(name), role)
    uri = parse_s3_uri(name)
    if uri is None or not uri.key or uri.key.endswith("/"):
        raise DataError(
            f"{name} names no object. Write s3://bucket/key.", code="unreadable_file", file=name
        )
    num_bytes = int(_call("head_object", uri)["ContentLength"])
    return DataFile(name, role, lambda: _open(uri), num_bytes)


def _open(uri: S3Uri) -> AbstractContextManager[BinaryIO]:
    return cast("BinaryIO", io.BufferedReader(_Body(_call("get_object", uri)["Body"]), _READ_BYTES))


class _Body(io.RawIOBase):
    """The body of an answer, as a stream; an error on the way is one of the object store."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        from botocore.exceptions import BotoCoreError, HTTPClientError

        try:
            content = self._body.read(len(buffer))
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise ObjectStoreError("IncompleteBody", f"The object broke off: {error}") from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._body.close()
        super().close()


def _call(operation: str, uri: S3Uri) -> Any:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return getattr(boto3.client("s3"), operation)(Bucket=uri.bucket, Key=uri.key)
    except ClientError as error:
        found = error.response.get("Error", {})
        code, message = str(found.get("Code", "")), str(found.get("Message", ""))
        raise ObjectStoreError(code, f"{message} ({uri})") from error
    except BotoCoreError as error:
        raise ObjectStoreError(
            "ServiceUnavailable",
            f"{uri} cannot be read: {error}. `outcrop env` prints the variables that point AWS "
            "clients here.",
        ) from error
