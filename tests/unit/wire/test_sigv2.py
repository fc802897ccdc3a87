"""Presigned URLs of version 2, as boto3 makes them by default in us-east-1."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from outcrop.errors import ApiError
from outcrop.wire.sigv4 import SignedRequest, read_signature, verify

SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
METHODS = {"get_object": "GET", "put_object": "PUT", "list_objects_v2": "GET", "upload_part": "PUT"}


def _presign(operation: str, **params: Any) -> SignedRequest:
    client = boto3.client(
        "s3",
        region_name="us-east-1",
        endpoint_url="http://127.0.0.1:7070",
        aws_access_key_id="AKIAIOSFODNN7EXAMPLE",
        aws_secret_access_key=SECRET,
        config=Config(s3={"addressing_style": "path"}),
    )
    url = urlsplit(client.generate_presigned_url(operation, Params={"Bucket": "bucket", **params}))
    assert "AWSAccessKeyId=" in url.query, "boto3 makes version 4 by default now"
    return SignedRequest(METHODS[operation], url.path, url.query, {"host": url.netloc})


def _verify(request: SignedRequest, **changes: Any) -> None:
    signature = read_signature(request)
    assert signature is not None
    assert (signature.kind, signature.service) == ("presigned-v2", "s3")
    options: dict[str, Any] = {"secret": SECRET, "now": datetime.now(UTC)} | changes
    verify(request, signature, options["secret"], body_sha256=None, now=options["now"])


@pytest.mark.parametrize(
    ("operation", "params"),
    [
        ("get_object", {"Key": "a b/ü+(~)'*=&?%"}),
        ("get_object", {"Key": "k", "VersionId": "v 1", "ResponseContentType": "text/plain; x=1"}),
        ("put_object", {"Key": "k", "ContentType": "text/plain", "ACL": "private"}),
        ("list_objects_v2", {"Prefix": "a b/", "MaxKeys": 5, "Delimiter": "/"}),
        ("upload_part", {"Key": "k", "UploadId": "u/=", "PartNumber": 2}),
    ],
)
def test_what_boto3_presigns_is_accepted_and_nothing_else(
    operation: str, params: dict[str, Any]
) -> None:
    request = _presign(operation, **params)
    _verify(request)
    path, query, headers = request.raw_path, request.raw_query, request.headers
    for changed in (
        SignedRequest("DELETE", path, query, headers),
        SignedRequest(request.method, path + "x", query, headers),
        SignedRequest(request.method, path, query + "&acl", headers),
        SignedRequest(request.method, path, query + "&uploadId=other", headers),
        SignedRequest(request.method, path, query, {"host": "h", "x-amz-acl": "public-read"}),
    ):
        with pytest.raises(ApiError) as caught:
            _verify(changed)
        assert (caught.value.code, caught.value.http_status) == ("SignatureDoesNotMatch", 403)
    with pytest.raises(ApiError, match="does not match"):
        _verify(request, secret="other")


def test_headers_that_a_browser_repeats_change_nothing() -> None:
    request = _presign("put_object", Key="k", ContentType="text/plain", ACL="private")
    headers = {"host": "h", "content-type": "text/plain", "x-amz-acl": "private"}
    _verify(SignedRequest("PUT", request.raw_path, request.raw_query, headers))
    headers["content-type"] = "text/html"
    with pytest.raises(ApiError):
        _verify(SignedRequest("PUT", request.raw_path, request.raw_query, headers))


def test_it_expires() -> None:
    with pytest.raises(ApiError, match="Request has expired") as caught:
        _verify(_presign("get_object", Key="k"), now=datetime.now(UTC) + timedelta(hours=2))
    assert (caught.value.code, caught.value.http_status) == ("AccessDenied", 403)


def test_a_parameter_that_version_2_does_not_sign_is_refused() -> None:
    request = _presign("get_object", Key="k")
    query = request.raw_query + "&attributes"
    with pytest.raises(ApiError, match="attributes is not covered"):
        _verify(SignedRequest("GET", request.raw_path, query, request.headers))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("AWSAccessKeyId=a&Signature=b&Expires=soon", "Invalid date"),
        ("AWSAccessKeyId=a&Signature=b&Expires=" + "9" * 40, "Invalid date"),
        ("AWSAccessKeyId=a&Signature=b&Expires=1&Expires=2", "more than once"),
        ("AWSAccessKeyId=a&AWSAccessKeyId=c&Signature=b&Expires=1", "more than once"),
    ],
)
def test_a_malformed_claim_is_refused(query: str, said: str) -> None:
    with pytest.raises(ApiError, match=said) as caught:
        read_signature(SignedRequest("GET", "/b/k", query, {}))
    assert caught.value.code == "AccessDenied"
