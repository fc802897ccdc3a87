"""What an S3 request asks for: its operation, and the IAM actions and resources that it needs.

Turns method, path, query and headers into an `S3Call`. Operations and their query parameters come
from botocore's own `s3` model; which of them are offered, and under which IAM action, is the table
below. Whatever is not in it is refused: nothing is passed on that was not understood. Knows no
principal, no body and no backend.
Source: botocore's `s3` model; Service Authorization Reference, "Actions, resources, and condition
keys for Amazon S3"; S3 User Guide, "Bucket naming rules", "Naming Amazon S3 objects".
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from urllib.parse import parse_qsl, quote, unquote_to_bytes

from outcrop.errors import ApiError
from outcrop.objects.keys import check_key, invalid_argument
from outcrop.wire.model import service_model

OWN_PATHS = frozenset({"console", "healthz", "metrics", "v1", "outcrop"})
"""First parts of paths that are ours for requests without a signature."""
RESERVED_BUCKETS = OWN_PATHS | {"model"}
"""First parts of paths of ours on the same port; no bucket may take such a name."""

ACTIONS: dict[str, str] = {
    "ListBuckets": "s3:ListAllMyBuckets",
    "CreateBucket": "s3:CreateBucket",
    "DeleteBucket": "s3:DeleteBucket",
    "HeadBucket": "s3:ListBucket",
    "ListObjects": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "ListObjectVersions": "s3:ListBucketVersions",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetBucketLocation": "s3:GetBucketLocation",
    "GetBucketAcl": "s3:GetBucketAcl",
    "GetBucketPolicy": "s3:GetBucketPolicy",
    "GetBucketCors": "s3:GetBucketCORS",
    "GetBucketVersioning": "s3:GetBucketVersioning",
    "PutBucketVersioning": "s3:PutBucketVersioning",
    "GetBucketTagging": "s3:GetBucketTagging",
    "PutBucketTagging": "s3:PutBucketTagging",
    "DeleteBucketTagging": "s3:PutBucketTagging",
    "GetBucketEncryption": "s3:GetEncryptionConfiguration",
    "PutBucketEncryption": "s3:PutEncryptionConfiguration",
    "DeleteBucketEncryption": "s3:PutEncryptionConfiguration",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
    "DeleteBucketLifecycle": "s3:PutLifecycleConfiguration",
    "DeleteObjects": "s3:DeleteObject",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "GetObjectAttributes": "s3:GetObject",
    "GetObjectAcl": "s3:GetObjectAcl",
    "GetObjectTagging": "s3:GetObjectTagging",
    "PutObjectTagging": "s3:PutObjectTagging",
    "DeleteObjectTagging": "s3:DeleteObjectTagging",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "UploadPartCopy": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListParts": "s3:ListMultipartUploadParts",
}
"""The operations that are offered. Bucket policies, ACLs, CORS, websites, notifications,
replication and object lock are not among them: they would be kept without being obeyed."""

_OF_A_VERSION = {
    "s3:GetObject": "s3:GetObjectVersion",
    "s3:GetObjectAcl": "s3:GetObjectVersionAcl",
    "s3:GetObjectTagging": "s3:GetObjectVersionTagging",
    "s3:PutObjectTagging": "s3:PutObjectVersionTagging",
    "s3:DeleteObjectTagging": "s3:DeleteObjectVersionTagging",
    "s3:DeleteObject": "s3:DeleteObjectVersion",
}
_COPIES = {"PutObject": "CopyObject", "UploadPart": "UploadPartCopy"}
# Two names for the same requests; the newer one is meant.
_SUPERSEDED = frozenset(
    {
        "GetBucketLifecycle",
        "PutBucketLifecycle",
        "GetBucketNotification",
        "PutBucketNotification",
        "ListDirectoryBuckets",
    }
)
_IGNORED_PARAMETERS = frozenset(
    {
        "x-amz-algorithm",
        "x-amz-credential",
        "x-amz-date",
        "x-amz-expires",
        "x-amz-signedheaders",
        "x-amz-signature",
        "x-amz-security-token",
        "x-amz-content-sha256",
        # Version 2's, which boto3 still presigns with:
        "awsaccesskeyid",
        "signature",
        "expires",
        # Added by SDKs to tell requests apart in logs:
        "x-id",
    }
)
_HOISTED = ("content-type", "content-md5")
_HARMLESS_ACLS = frozenset({"private", "bucket-owner-full-control"})
_REFUSED_HEADERS = (
    "x-amz-object-lock-",
    "x-amz-bucket-object-lock-",
    "x-amz-bypass-governance-retention",
    "x-amz-write-offset-bytes",
)
_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True)
class S3Call:
    """One understood S3 request."""

    operation: str
    """Its name in botocore's model, one of `ACTIONS`."""
    bucket: str
    """"" for ListBuckets."""
    key: str
    """Decoded; "" where the request is about the bucket."""
    query: tuple[tuple[str, str], ...]
    """Decoded parameters without those of the signature, all of them known to the operation."""
    headers: Mapping[str, str]
    """By lower-case name; also those that a presigned URL carries in its query."""
    copy_source: CopySource | None = None

    @property
    def version_id(self) -> str:
        """The version that is asked for, or ""."""
        return dict(self.query).get("versionId", "")

    @property
    def raw_path(self) -> str:
        """The path, encoded the one way that S3 signs."""
        if not self.bucket:
            return "/"
        return quote(f"/{self.bucket}/{self.key}" if self.key else f"/{self.bucket}", safe="/-_.~")

    @property
    def raw_query(self) -> str:
        """The query, encoded the one way that S3 signs, sorted."""
        return "&".join(
            sorted(
                f"{quote(name, safe='-_.~')}={quote(value, safe='-_.~')}"
                for name, value in self.query
            )
        )


