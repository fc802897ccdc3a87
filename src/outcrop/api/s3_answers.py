"""The store's answers, put right where S3's are others.

The embedded store takes folders for objects, ignores a range on HEAD, leaves out quotes, names its
own address, and has its own codes for some errors. What it cannot know is asked of it again here.
Source: Amazon S3 API Reference, "Error responses" and the operations named; trying SeaweedFS 4.48.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import httpx
from starlette.responses import Response

from outcrop.api.s3_actions import S3Call
from outcrop.api.s3_backend import PassedOn, S3Services, pass_on, read_bucket, store_error
from outcrop.errors import ApiError, InternalServerException
from outcrop.settings import Settings

MAX_PART_NUMBER = 10_000
_COPIES = frozenset({"CopyObject", "UploadPartCopy"})
_WRITES = _COPIES | {
    "PutObject",
    "UploadPart",
    "CreateMultipartUpload",
    "CompleteMultipartUpload",
    "PutObjectTagging",
}
_FOLDER_WRITES = frozenset({"PutObject", "CopyObject", "CreateMultipartUpload"})
_MENDED_XML = _COPIES | {"CompleteMultipartUpload"}
_BARE_ETAG = re.compile(rb'<ETag>(?:&#34;|&quot;|")?([^<"&]*)(?:&#34;|&quot;|")?</ETag>')
_LOCATION = re.compile(rb"<Location>[^<]*</Location>")
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)")
_FREE_BYTES = 64 * 1024 * 1024
_CHECKSUM_HEADER = "x-amz-checksum-"


@dataclass(frozen=True)
class _Asked:
    """A call with what its answer is judged by."""

    services: S3Services
    call: S3Call
    address: str
    """The client's own way to the service: scheme and host."""


async def check_call(services: S3Services, call: S3Call) -> None:
    """Refuse what the store would take.

    Raises:
        ApiError: InvalidArgument for a part's number, NoSuchUpload for an upload that has ended,
            ExistingObjectIsFile for a folder `a/` that would replace the object `a`.
    """
    query = dict(call.query)
    if call.operation in ("UploadPart", "UploadPartCopy"):
        number = query.get("partNumber", "")
        if not re.fullmatch(r"[0-9]{1,9}", number) or not 1 <= int(number) <= MAX_PART_NUMBER:
            raise ApiError(
                f"Part number must be an integer between 1 and {MAX_PART_NUMBER}, inclusive",
                code="InvalidArgument",
                http_status=400,
                members={"ArgumentName": "partNumber", "ArgumentValue": number[:200]},
            )
    elif call.operation in _FOLDER_WRITES and call.key.endswith("/"):
        if await _exists(services, call.bucket, call.key.removesuffix("/")):
            raise ApiError(
                "Existing Object is a file.", code="ExistingObjectIsFile", http_status=409
            )
    elif call.operation == "AbortMultipartUpload":
        wanted = (("uploadId", query["uploadId"]), ("max-parts", "1"))
        parts = S3Call("ListParts", call.bucket, call.key, wanted, {})
        upstream = await pass_on(services, "GET", parts, b"")
        body = await upstream.aread()
        if upstream.status_code == httpx.codes.NOT_FOUND:
            raise store_error(upstream.status_code, body)


async def answer(
    services: S3Services, call: S3Call, upstream: httpx.Response, address: str
) -> Response:
    """Return the answer to a call, from the store's.

    Raises:
        ApiError: the answer is an error of another code than the store's.
    """
    asked = _Asked(services, call, address)
    if not upstream.is_success:
        if upstream.status_code in (400, 404, 412, 500):
            return await _answer_error(asked, upstream)
        return PassedOn(upstream, upstream.aiter_raw())
    if call.operation in ("GetObject", "HeadObject") and _is_phantom(call, upstream):
        await upstream.aclose()
        raise ApiError(
            "The specified key does not exist.",
            code="NoSuchKey",
            http_status=404,
            members={"Key": call.key},
        )
    if call.operation in _MENDED_XML:
        return await _answer_xml(asked, upstream)
    response = PassedOn(upstream, upstream.aiter_raw())
    if call.operation == "HeadObject" and "range" in call.headers:
        try:
            _cut(response, call.headers["range"])
        except ApiError:
            await upstream.aclose()
            raise
    return response


