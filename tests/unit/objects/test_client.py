"""Promises of the S3 client, kept against a real store, and a fake where it must fail."""

from __future__ import annotations

import datetime
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.objects.client import PART_BYTES, Backend, ObjectStore, backend
from outcrop.settings import Settings

if TYPE_CHECKING:
    from tests.unit.objects.conftest import Running


def test_what_is_written_is_read(shared: Running, bucket: str) -> None:
    uri = S3Uri(bucket, "folder/train data+ü.jsonl")
    content = b'{"prompt": "a"}\n'
    shared.objects.write(uri, content)

    info = shared.objects.head(uri)
    assert shared.objects.read(uri) == content
    assert info is not None
    assert info.uri == uri
    assert info.num_bytes == len(content)
    assert info.etag == hashlib.md5(content).hexdigest()
    age = datetime.datetime.now(datetime.UTC) - info.last_modified_at
    assert abs(age) < datetime.timedelta(minutes=1)


def test_empty_object_is_one(shared: Running, bucket: str) -> None:
    uri = S3Uri(bucket, "empty")
    shared.objects.write(uri, b"")

    assert shared.objects.read(uri) == b""
    info = shared.objects.head(uri)
    assert info is not None
    assert info.num_bytes == 0


@pytest.mark.parametrize("num_bytes", [PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5])
def test_large_file_goes_up_in_parts(
    shared: Running, bucket: str, tmp_path: Path, num_bytes: int
) -> None:
    file = tmp_path / "weights"
    file.write_bytes((os.urandom(1 << 20) * (num_bytes // (1 << 20) + 1))[:num_bytes])
    uri = S3Uri(bucket, "weights")

    shared.objects.write(uri, file)

    info = shared.objects.head(uri)
    assert info is not None
    assert info.num_bytes == num_bytes
    assert ("-" in info.etag) == (num_bytes > PART_BYTES)
    assert shared.objects.read(uri) == file.read_bytes()
    assert not list(shared.objects.abandoned_uploads(datetime.timedelta(0)))


def test_object_is_read_as_a_stream(shared: Running, bucket: str) -> None:
    uri = S3Uri(bucket, "lines")
    content = b"".join(b'{"line": %d}\n' % number for number in range(200_000))
    shared.objects.write(uri, content)

    with shared.objects.open(uri) as stream:
        assert stream.readable()
        assert stream.read(5) == content[:5]
        assert stream.readline() == content[5:].split(b"\n", 1)[0] + b"\n"
        assert sum(1 for _ in stream) == 199_999
        assert stream.read(10) == b""
    with shared.objects.open(uri) as stream:
        assert stream.read() == content


def test_write_replaces_what_was_there(shared: Running, bucket: str) -> None:
    uri = S3Uri(bucket, "k")
    shared.objects.write(uri, b"old and longer")
    shared.objects.write(uri, b"new")

    assert shared.objects.read(uri) == b"new"


def test_absent_objects_and_buckets_are_told_apart(shared: Running, bucket: str) -> None:
    objects = shared.objects

    assert objects.head(S3Uri(bucket, "nothing")) is None
    assert objects.head(S3Uri("no-such-bucket", "nothing")) is None
    assert objects.bucket_exists(bucket)
    assert not objects.bucket_exists("no-such-bucket")
    with pytest.raises(ObjectStoreError, match=rf"NoSuchKey: .*s3://{bucket}/nothing"):
        objects.open(S3Uri(bucket, "nothing"))
    with pytest.raises(ObjectStoreError, match="NoSuchBucket"):
        objects.read(S3Uri("no-such-bucket", "nothing"))
    with pytest.raises(ObjectStoreError, match="NoSuchBucket"):
        list(objects.list("no-such-bucket"))


def test_delete_is_idempotent(shared: Running, bucket: str) -> None:
    uri = S3Uri(bucket, "k")
    shared.objects.write(uri, b"1")

    shared.objects.delete(uri)
    shared.objects.delete(uri)
    assert shared.objects.head(uri) is None


def test_bucket_may_be_created_twice(shared: Running, bucket: str) -> None:
    shared.objects.create_bucket(bucket)

    assert bucket in shared.objects.buckets()


def test_listing_has_every_object_in_order(shared: Running, bucket: str) -> None:
    """More than the 1000 that one answer holds."""
    keys = [f"many/{number:04}" for number in range(1005)]
    shared.objects.write(S3Uri(bucket, "other"), b"1")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: shared.objects.write(S3Uri(bucket, key), b""), keys))

    assert [info.uri.key for info in shared.objects.list(bucket, "many/")] == keys
    assert [info.uri.key for info in shared.objects.list(bucket, "oth")] == ["other"]
    assert list(shared.objects.list(bucket, "nothing")) == []


def test_abandoned_uploads_are_found_and_removed(shared: Running, bucket: str) -> None:
    objects = shared.objects
    begun = objects._client.create_multipart_upload(Bucket=bucket, Key="weights")
    objects._client.upload_part(
        Bucket=bucket, Key="weights", UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 1000
    )

    assert not list(objects.abandoned_uploads(datetime.timedelta(hours=1)))
    (found,) = list(objects.abandoned_uploads(datetime.timedelta(0)))
    assert found.uri == S3Uri(bucket, "weights")
    assert found.upload_id == begun["UploadId"]

    objects.abort_upload(found)
    objects.abort_upload(found)
    assert not list(objects.abandoned_uploads(datetime.timedelta(0)))


def test_embedded_store_that_does_not_run_is_said_so(data_dir: Path) -> None:
    with pytest.raises(ObjectStoreError, match="is not running") as raised:
        backend(Settings(data_dir=data_dir))
    assert raised.value.code == "ServiceUnavailable"


def test_owners_own_s3_is_used_where_it_is_set(data_dir: Path) -> None:
    settings = Settings(
        data_dir=data_dir,
        s3_endpoint_url="https://s3.example.org/",
        s3_access_key_id="AKID",
        s3_secret_access_key="secret",
        s3_region="eu-central-1",
    )

    found = backend(settings)
    assert found == Backend("https://s3.example.org", "AKID", "secret", "eu-central-1")
    assert "secret" not in repr(found).replace("secret_access_key", "")


def test_store_that_does_not_answer_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        store = ObjectStore(Backend(url, "AKID", "secret", "us-east-1"))
        with pytest.raises(ObjectStoreError, match=f"at {url} does not answer") as raised:
            store.buckets()
    assert raised.value.code == "ServiceUnavailable"


CONTENT = os.urandom(300_000)


class BreakingStore(http.server.BaseHTTPRequestHandler):
    """Serves one object, and breaks off in the middle of the first answers."""

    breaks_left = 0
    changes = False
    ranges: list[str]

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-") or 0)
        if self.changes and self.headers.get("If-Match") == '"one"':
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        rest = CONTENT[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", '"one"')
        self.send_header("Last-Modified", "Sat, 01 Nov 2025 00:00:00 GMT")
        self.end_headers()
        if type(self).breaks_left:
            type(self).breaks_left -= 1
            rest = rest[: len(rest) // 2]
            self.close_connection = True
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def breaking_store(
    breaks: int, *, changes: bool = False
) -> Iterator[tuple[ObjectStore, list[str]]]:
    ranges: list[str] = []
    handler = type(
        "Handler", (BreakingStore,), {"breaks_left": breaks, "changes": changes, "ranges": ranges}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            yield ObjectStore(Backend(url, "AKID", "secret", "us-east-1")), ranges
        finally:
            server.shutdown()
            thread.join()


def test_broken_download_goes_on_where_it_broke() -> None:
    with breaking_store(2) as (store, ranges):
        assert store.read(S3Uri("data", "k")) == CONTENT
        store._client.close()

    assert ranges[0] == ""
    assert ranges[1] == f"bytes={len(CONTENT) // 2}-"
    assert len(ranges) == 3


def test_object_that_changes_under_a_broken_download_is_no_mixture() -> None:
    with breaking_store(1, changes=True) as (store, _):
        with pytest.raises(ObjectStoreError) as raised:
            store.read(S3Uri("data", "k"))
        store._client.close()
    assert raised.value.code in ("412", "PreconditionFailed")


def test_download_that_keeps_breaking_is_given_up() -> None:
    with breaking_store(100) as (store, ranges):
        with pytest.raises(ObjectStoreError, match="broke off after"):
            store.read(S3Uri("data", "k"))
        store._client.close()
    assert len(ranges) < 30