@dataclass(frozen=True)
class CopySource:
    """What CopyObject and UploadPartCopy read."""

    bucket: str
    key: str
    version_id: str

    def __str__(self) -> str:
        path = quote(f"{self.bucket}/{self.key}", safe="/-_.~")
        return f"{path}?versionId={quote(self.version_id, safe='')}" if self.version_id else path


def read_call(method: str, raw_path: str, raw_query: str, headers: Mapping[str, str]) -> S3Call:
    """Take a request apart.

    Args:
        raw_path, raw_query: still percent-encoded.
        headers: by lower-case name.
    Raises:
        ApiError: the path is not a bucket's or a key's, a parameter or header is not supported
            here, or the operation is not offered (NotImplemented 501).
    """
    bucket, key = _split_path(raw_path)
    hoisted: dict[str, str] = {}
    query: dict[str, str] = {}
    for name, value in _pairs(raw_query):
        lowered = name.lower()
        if lowered in _IGNORED_PARAMETERS:
            continue
        # SDKs move headers of a presigned request into its query; S3 reads them from there.
        is_header = lowered.startswith("x-amz-") or name in _HOISTED
        target = hoisted if is_header else query
        name = lowered if is_header else name
        if name in target:
            raise invalid_argument(f"The query parameter {name} stands twice.", name, value)
        target[name] = value
    headers = {**hoisted, **headers}
    _check_headers(headers)
    level = "object" if key else "bucket" if bucket else "service"
    operation, known = _find_operation(method, level, query)
    if operation in _COPIES and "x-amz-copy-source" in headers:
        operation = _COPIES[operation]
    unknown = sorted(set(query) - known)
    if operation not in ACTIONS or unknown:
        what = f"The query parameter {unknown[0]}" if unknown else operation
        raise ApiError(
            f"{what} is not offered by this service.", code="NotImplemented", http_status=501
        )
    source = None
    if operation in _COPIES.values():
        source = _read_copy_source(headers["x-amz-copy-source"])
    return S3Call(operation, bucket, key, tuple(query.items()), headers, source)


def needed_permissions(call: S3Call) -> list[tuple[str, str]]:
    """Return the (action, resource ARN) pairs that a call needs, all of them.

    Those of DeleteObjects depend on its body; see `delete_permission`.
    """
    action = ACTIONS[call.operation]
    if call.version_id:
        action = _OF_A_VERSION.get(action, action)
    if not call.bucket:
        return [(action, "arn:aws:s3:::*")]
    resource = object_arn(call.bucket, call.key) if call.key else f"arn:aws:s3:::{call.bucket}"
    needed = [(action, resource)]
    if call.operation == "GetObjectAttributes":
        needed.append(("s3:GetObjectAttributes", resource))
    if "x-amz-tagging" in call.headers:
        needed.append(("s3:PutObjectTagging", resource))
    if call.copy_source is not None:
        source = call.copy_source
        read = "s3:GetObjectVersion" if source.version_id else "s3:GetObject"
        needed.append((read, object_arn(source.bucket, source.key)))
    return needed


def delete_permission(bucket: str, key: str, version_id: str) -> tuple[str, str]:
    """Return what deleting one object of a DeleteObjects request needs."""
    action = "s3:DeleteObjectVersion" if version_id else "s3:DeleteObject"
    return action, object_arn(bucket, key)


def object_arn(bucket: str, key: str) -> str:
    """Return the ARN of an object."""
    return f"arn:aws:s3:::{bucket}/{key}"


def check_new_bucket(name: str) -> None:
    """Refuse a name that no new bucket may have.

    Raises:
        ApiError: InvalidBucketName 400.
    """
    if name in RESERVED_BUCKETS:
        raise _invalid_bucket(
            name, f"The name {name} is taken by a path of this service. Choose another."
        )
    looks_like_ip = True
    try:
        ipaddress.IPv4Address(name)
    except ValueError:
        looks_like_ip = False
    if looks_like_ip or ".." in name or name.startswith("xn--") or name.endswith("-s3alias"):
        raise _invalid_bucket(name, "The specified bucket is not valid.")