def _is_phantom(call: S3Call, upstream: httpx.Response) -> bool:
    """Return whether an answer is about a folder of the store, which nobody put there."""
    return call.key.endswith("/") and upstream.headers.get("etag", "").endswith('-0"')


def _cut(response: Response, text: str) -> None:
    """Make an answer to HEAD one of a range; a range that cannot be read is ignored, as in S3."""
    found = _RANGE.fullmatch(text.strip())
    size = int(response.headers.get("content-length", "0"))
    if response.status_code != httpx.codes.OK or found is None or found.groups() == ("", ""):
        return
    begin, end = found.groups()
    if begin and end and int(end) < int(begin):
        return
    first = int(begin) if begin else max(0, size - int(end))
    last = min(int(end), size - 1) if begin and end else size - 1
    if first > last:
        raise ApiError(
            "The requested range is not satisfiable", code="InvalidRange", http_status=416
        )
    response.status_code = 206
    response.headers["content-length"] = str(last - first + 1)
    response.headers["content-range"] = f"bytes {first}-{last}/{size}"


async def _answer_xml(asked: _Asked, upstream: httpx.Response) -> Response:
    body = await upstream.aread()
    body = _BARE_ETAG.sub(rb"<ETag>&quot;\1&quot;</ETag>", body)
    location = f"<Location>{escape(asked.address + asked.call.raw_path)}</Location>".encode()
    body = _LOCATION.sub(lambda _: location, body)
    return _same_with(upstream, body)


async def _answer_error(asked: _Asked, upstream: httpx.Response) -> Response:
    call = asked.call
    body = await upstream.aread()
    if call.operation == "HeadObject":
        return _same_with(upstream, b"", is_head=True)
    error = store_error(upstream.status_code, body)
    if call.operation in _WRITES and error.http_status == 500 and _is_full(asked.services.settings):
        raise InternalServerException(
            "The service's disk is full, so nothing was changed. Free some space and try again."
        )
    if call.operation in _COPIES and error.code in ("InternalError", "NoSuchUpload"):
        await _check_bucket(asked)
    if call.operation == "GetBucketEncryption":
        await _check_bucket(asked)
    if error.code in ("BadDigest", "InvalidDigest") and "content-md5" not in call.headers:
        raise _bad_digest(call)
    if error.code == "PreconditionFailed" and call.operation == "PutObject":
        await _check_key(asked)
    return _same_with(upstream, body)


async def _check_bucket(asked: _Asked) -> None:
    """Raise NoSuchBucket where the call's bucket is missing."""
    await read_bucket(asked.services, asked.call.bucket, (("location", ""),))


async def _check_key(asked: _Asked) -> None:
    """Raise NoSuchKey where If-Match speaks of a key that is missing."""
    if "if-match" not in asked.call.headers:
        return
    if not await _exists(asked.services, asked.call.bucket, asked.call.key):
        raise ApiError(
            "The specified key does not exist.",
            code="NoSuchKey",
            http_status=404,
            members={"Key": asked.call.key},
        )


async def _exists(services: S3Services, bucket: str, key: str) -> bool:
    head = S3Call("HeadObject", bucket, key, (), {})
    found = await pass_on(services, "HEAD", head, b"")
    await found.aclose()
    return found.status_code != httpx.codes.NOT_FOUND


def _bad_digest(call: S3Call) -> ApiError:
    names = [name for name in call.headers if name.startswith(_CHECKSUM_HEADER)]
    if names:
        what = names[0].removeprefix(_CHECKSUM_HEADER).upper()
        message = f"The {what} you specified did not match the calculated checksum."
    else:
        message = "The checksum in the trailer did not match the calculated checksum."
    return ApiError(message, code="BadDigest", http_status=400)


def _is_full(settings: Settings) -> bool:
    """Return whether the embedded store has no space to speak of: 64 MiB, or 1 % of the disk."""
    if settings.s3_endpoint_url:
        return False
    usage = shutil.disk_usage(Path(settings.data_dir))
    return usage.free < max(_FREE_BYTES, usage.total // 100)


def _same_with(upstream: httpx.Response, body: bytes, *, is_head: bool = False) -> Response:
    """Return the store's answer with a body that is known whole."""

    async def once() -> AsyncIterator[bytes]:
        yield body

    response = PassedOn(upstream, once())
    if not is_head:
        response.headers["content-length"] = str(len(body))
    return response
