"""S3 for Outcrop itself: read and write objects of the embedded store, or of an S3 of the owner's.

Uses the service's own key, so whoever calls has already decided that the caller may do it: nothing
here knows accounts or policies. botocore does the protocol.
Source: botocore's `s3` model, for operations and error codes.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.objects.internal import read_internal_keys
from outcrop.processes.address import read_address
from outcrop.settings import Settings

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

EMBEDDED_REGION = "us-east-1"
EMBEDDED_NAME = "object-store"
"""Name of the embedded store's address file."""

IS_AWAY = "ServiceUnavailable"
"""The code of an ObjectStoreError where the store does not answer: trying again may help."""

PART_BYTES = 16 * 1024 * 1024
"""Objects larger than this are uploaded in parts, two of which are in memory. LIMIT: S3 allows
10 000 parts, so 156 GiB."""
_CONNECT_SECONDS = 5
_READ_SECONDS = 60
_ATTEMPTS = 4
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Backend:
    """Where objects are kept and the service's own key to it."""

    url: str
    access_key_id: str
    secret_access_key: str = field(repr=False)
    region: str


@dataclass(frozen=True)
class ObjectInfo:
    """What the store tells of one object."""

    uri: S3Uri
    num_bytes: int
    etag: str
    """Without the quotes. The MD5 of the content, except after an upload in parts."""
    last_modified_at: datetime.datetime


@dataclass(frozen=True)
class Upload:
    """An upload in parts that has been neither completed nor aborted."""

    uri: S3Uri
    upload_id: str
    initiated_at: datetime.datetime


def backend(settings: Settings) -> Backend:
    """Return where objects are kept: the S3 of the settings, or the embedded one that runs now.

    Raises:
        ObjectStoreError: the embedded store is not running.
    """
    if settings.s3_endpoint_url:
        return Backend(
            url=settings.s3_endpoint_url.rstrip("/"),
            access_key_id=settings.s3_access_key_id,
            secret_access_key=settings.s3_secret_access_key,
            region=settings.s3_region,
        )
    url = read_address(settings.data_dir, EMBEDDED_NAME)
    if url is None:
        raise ObjectStoreError(
            IS_AWAY,
            f"The embedded object store of {settings.data_dir} is not running. "
            "`outcrop serve` starts it.",
        )
    keys = read_internal_keys(settings.data_dir)
    return Backend(url, keys.access_key_id, keys.secret_access_key, EMBEDDED_REGION)


def object_store(settings: Settings) -> ObjectStore:
    """Return the client of the store that `backend` names; it connects at the first call.

    Raises:
        ObjectStoreError: the embedded store is not running.
    """
    return ObjectStore(backend(settings))


