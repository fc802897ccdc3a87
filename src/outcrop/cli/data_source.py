"""What a data command is given: a file of this machine, or an object that an S3 URI names.

Objects are read with the caller's own credentials, wherever AWS clients of this shell point.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
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
    found = _call("head_object", uri)
    return DataFile(name, role, lambda: _open(uri, found["ETag"]), int(found["ContentLength"]))


def counted(data: DataFile, progress: Callable[[int], None] | None) -> DataFile:
    """Return a file that tells how many bytes of it were read, over all readings."""
    if progress is None:
        return data
    tell = progress
    num_read = 0

    def count(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes
        tell(num_read)

    @contextmanager
    def opened() -> Iterator[BinaryIO]:
        with data.open() as stream:
            yield cast("BinaryIO", io.BufferedReader(_Counted(stream, count), _READ_BYTES))

    return replace(data, open=opened)


@contextmanager
def local_copy(data: DataFile) -> Iterator[Path]:
    """Give a path under which the content lies on this machine, for what must jump about in it."""
    if not data.name.startswith("s3://"):
        yield Path(data.name)
        return
    with tempfile.NamedTemporaryFile(prefix="outcrop-") as copy, data.open() as stream:
        shutil.copyfileobj(stream, copy, _READ_BYTES)
        copy.flush()
        yield Path(copy.name)


class _Counted(io.RawIOBase):
    """A stream that tells how much is read of it; closing it leaves the other open."""

    def __init__(self, stream: BinaryIO, count: Callable[[int], None]) -> None:
        self._stream, self._count = stream, count

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self._count(len(content))
        return len(content)


def _open(uri: S3Uri, etag: str) -> AbstractContextManager[BinaryIO]:
    """Open the very object that was looked at: another one under its name is refused."""
    body = _call("get_object", uri, IfMatch=etag)["Body"]
    return cast("BinaryIO", io.BufferedReader(_Body(body), _READ_BYTES))


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


def _call(operation: str, uri: S3Uri, **arguments: str) -> Any:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return getattr(boto3.client("s3"), operation)(Bucket=uri.bucket, Key=uri.key, **arguments)
    except ClientError as error:
        found = error.response.get("Error", {})
        code, message = str(found.get("Code", "")), str(found.get("Message", ""))
        if code in ("PreconditionFailed", "412"):
            raise DataError(
                f"{uri} changed while it was read. Try again when nothing writes to it.",
                code="changed_while_read",
                file=str(uri),
            ) from error
        raise ObjectStoreError(code, f"{message} ({uri})") from error
    except BotoCoreError as error:
        raise ObjectStoreError(
            "ServiceUnavailable",
            f"{uri} cannot be read: {error}. `outcrop env` prints the variables that point AWS "
            "clients here.",
        ) from error