def _split_path(raw_path: str) -> tuple[str, str]:
    raw_bucket, _, raw_key = raw_path.removeprefix("/").partition("/")
    try:
        bucket = unquote_to_bytes(raw_bucket).decode("utf-8")
        key = unquote_to_bytes(raw_key).decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid_uri() from None
    if not bucket and key:
        raise _invalid_uri()
    if bucket and not _BUCKET.fullmatch(bucket):
        raise _invalid_bucket(bucket, "The specified bucket is not valid.")
    if key:
        check_key(key)
    return bucket, key


def _pairs(raw_query: str) -> list[tuple[str, str]]:
    try:
        return parse_qsl(raw_query, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise _invalid_uri() from None


@cache
def _operations() -> dict[tuple[str, str], list[tuple[str, dict[str, str | None], frozenset[str]]]]:
    """Return, by method and level: name, query that must be there, and all known parameters."""
    model = service_model("s3")
    found: dict[tuple[str, str], list[tuple[str, dict[str, str | None], frozenset[str]]]] = {}
    levels = {"/": "service", "/{Bucket}": "bucket", "/{Bucket}/{Key+}": "object"}
    for name in model.operation_names:
        operation = model.operation_model(name)
        path, _, static = operation.http["requestUri"].partition("?")
        if path not in levels or name in _SUPERSEDED or name in _COPIES.values():
            continue
        required: dict[str, str | None] = {}
        for part in filter(None, static.split("&")):
            key, equals, value = part.partition("=")
            required[key] = value if equals else None
        shape = operation.input_shape
        members = {
            member: shape_member.serialization["name"]
            for member, shape_member in (shape.members.items() if shape else ())
            if shape_member.serialization.get("location") == "querystring"
        }
        for member, key in members.items():
            if shape is not None and member in shape.required_members:
                required[key] = None
        known = frozenset(required) | frozenset(members.values())
        found.setdefault((operation.http["method"], levels[path]), []).append(
            (name, required, known)
        )
    return found


def _find_operation(
    method: str, level: str, query: Mapping[str, str]
) -> tuple[str, frozenset[str]]:
    """Return the operation that needs most of the query's parameters, and those it knows."""
    fitting = [
        (len(required), name, known)
        for name, required, known in _operations().get((method, level), ())
        if all(
            key in query and (value is None or query[key] == value)
            for key, value in required.items()
        )
    ]
    if not fitting:
        raise ApiError(
            "The specified method is not allowed against this resource.",
            code="MethodNotAllowed",
            http_status=405,
        )
    _, name, known = max(fitting, key=lambda item: item[0])
    return name, known


def _check_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that change what an operation means in a way that is not offered."""
    for name, value in headers.items():
        is_text = value.isascii() and (value.isprintable() or not value)
        if name.startswith("x-amz-") and not (is_text and _TOKEN.fullmatch(name)):
            raise invalid_argument(
                "The names and values of x-amz- headers must be printable ASCII text.", name, value
            )
        if name.startswith(_REFUSED_HEADERS):
            raise ApiError(
                f"The header {name} is not offered by this service.",
                code="NotImplemented",
                http_status=501,
            )
    acl = headers.get("x-amz-acl", "private")
    if acl not in _HARMLESS_ACLS or any(name.startswith("x-amz-grant-") for name in headers):
        raise ApiError(
            "The bucket does not allow ACLs", code="AccessControlListNotSupported", http_status=400
        )
    if headers.get("x-amz-server-side-encryption", "AES256") != "AES256":
        raise ApiError(
            "Encryption with keys of a key management service is not offered by this service yet. "
            "AES256 is.",
            code="NotImplemented",
            http_status=501,
        )


def _read_copy_source(text: str) -> CopySource:
    path, _, raw_query = text.partition("?")
    version_id = dict(parse_qsl(raw_query)).get("versionId", "")
    try:
        decoded = unquote_to_bytes(path).decode("utf-8").removeprefix("/")
    except UnicodeDecodeError:
        decoded = ""
    bucket, _, key = decoded.partition("/")
    if not key or not _BUCKET.fullmatch(bucket):
        raise invalid_argument(
            "Copy Source must mention the source bucket and key: sourcebucket/sourcekey",
            "x-amz-copy-source",
            text,
        )
    check_key(key)
    return CopySource(bucket, key, version_id)


def _invalid_uri() -> ApiError:
    return ApiError("Couldn't parse the specified URI.", code="InvalidURI", http_status=400)


def _invalid_bucket(name: str, message: str) -> ApiError:
    return ApiError(
        message, code="InvalidBucketName", http_status=400, members={"BucketName": name}
    )
