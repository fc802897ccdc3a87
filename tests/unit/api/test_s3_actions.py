"""What S3 requests mean, and what they need."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.session import Session
from hypothesis import given
from hypothesis import strategies as st

from outcrop.api.s3_actions import (
    ACTIONS,
    RESERVED_BUCKETS,
    S3Call,
    check_new_bucket,
    needed_permissions,
    read_call,
)
from outcrop.errors import ApiError
from outcrop.wire.model import service_model

BUCKET, OBJECT = "arn:aws:s3:::bkt", "arn:aws:s3:::bkt/d/k"


def call(method: str, path: str, query: str = "", **headers: str) -> S3Call:
    return read_call(
        method, path, query, {name.replace("_", "-"): value for name, value in headers.items()}
    )


@cache
def s3_client() -> Any:
    return Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url="http://127.0.0.1:9",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        config=Config(s3={"addressing_style": "path"}),
    )


def sent_by_botocore(operation: str) -> AWSRequest:
    """Return what botocore sends for an operation, with the least it needs."""
    client = s3_client()
    caught: list[AWSRequest] = []

    def catch(request: AWSRequest, **kwargs: Any) -> Any:
        caught.append(request)
        raise InterruptedError

    client.meta.events.register("before-send.s3", catch)
    shape = service_model("s3").operation_model(operation).input_shape
    values: dict[str, Any] = {
        "Bucket": "bkt",
        "Key": "d/k",
        "CopySource": "bkt/source",
        "UploadId": "u",
        "PartNumber": 1,
        "ObjectAttributes": ["ETag"],
        "Delete": {"Objects": [{"Key": "k"}]},
        "Tagging": {"TagSet": []},
        "VersioningConfiguration": {},
        "ServerSideEncryptionConfiguration": {"Rules": []},
    }
    required = shape.required_members if shape is not None else []
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in operation)
    method = name.lstrip("_").replace("_v2", "v2").replace("objectsv2", "objects_v2")
    with pytest.raises(InterruptedError):
        getattr(client, method)(**{member: values[member] for member in required})
    client.meta.events.unregister("before-send.s3", catch)
    return caught[0]


@pytest.mark.parametrize("operation", sorted(ACTIONS))
def test_what_botocore_sends_is_understood_as_what_was_called(operation: str) -> None:
    request = sent_by_botocore(operation)
    raw_path, _, raw_query = request.url.removeprefix("http://127.0.0.1:9").partition("?")
    headers = {
        name.lower(): value.decode() if isinstance(value, bytes) else str(value)
        for name, value in request.headers.items()
    }
    found = read_call(request.method, raw_path, raw_query, headers)
    assert found.operation == operation
    assert needed_permissions(found)[0][0].startswith("s3:")


def test_every_operation_of_the_table_is_in_the_model() -> None:
    assert set(ACTIONS) <= set(service_model("s3").operation_names)


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "needed"),
    [
        ("GET", "/", "", {}, [("s3:ListAllMyBuckets", "arn:aws:s3:::*")]),
        ("GET", "/bkt", "", {}, [("s3:ListBucket", BUCKET)]),
        ("GET", "/bkt/", "list-type=2&prefix=x", {}, [("s3:ListBucket", BUCKET)]),
        ("HEAD", "/bkt", "", {}, [("s3:ListBucket", BUCKET)]),
        ("GET", "/bkt", "versions", {}, [("s3:ListBucketVersions", BUCKET)]),
        ("GET", "/bkt", "uploads", {}, [("s3:ListBucketMultipartUploads", BUCKET)]),
        ("DELETE", "/bkt", "", {}, [("s3:DeleteBucket", BUCKET)]),
        ("DELETE", "/bkt", "lifecycle", {}, [("s3:PutLifecycleConfiguration", BUCKET)]),
        ("GET", "/bkt/d/k", "", {}, [("s3:GetObject", OBJECT)]),
        ("GET", "/bkt/d/k", "x-id=GetObject", {}, [("s3:GetObject", OBJECT)]),
        ("HEAD", "/bkt/d/k", "", {}, [("s3:GetObject", OBJECT)]),
        ("GET", "/bkt/d/k", "versionId=1", {}, [("s3:GetObjectVersion", OBJECT)]),
        ("DELETE", "/bkt/d/k", "", {}, [("s3:DeleteObject", OBJECT)]),
        ("DELETE", "/bkt/d/k", "versionId=1", {}, [("s3:DeleteObjectVersion", OBJECT)]),
        ("DELETE", "/bkt/d/k", "uploadId=1", {}, [("s3:AbortMultipartUpload", OBJECT)]),
        ("GET", "/bkt/d/k", "uploadId=1", {}, [("s3:ListMultipartUploadParts", OBJECT)]),
        ("PUT", "/bkt/d/k", "", {}, [("s3:PutObject", OBJECT)]),
        ("PUT", "/bkt/d/k", "partNumber=1&uploadId=1", {}, [("s3:PutObject", OBJECT)]),
        ("POST", "/bkt/d/k", "uploads", {}, [("s3:PutObject", OBJECT)]),
        ("POST", "/bkt/d/k", "uploadId=1", {}, [("s3:PutObject", OBJECT)]),
        ("PUT", "/bkt/d/k", "tagging", {}, [("s3:PutObjectTagging", OBJECT)]),
        (
            "PUT",
            "/bkt/d/k",
            "",
            {"x-amz-tagging": "a=b"},
            [("s3:PutObject", OBJECT), ("s3:PutObjectTagging", OBJECT)],
        ),
        (
            "PUT",
            "/bkt/d/k",
            "",
            {"x-amz-copy-source": "/other/a%20b+c"},
            [("s3:PutObject", OBJECT), ("s3:GetObject", "arn:aws:s3:::other/a b+c")],
        ),
        (
            "PUT",
            "/bkt/d/k",
            "partNumber=1&uploadId=1",
            {"x-amz-copy-source": "other/k?versionId=7"},
            [("s3:PutObject", OBJECT), ("s3:GetObjectVersion", "arn:aws:s3:::other/k")],
        ),
        (
            "PUT",
            "/bkt/d/k",
            "x-amz-copy-source=other%2Fk",  # as a presigned request may carry it
            {},
            [("s3:PutObject", OBJECT), ("s3:GetObject", "arn:aws:s3:::other/k")],
        ),
        (
            "GET",
            "/bkt/d/k",
            "attributes",
            {},
            [("s3:GetObject", OBJECT), ("s3:GetObjectAttributes", OBJECT)],
        ),
    ],
)
def test_permissions_that_a_request_needs(
    method: str, path: str, query: str, headers: dict[str, str], needed: list[tuple[str, str]]
) -> None:
    assert needed_permissions(read_call(method, path, query, headers)) == needed


@pytest.mark.parametrize(
    ("method", "path", "query", "headers", "code"),
    [
        ("POST", "/", "Action=ListUsers", {}, "MethodNotAllowed"),
        ("POST", "/bkt", "", {}, "MethodNotAllowed"),
        ("POST", "/bkt/k", "", {}, "MethodNotAllowed"),
        ("OPTIONS", "/bkt/k", "", {}, "MethodNotAllowed"),
        ("PATCH", "/bkt/k", "", {}, "MethodNotAllowed"),
        ("PUT", "/bkt", "policy", {}, "NotImplemented"),
        ("PUT", "/bkt", "acl", {}, "NotImplemented"),
        ("PUT", "/bkt/k", "acl", {}, "NotImplemented"),
        ("PUT", "/bkt/k", "retention", {}, "NotImplemented"),
        ("POST", "/bkt/k", "select&select-type=2", {}, "NotImplemented"),
        ("GET", "/bkt/k", "torrent", {}, "NotImplemented"),
        ("GET", "/bkt", "no-such=1", {}, "NotImplemented"),
        ("DELETE", "/bkt", "no-such", {}, "NotImplemented"),
        ("DELETE", "/bkt/k", "tagging&uploadId=1", {}, "NotImplemented"),
        ("PUT", "/bkt/k", "partNumber=1", {}, "NotImplemented"),
        ("GET", "/bkt/k", "versionId=1&versionId=2", {}, "InvalidArgument"),
        ("GET", "/Bkt", "", {}, "InvalidBucketName"),
        ("GET", "/b", "", {}, "InvalidBucketName"),
        ("GET", "/bkt%2Fk", "", {}, "InvalidBucketName"),
        ("GET", "//k", "", {}, "InvalidURI"),
        ("GET", "/bkt/%ff", "", {}, "InvalidURI"),
        ("GET", "/bkt/k", "versionId=%ff", {}, "InvalidURI"),
        ("GET", "/bkt/" + "k" * 1025, "", {}, "KeyTooLongError"),
        ("GET", "/bkt/" + "k" * 256, "", {}, "KeyTooLongError"),
        ("GET", "/bkt/a%2F%2Fb", "", {}, "InvalidArgument"),
        ("PUT", "/bkt/k", "", {"x-amz-copy-source": "other/../k"}, "InvalidArgument"),
        ("PUT", "/bkt/k", "", {"x-amz-copy-source": "other"}, "InvalidArgument"),
        ("PUT", "/bkt/k", "", {"x-amz-copy-source": "arn:aws:s3:x"}, "InvalidArgument"),
        ("PUT", "/bkt/k", "", {"x-amz-acl": "public-read"}, "AccessControlListNotSupported"),
        ("PUT", "/bkt/k", "", {"x-amz-grant-read": "id=1"}, "AccessControlListNotSupported"),
        ("PUT", "/bkt/k", "", {"x-amz-server-side-encryption": "aws:kms"}, "NotImplemented"),
        ("PUT", "/bkt/k", "", {"x-amz-meta-a": "ü"}, "InvalidArgument"),
        ("PUT", "/bkt/k", "x-amz-meta-a=b%0d%0ahost:c", {}, "InvalidArgument"),
        ("PUT", "/bkt/k", "x-amz-meta%0a=b", {}, "InvalidArgument"),
        ("PUT", "/bkt/k", "", {"x-amz-object-lock-mode": "GOVERNANCE"}, "NotImplemented"),
    ],
)
def test_what_is_not_offered_is_refused(
    method: str, path: str, query: str, headers: dict[str, str], code: str
) -> None:
    with pytest.raises(ApiError) as error:
        read_call(method, path, query, headers)
    assert error.value.code == code


def test_parts_of_a_signature_are_not_parts_of_the_call() -> None:
    query = (
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=a&X-Amz-Date=d&X-Amz-Expires=1"
        "&X-Amz-SignedHeaders=host&X-Amz-Signature=s&x-id=PutObject&x-amz-meta-a=b"
    )
    found = call("PUT", "/bkt/d%20k", query, x_amz_meta_c="d")
    assert (found.query, found.raw_query, found.raw_path) == ((), "", "/bkt/d%20k")
    assert found.headers == {"x-amz-meta-a": "b", "x-amz-meta-c": "d"}
    version_2 = "AWSAccessKeyId=a&Signature=s&Expires=1&content-type=text%2Fx"
    assert call("PUT", "/bkt/k", version_2).headers == {"content-type": "text/x"}


@pytest.mark.parametrize(
    "name", [*sorted(RESERVED_BUCKETS), "192.168.0.1", "a..b", "xn--a", "a-s3alias"]
)
def test_bucket_names_that_are_not_given_out(name: str) -> None:
    with pytest.raises(ApiError) as error:
        check_new_bucket(name)
    assert error.value.code == "InvalidBucketName"


def test_other_bucket_names_are_given_out() -> None:
    for name in ("models", "my.bucket", "a1b", "outcrop-data"):
        check_new_bucket(name)


@given(
    st.sampled_from(["GET", "HEAD", "PUT", "POST", "DELETE"]),
    st.text("/ab.%2Fe\\ü \0", max_size=20),
    st.text("aclversionId=&uploads?/%2", max_size=20),
)
def test_any_request_is_understood_or_refused(method: str, path: str, query: str) -> None:
    with contextlib.suppress(ApiError):
        found = read_call(method, "/bkt/" + path, query, {})
        # What is passed on names exactly what the policies were asked about.
        again = read_call(method, found.raw_path, found.raw_query, {})
        assert (again.key, sorted(again.query)) == (found.key, sorted(found.query))
        assert not {"", ".", ".."} & set(found.key.removesuffix("/").split("/")) or not found.key