class ObjectStore:
    """Objects by URI. Safe for several threads; every method may raise ObjectStoreError.

    A write becomes visible whole or not at all, and replaces what was there.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @functools.cached_property
    def _client(self) -> Any:
        # Imported here: it takes a tenth of a second, and the command line often needs none of it.
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.backend.url,
            aws_access_key_id=self.backend.access_key_id,
            aws_secret_access_key=self.backend.secret_access_key,
            region_name=self.backend.region,
            config=Config(
                s3={"addressing_style": "path"},
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
                proxies={},
            ),
        )

    def head(self, uri: S3Uri) -> ObjectInfo | None:
        """Return what the store tells of an object, or None where there is none."""
        try:
            found = self._call("head_object", Bucket=uri.bucket, Key=uri.key)
        except ObjectStoreError as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                return None
            raise
        return ObjectInfo(uri, found["ContentLength"], _etag(found), found["LastModified"])

    def open(self, uri: S3Uri) -> BinaryIO:
        """Open an object for reading from its beginning; use it in a `with` block.

        The content comes as it is read, so its size does not matter. A connection that breaks on
        the way is taken up again where it broke, unless the object has changed since.
        """
        return io.BufferedReader(_ObjectReader(self, uri), _READ_BYTES)

    def read(self, uri: S3Uri) -> bytes:
        """Return the whole content of an object."""
        with self.open(uri) as stream:
            return stream.read()

    def write(self, uri: S3Uri, content: bytes | Path) -> None:
        """Write an object.

        Args:
            content: the content, or a file that has it. More than `PART_BYTES` go up in parts.
        """
        if isinstance(content, Path):
            with content.open("rb") as stream:
                self._write_stream(uri, stream)
        else:
            self._write_stream(uri, io.BytesIO(content))

    def list(self, bucket: str, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects whose keys begin with `prefix`, in the order of their keys."""
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Bucket=bucket, Prefix=prefix, **token)
            for found in page.get("Contents", ()):
                uri = S3Uri(bucket, found["Key"])
                yield ObjectInfo(uri, found["Size"], _etag(found), found["LastModified"])
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, uri: S3Uri) -> None:
        """Delete an object; nothing happens where there is none."""
        self._call("delete_object", Bucket=uri.bucket, Key=uri.key)

    def bucket_exists(self, bucket: str) -> bool:
        """Return whether there is such a bucket."""
        try:
            self._call("head_bucket", Bucket=bucket)
        except ObjectStoreError as error:
            if error.code == "NoSuchBucket":
                return False
            raise
        return True

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket; nothing happens where it is ours already."""
        where = {"LocationConstraint": self.backend.region}
        us_east = self.backend.region == "us-east-1"
        try:
            self._call(
                "create_bucket",
                Bucket=bucket,
                **({} if us_east else {"CreateBucketConfiguration": where}),
            )
        except ObjectStoreError as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise

    def buckets(self) -> tuple[str, ...]:
        """Return the names of all buckets."""
        return tuple(found["Name"] for found in self._call("list_buckets").get("Buckets", ()))

    def abandoned_uploads(self, older_than: datetime.timedelta) -> Iterator[Upload]:
        """Yield the uploads in parts of all buckets that began longer ago than `older_than`.

        Their parts take space until they are completed or aborted, and no listing shows them.
        """
        latest = datetime.datetime.now(datetime.UTC) - older_than
        for bucket in self.buckets():
            markers: dict[str, str] = {}
            while True:
                page = self._call("list_multipart_uploads", Bucket=bucket, **markers)
                for found in page.get("Uploads", ()):
                    if found["Initiated"] <= latest:
                        uri = S3Uri(bucket, found["Key"])
                        yield Upload(uri, found["UploadId"], found["Initiated"])
                if not page.get("IsTruncated"):
                    break
                markers = {
                    "KeyMarker": page["NextKeyMarker"],
                    "UploadIdMarker": page["NextUploadIdMarker"],
                }

    def abort_upload(self, upload: Upload) -> None:
        """Remove an upload in parts; nothing happens where it has ended meanwhile."""
        uri = upload.uri
        where = {"Bucket": uri.bucket, "Key": uri.key, "UploadId": upload.upload_id}
        try:
            self._call("abort_multipart_upload", **where)
        except ObjectStoreError as error:
            if error.code != "NoSuchUpload":
                raise

    def _write_stream(self, uri: S3Uri, stream: BinaryIO) -> None:
        where = {"Bucket": uri.bucket, "Key": uri.key}
        block = stream.read(PART_BYTES)
        following = stream.read(PART_BYTES)
        if not following:
            self._call("put_object", **where, Body=block)
            return
        upload_id = self._call("create_multipart_upload", **where)["UploadId"]
        try:
            parts: list[dict[str, object]] = []
            while block:
                number = len(parts) + 1
                answer = self._call(
                    "upload_part", **where, UploadId=upload_id, PartNumber=number, Body=block
                )
                parts.append({"PartNumber": number, "ETag": answer["ETag"]})
                block, following = following, stream.read(PART_BYTES)
            self._call(
                "complete_multipart_upload",
                **where,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except BaseException:
            with contextlib.suppress(ObjectStoreError):
                self._call("abort_multipart_upload", **where, UploadId=upload_id)
            raise

    def _call(self, operation: str, **parameters: object) -> dict[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer: dict[str, Any] = getattr(self._client, operation)(**parameters)
            return answer
        except ClientError as error:
            raise _translated(error.response, operation, parameters) from error
        except BotoCoreError as error:
            raise ObjectStoreError(
                IS_AWAY,
                f"The object store at {self.backend.url} does not answer: {error}",
            ) from error


class _ObjectReader(io.RawIOBase):
    """The content of one object, taken up again where a connection broke."""

    def __init__(self, store: ObjectStore, uri: S3Uri) -> None:
        super().__init__()
        self._store = store
        self._uri = uri
        self._position = 0
        self._body: Any = None
        self._etag = ""
        self._connect()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        block = self._read(len(view))
        view[: len(block)] = block
        return len(block)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._read(_READ_BYTES), b""))

    def close(self) -> None:
        if not self.closed and self._body is not None:
            self._body.close()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                block: bytes = self._body.read(num_bytes)
            except (HTTPClientError, IncompleteReadError, OSError) as error:
                if attempt == _ATTEMPTS:
                    raise ObjectStoreError(
                        IS_AWAY,
                        f"{self._uri} broke off after {self._position} bytes: {error}",
                    ) from error
                self._body.close()
                self._connect()
            else:
                self._position += len(block)
                return block
        raise AssertionError("the loop returns or raises")

    def _connect(self) -> None:
        condition: dict[str, object] = {}
        if self._position:
            condition = {"Range": f"bytes={self._position}-", "IfMatch": self._etag}
        answer = self._store._call(
            "get_object", Bucket=self._uri.bucket, Key=self._uri.key, **condition
        )
        self._body, self._etag = answer["Body"], answer["ETag"]


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


# An answer to HEAD has no body, so its error has only the status.
_HEAD_CODES = {"403": "AccessDenied", "400": "BadRequest", "503": IS_AWAY}
_NOT_FOUND = {"head_object": "NoSuchKey", "head_bucket": "NoSuchBucket"}


def _translated(
    response: dict[str, Any], operation: str, parameters: dict[str, object]
) -> ObjectStoreError:
    code = str(response["Error"].get("Code", "InternalError"))
    if code == "404":
        code = _NOT_FOUND.get(operation, code)
    code = _HEAD_CODES.get(code, code)
    message = response["Error"].get("Message") or "no message"
    where = ""
    if "Bucket" in parameters:
        where = f" (s3://{parameters['Bucket']}/{parameters.get('Key', '')})"
    return ObjectStoreError(code, f"{message}{where}")
