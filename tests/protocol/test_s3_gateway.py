"""S3 through the gateway, over a real object store: what boto3 and other clients rely on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from tests.protocol.s3_gateway import (
    Gateway,
    crc32,
    fetch,
    gateway,
    object_path,
    send,
    send_chunks,
    send_unsigned_chunks,
    wait_until,
)

from outcrop.identity import accounts
from outcrop.identity.credentials import Credentials
from outcrop.objects import embedded
from outcrop.store.database import transaction


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def s3(place: Gateway) -> Any:
    return place.client()


@pytest.fixture
def bucket(place: Gateway) -> str:
    return place.bucket()


def code_of(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


def keys(s3: Any, bucket: str) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


# --- buckets and objects --------------------------------------------------------------------------


def test_bucket_is_made_found_located_and_deleted(s3: Any, bucket: str) -> None:
    assert s3.head_bucket(Bucket=bucket)["BucketRegion"] == "us-east-1"
    assert s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] is None
    assert bucket in [item["Name"] for item in s3.list_buckets()["Buckets"]]
    s3.delete_bucket(Bucket=bucket)
    with pytest.raises(ClientError) as error:
        s3.head_bucket(Bucket=bucket)
    assert code_of(error) == "404"


@pytest.mark.parametrize("name", ["console", "healthz", "metrics", "outcrop", "model", "10.0.0.1"])
def test_bucket_cannot_take_the_name_of_a_path_of_ours(s3: Any, name: str) -> None:
    with pytest.raises(ClientError) as error:
        s3.create_bucket(Bucket=name)
    assert code_of(error) == "InvalidBucketName"


def test_bucket_of_another_region_is_refused(s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as error:
        s3.create_bucket(
            Bucket=f"{bucket}-eu", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
        )
    assert code_of(error) == "IllegalLocationConstraintException"


def test_put_to_a_missing_bucket_makes_none(s3: Any) -> None:
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket="never-made", Key="x", Body=b"x")
    assert code_of(error) == "NoSuchBucket"


def test_object_comes_back_as_it_was_put(s3: Any, bucket: str) -> None:
    data = b'{"prompt": "a", "completion": "b"}\n' * 1000
    s3.put_object(Bucket=bucket, Key="d/train.jsonl", Body=data, Metadata={"k_1.a": "v w"})
    found = s3.get_object(Bucket=bucket, Key="d/train.jsonl")
    assert found["Body"].read() == data
    assert found["ETag"] == f'"{hashlib.md5(data).hexdigest()}"'
    assert found["ContentType"] == "binary/octet-stream"
    assert found["Metadata"] == {"k_1.a": "v w"}


def test_answers_carry_our_request_id_and_nothing_of_the_backend(
    place: Gateway, bucket: str
) -> None:
    send(place, "PUT", f"/{bucket}/x", body=b"x")
    found = send(place, "GET", f"/{bucket}/x")
    assert len(found.headers["x-amz-request-id"]) == 36
    assert found.headers["content-length"] == "1"
    assert not [name for name in found.headers if "seaweed" in name]
    missing = send(place, "GET", f"/{bucket}/y")
    assert (missing.status, missing.code) == (404, "NoSuchKey")
    assert len(missing.headers["x-amz-request-id"]) == 36


def test_upload_in_parts_and_download(s3: Any, bucket: str, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 20
    (tmp_path / "up").write_bytes(data)
    s3.upload_file(str(tmp_path / "up"), bucket, "big", ExtraArgs={"ContentType": "text/x"})
    s3.download_file(bucket, "big", str(tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == data
    head = s3.head_object(Bucket=bucket, Key="big")
    assert (head["ContentLength"], head["ContentType"]) == (len(data), "text/x")


def test_parts_are_listed_copied_and_aborted(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="source", Body=b"s" * 6_000_000)
    upload = s3.create_multipart_upload(Bucket=bucket, Key="parts")["UploadId"]
    place = {"Bucket": bucket, "Key": "parts", "UploadId": upload}
    first = s3.upload_part(**place, PartNumber=1, Body=b"p" * 5_300_000)
    second = s3.upload_part_copy(
        **place, PartNumber=2, CopySource={"Bucket": bucket, "Key": "source"}
    )
    assert len(s3.list_parts(**place)["Parts"]) == 2
    assert [item["Key"] for item in s3.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [
        "parts"
    ]
    s3.complete_multipart_upload(
        **place,
        MultipartUpload={
            "Parts": [
                {"PartNumber": 1, "ETag": first["ETag"]},
                {"PartNumber": 2, "ETag": second["CopyPartResult"]["ETag"]},
            ]
        },
    )
    assert s3.head_object(Bucket=bucket, Key="parts")["ContentLength"] == 11_300_000
    upload = s3.create_multipart_upload(Bucket=bucket, Key="given-up")["UploadId"]
    s3.abort_multipart_upload(Bucket=bucket, Key="given-up", UploadId=upload)
    assert keys(s3, bucket) == ["parts", "source"]


def test_range_head_and_conditions(s3: Any, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="x", Body=b"0123456789")["ETag"]
    part = s3.get_object(Bucket=bucket, Key="x", Range="bytes=2-4")
    assert (part["Body"].read(), part["ContentRange"]) == (b"234", "bytes 2-4/10")
    assert s3.head_object(Bucket=bucket, Key="x")["ContentLength"] == 10
    with pytest.raises(ClientError) as error:
        s3.get_object(Bucket=bucket, Key="x", IfNoneMatch=etag)
    assert code_of(error) == "304"
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="x", Body=b"1", IfNoneMatch="*")
    assert code_of(error) == "PreconditionFailed"
    with pytest.raises(ClientError) as error:
        s3.get_object(Bucket=bucket, Key="x", Range="bytes=90-")
    assert code_of(error) == "InvalidRange"


def test_listing_pages_and_groups(s3: Any, bucket: str) -> None:
    for number in range(12):
        s3.put_object(Bucket=bucket, Key=f"l/{number:02d}", Body=b"")
    s3.put_object(Bucket=bucket, Key="m/x", Body=b"")
    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix="l/", PaginationConfig={"PageSize": 5}
    )
    assert [len(page["Contents"]) for page in pages] == [5, 5, 2]
    grouped = s3.list_objects_v2(Bucket=bucket, Delimiter="/")["CommonPrefixes"]
    assert [item["Prefix"] for item in grouped] == ["l/", "m/"]
    assert len(s3.list_objects(Bucket=bucket)["Contents"]) == 13


def test_copy_tags_versions_and_encryption(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a b+c", Body=b"1", Tagging="t=1")
    s3.copy_object(Bucket=bucket, Key="copy", CopySource={"Bucket": bucket, "Key": "a b+c"})
    assert s3.get_object(Bucket=bucket, Key="copy")["Body"].read() == b"1"
    assert s3.get_object_tagging(Bucket=bucket, Key="a b+c")["TagSet"] == [
        {"Key": "t", "Value": "1"}
    ]
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    old = s3.put_object(Bucket=bucket, Key="v", Body=b"old")["VersionId"]
    s3.put_object(Bucket=bucket, Key="v", Body=b"new")
    assert s3.get_object(Bucket=bucket, Key="v", VersionId=old)["Body"].read() == b"old"
    assert len(s3.list_object_versions(Bucket=bucket, Prefix="v")["Versions"]) == 2
    s3.put_object(Bucket=bucket, Key="sse", Body=b"secret", ServerSideEncryption="AES256")
    found = s3.get_object(Bucket=bucket, Key="sse")
    assert (found["ServerSideEncryption"], found["Body"].read()) == ("AES256", b"secret")


def test_lifecycle_and_bucket_tags_are_kept(s3: Any, bucket: str) -> None:
    rule = {
        "ID": "a",
        "Status": "Enabled",
        "Filter": {"Prefix": "tmp/"},
        "Expiration": {"Days": 1},
    }
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})
    assert len(s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]) == 1
    s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
    assert s3.get_bucket_tagging(Bucket=bucket)["TagSet"] == [{"Key": "a", "Value": "b"}]


def test_many_objects_are_deleted_in_one_request(s3: Any, bucket: str) -> None:
    names = [f"l/{number} ü&<" for number in range(12)]
    for name in names:
        s3.put_object(Bucket=bucket, Key=name, Body=b"")
    deleted = s3.delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": name} for name in names]}
    )
    assert len(deleted["Deleted"]) == 12
    assert keys(s3, bucket) == []


@pytest.mark.parametrize(
    "key",
    [
        "with space",
        "plus+sign",
        "a b+c%20d",
        "100%",
        "%2F",
        "ü/日本語/🙂",
        "q?a=1&b#c",
        "=;:@$,!*'()[]{}|^`\"<>~",
        "...",
        ".hidden/..x",
        "folder/",
        "tab\tand\nline",
    ],
)
def test_odd_keys_survive(place: Gateway, s3: Any, bucket: str, key: str) -> None:
    data = b"" if key.endswith("/") else key.encode()
    s3.put_object(Bucket=bucket, Key=key, Body=data)
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == data
    assert keys(s3, bucket) == [key]
    url = s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key})
    assert fetch(url).body == data
    assert send(place, "GET", object_path(bucket, key)).body == data


@pytest.mark.parametrize(
    "path",
    [
        "/../{other}/secret",
        "/%2e%2e/{other}/secret",
        "/..%2f{other}%2fsecret",
        "/a/../../{other}/secret",
        "//secret",
        "/a//b",
        "/./secret",
        "/.uploads/x/0001.part",
        "/v.versions/v_1",
        "/a%00b",
        "/a%5Csecret",
        "/..%5C{other}%5Csecret",
    ],
)
def test_no_path_reaches_another_object(place: Gateway, s3: Any, bucket: str, path: str) -> None:
    other = place.bucket()
    for name in (bucket, other):
        s3.put_object(Bucket=name, Key="secret", Body=b"kept")
    for method in ("GET", "PUT", "DELETE"):
        reply = send(place, method, f"/{bucket}{path.format(other=other)}")
        assert reply.status == 400
        assert reply.code in ("InvalidArgument", "InvalidURI")
    assert keys(s3, bucket) == keys(s3, other) == ["secret"]


def test_content_below_a_folder_marker_is_refused_rather_than_lost(s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="folder/", Body=b"would be lost")
    assert code_of(error) == "InvalidRequest"


# --- answers of the store that differ from S3's ---------------------------------------------------


def test_copy_into_a_missing_bucket_says_so(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="x", Body=b"1")
    target = {"Bucket": "never-made", "Key": "y", "CopySource": {"Bucket": bucket, "Key": "x"}}
    with pytest.raises(ClientError) as error:
        s3.copy_object(**target)
    assert code_of(error) == "NoSuchBucket"
    with pytest.raises(ClientError) as error:
        s3.upload_part_copy(**target, UploadId="u", PartNumber=1)
    assert code_of(error) == "NoSuchBucket"


def test_full_disk_is_named(
    s3: Any, bucket: str, place: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put_object(Bucket=bucket, Key="x", Body=b"1")
    usage = shutil.disk_usage(place.settings.data_dir)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    # A copy into a missing bucket is what the store answers with its 500 at will.
    with pytest.raises(ClientError, match="disk is full, so nothing was changed") as error:
        s3.copy_object(Bucket="never-made", Key="y", CopySource={"Bucket": bucket, "Key": "x"})
    assert code_of(error) == "InternalError"


def test_folder_that_nobody_put_is_no_object(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="b/1", Body=b"")
    s3.put_object(Bucket=bucket, Key="real/", Body=b"")
    with pytest.raises(ClientError) as error:
        s3.get_object(Bucket=bucket, Key="b/")
    assert code_of(error) == "NoSuchKey"
    with pytest.raises(ClientError) as error:
        s3.head_object(Bucket=bucket, Key="b/")
    assert code_of(error) == "404"
    assert s3.head_object(Bucket=bucket, Key="real/")["ContentLength"] == 0


def test_folder_does_not_replace_the_object_of_its_name(s3: Any, bucket: str) -> None:
    for key in ("a", "a/1"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"kept")
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="a/", Body=b"")
    assert code_of(error) == "ExistingObjectIsFile"
    assert s3.get_object(Bucket=bucket, Key="a")["Body"].read() == b"kept"
    for key in ("b/1", "b/", "b/"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    assert keys(s3, bucket) == ["a", "a/1", "b/", "b/1"]


def test_answers_name_our_address_and_quote_their_etags(
    place: Gateway, s3: Any, bucket: str
) -> None:
    etag = s3.put_object(Bucket=bucket, Key="x", Body=b"1")["ETag"]
    source = {"Bucket": bucket, "Key": "x"}
    assert (
        s3.copy_object(Bucket=bucket, Key="y", CopySource=source)["CopyObjectResult"]["ETag"]
        == etag
    )
    upload = s3.create_multipart_upload(Bucket=bucket, Key="a b&ü")["UploadId"]
    parts = {"Bucket": bucket, "Key": "a b&ü", "UploadId": upload}
    part = s3.upload_part_copy(**parts, PartNumber=1, CopySource=source)["CopyPartResult"]
    assert part["ETag"] == etag
    done = s3.complete_multipart_upload(
        **parts, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]}
    )
    assert done["Location"] == place.url + object_path(bucket, "a b&ü")
    assert done["ETag"].startswith('"')
    with pytest.raises(ClientError) as error:
        s3.abort_multipart_upload(**parts)
    assert code_of(error) == "NoSuchUpload"


@pytest.mark.parametrize(
    ("wanted", "found"), [("2-4", "2-4"), ("-3", "7-9"), ("5-", "5-9"), ("8-99", "8-9")]
)
def test_head_of_a_range(s3: Any, bucket: str, wanted: str, found: str) -> None:
    s3.put_object(Bucket=bucket, Key="x", Body=b"0123456789")
    query = {"Bucket": bucket, "Key": "x", "Range": f"bytes={wanted}"}
    head, got = s3.head_object(**query), s3.get_object(**query)
    assert head["ContentRange"] == got["ContentRange"] == f"bytes {found}/10"
    assert head["ContentLength"] == got["ContentLength"]
    assert head["ResponseMetadata"]["HTTPStatusCode"] == 206
    with pytest.raises(ClientError) as error:
        s3.head_object(Bucket=bucket, Key="x", Range="bytes=10-")
    assert code_of(error) == "416"


def test_key_that_cannot_be_deleted_fails_alone(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="x", Body=b"")
    bad = ["a//b", "y" * 300]
    answer = s3.delete_objects(
        Bucket=bucket, Delete={"Objects": [{"Key": key} for key in ["x", *bad]]}
    )
    assert [item["Key"] for item in answer["Deleted"]] == ["x"]
    assert [(item["Key"], item["Code"]) for item in answer["Errors"]] == [
        (bad[0], "InvalidArgument"),
        (bad[1], "KeyTooLongError"),
    ]
    answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": bad[0]}], "Quiet": True})
    assert len(answer["Errors"]) == 1
    assert keys(s3, bucket) == []


def test_wrong_checksum_is_named(s3: Any, bucket: str) -> None:
    with pytest.raises(ClientError, match="The SHA256 you specified did not match") as error:
        s3.put_object(Bucket=bucket, Key="x", Body=b"1", ChecksumSHA256="A" * 43 + "=")
    assert code_of(error) == "BadDigest"


def test_codes_are_those_of_s3(s3: Any, bucket: str) -> None:
    upload = s3.create_multipart_upload(Bucket=bucket, Key="x")["UploadId"]
    parts = {"Bucket": bucket, "Key": "x", "UploadId": upload}
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("get_bucket_encryption", {"Bucket": "never-made"}, "NoSuchBucket"),
        ("upload_part", {**parts, "PartNumber": 0, "Body": b"1"}, "InvalidArgument"),
        ("upload_part", {**parts, "PartNumber": 10_001, "Body": b"1"}, "InvalidArgument"),
        ("complete_multipart_upload", {**parts, "MultipartUpload": {"Parts": []}}, "MalformedXML"),
        ("put_object", {"Bucket": bucket, "Key": "none", "IfMatch": '"a"'}, "NoSuchKey"),
    ]
    for operation, parameters, code in wrong:
        with pytest.raises(ClientError) as error:
            getattr(s3, operation)(**parameters)
        assert code_of(error) == code, operation
    s3.put_object(Bucket=bucket, Key="there", Body=b"")
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="there", IfMatch='"a"')
    assert code_of(error) == "PreconditionFailed"


def test_answers_tell_how_many_tags_there_are_and_not_which(place: Gateway, bucket: str) -> None:
    place.client().put_object(Bucket=bucket, Key="x", Body=b"", Tagging="a=b")
    headers = send(place, "GET", f"/{bucket}/x").headers
    found = [name for name in headers if name.startswith("x-amz-tagging")]
    assert found == ["x-amz-tagging-count"]


# --- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["s3v4", "s3"])
def test_presigned_urls_work_until_they_are_changed(
    place: Gateway, bucket: str, version: str
) -> None:
    s3 = place.client(signature_version=version)
    params = {"Bucket": bucket, "Key": "a b+ü"}
    put = s3.generate_presigned_url("put_object", Params=params)
    assert fetch(put, "PUT", b"zz").status == 200
    get = s3.generate_presigned_url("get_object", Params=params)
    assert fetch(get).body == b"zz"
    head = s3.generate_presigned_url("head_object", Params=params)
    assert fetch(head, "HEAD").headers["content-length"] == "2"
    for changed, method in (
        (get.replace("a%20b", "a%20c"), "GET"),
        (get, "DELETE"),
        (get + "&versionId=1", "GET"),
        (get + "&tagging=", "GET"),
    ):
        assert fetch(changed, method).status == 403
    assert fetch(s3.generate_presigned_url("delete_object", Params=params), "DELETE").status == 204
    assert keys(place.client(), bucket) == []


def test_presigned_url_cannot_be_bent_into_a_copy(place: Gateway, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="secret", Body=b"secret")
    for version in ("s3v4", "s3"):
        url = place.client(signature_version=version).generate_presigned_url(
            "put_object", Params={"Bucket": bucket, "Key": "mine"}
        )
        assert fetch(url, "PUT", x_amz_copy_source=f"/{bucket}/secret").status == 403
    assert keys(s3, bucket) == ["secret"]


def test_presigned_url_expires(place: Gateway, bucket: str) -> None:
    s3 = place.client(signature_version="s3v4")
    params = {"Bucket": bucket, "Key": "x"}
    url = s3.generate_presigned_url("get_object", Params=params, ExpiresIn=1)
    wait_until(lambda: fetch(url).status == 403)
    assert b"Request has expired" in fetch(url).body


def test_wrong_secret_and_unknown_and_disabled_keys_are_refused(
    place: Gateway, bucket: str
) -> None:
    owner = place.owner
    wrong = Credentials(owner.account, owner.user, owner.access_key_id, "x" * 40)
    with pytest.raises(ClientError) as error:
        place.client(wrong).list_buckets()
    assert code_of(error) == "SignatureDoesNotMatch"
    unknown = Credentials(owner.account, owner.user, "AKIAAAAAAAAAAAAAAAAA", "x" * 40)
    with pytest.raises(ClientError) as error:
        place.client(unknown).list_buckets()
    assert code_of(error) == "InvalidAccessKeyId"
    user = place.user(allow("s3:*", "*"))
    place.client(user).list_buckets()
    with transaction(place.engine) as connection:
        accounts.disable_access_key(connection, user.access_key_id)
    with pytest.raises(ClientError) as error:
        place.client(user).list_buckets()
    assert code_of(error) == "InvalidAccessKeyId"


def test_anonymous_request_is_refused(place: Gateway, bucket: str) -> None:
    for path in ("/", f"/{bucket}", f"/{bucket}/x"):
        reply = fetch(place.url + path)
        assert (reply.status, reply.code) == (403, "AccessDenied")


def test_old_request_cannot_be_replayed(place: Gateway, bucket: str) -> None:
    late = datetime.now(UTC) - timedelta(minutes=16)
    reply = send(place, "GET", f"/{bucket}", now=late)
    assert (reply.status, reply.code) == (403, "RequestTimeTooSkewed")


def test_header_that_was_not_signed_is_refused(place: Gateway, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="secret", Body=b"secret")
    reply = send(
        place,
        "PUT",
        f"/{bucket}/mine",
        unsigned_headers={"x-amz-copy-source": f"/{bucket}/secret"},
    )
    assert (reply.status, reply.code) == (403, "AccessDenied")


def test_session_token_is_refused(place: Gateway) -> None:
    reply = send(place, "GET", "/", headers={"x-amz-security-token": "t"})
    assert (reply.status, reply.code) == (400, "InvalidToken")


def test_wrong_region_names_the_right_one(place: Gateway) -> None:
    s3 = place.client()
    s3.meta.events.register("before-sign.s3", _sign_for_another_region)
    with pytest.raises(ClientError) as error:
        s3.list_buckets()
    assert code_of(error) == "AuthorizationHeaderMalformed"
    assert error.value.response["Error"]["Region"] == "us-east-1"


def _sign_for_another_region(request: Any, **kwargs: Any) -> None:
    request.context.setdefault("signing", {})["region"] = "eu-west-1"


# --- bodies ---------------------------------------------------------------------------------------

SIZES = [0, 1, 65_536, 65_537, 3_000_000]


@pytest.mark.parametrize("size", SIZES)
def test_body_that_is_not_what_was_signed_leaves_no_object(
    place: Gateway, s3: Any, bucket: str, size: int
) -> None:
    data = os.urandom(size)
    other = hashlib.sha256(data + b"x").hexdigest()
    reply = send(place, "PUT", f"/{bucket}/x", body=data, payload_hash=other)
    assert (reply.status, reply.code) == (400, "XAmzContentSHA256Mismatch")
    assert keys(s3, bucket) == []
    assert send(place, "PUT", f"/{bucket}/x", body=data).status == 200
    assert s3.get_object(Bucket=bucket, Key="x")["Body"].read() == data


def test_bad_body_leaves_the_object_that_was_there(place: Gateway, s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="x", Body=b"first")
    for body in (b"other", b"o" * 1_000_000):
        reply = send(place, "PUT", f"/{bucket}/x", body=body, payload_hash="0" * 64)
        assert reply.status == 400
    assert s3.get_object(Bucket=bucket, Key="x")["Body"].read() == b"first"


def test_unsigned_payload_is_taken(place: Gateway, bucket: str) -> None:
    s3 = place.client(s3={"payload_signing_enabled": False})
    s3.put_object(Bucket=bucket, Key="u", Body=b"1")
    reply = send(place, "PUT", f"/{bucket}/v", body=b"2", payload_hash="UNSIGNED-PAYLOAD")
    assert reply.status == 200
    assert keys(s3, bucket) == ["u", "v"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_trailer", [False, True])
def test_signed_chunks_are_taken(
    place: Gateway, s3: Any, bucket: str, size: int, with_trailer: bool
) -> None:
    data = os.urandom(size)
    pieces = [data[start : start + 65_536] for start in range(0, size, 65_536)]
    trailer = ("x-amz-checksum-crc32", crc32(data)) if with_trailer else None
    reply = send_chunks(
        place,
        f"/{bucket}/x",
        pieces,
        trailer=trailer,
        headers={"content-encoding": "aws-chunked,gzip"},
    )
    assert reply.status == 200
    found = s3.get_object(Bucket=bucket, Key="x")
    assert (found["Body"].read(), found["ContentEncoding"]) == (data, "gzip")


@pytest.mark.parametrize("tamper", ["data", "last", "trailer"])
@pytest.mark.parametrize("size", [1, 65_536, 300_000])
def test_changed_chunk_leaves_no_object(
    place: Gateway, s3: Any, bucket: str, tamper: str, size: int
) -> None:
    data = os.urandom(size)
    pieces = [data[start : start + 65_536] for start in range(0, size, 65_536)]
    trailers = [("x-amz-checksum-crc32", crc32(data))]
    for trailer in trailers if tamper == "trailer" else [None, *trailers]:
        reply = send_chunks(place, f"/{bucket}/x", pieces, trailer=trailer, tamper=tamper)
        assert (reply.status, reply.code) == (403, "SignatureDoesNotMatch")
        assert keys(s3, bucket) == []


def test_empty_upload_with_a_changed_chunk_leaves_no_object(
    place: Gateway, s3: Any, bucket: str
) -> None:
    reply = send_chunks(place, f"/{bucket}/x", [], tamper="last")
    assert (reply.status, reply.code) == (403, "SignatureDoesNotMatch")
    assert keys(s3, bucket) == []


@pytest.mark.parametrize("size", SIZES)
def test_unsigned_chunks_are_taken(place: Gateway, s3: Any, bucket: str, size: int) -> None:
    data = os.urandom(size)
    reply = send_unsigned_chunks(place, f"/{bucket}/x", data, crc32(data))
    assert reply.status == 200
    found = s3.get_object(Bucket=bucket, Key="x")
    assert found["Body"].read() == data
    assert "ContentEncoding" not in found


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_wrong_checksum_in_a_trailer_leaves_no_object(
    place: Gateway, s3: Any, bucket: str, size: int
) -> None:
    data = os.urandom(size)
    wrong = crc32(data + b"x")
    path = f"/{bucket}/x"
    for reply in (
        send_unsigned_chunks(place, path, data, wrong),
        send_unsigned_chunks(place, path, data, "AAAAAAAAAAA=", name="x-amz-checksum-crc64nvme")
        if size
        else send_unsigned_chunks(place, path, data, wrong),
        send_chunks(place, path, [data] if data else [], trailer=("x-amz-checksum-crc32", wrong)),
    ):
        assert (reply.status, reply.code) == (400, "BadDigest")
        assert keys(s3, bucket) == []


def test_wrong_checksum_or_md5_in_a_header_leaves_no_object(
    place: Gateway, s3: Any, bucket: str
) -> None:
    for name, value in (
        ("x-amz-checksum-crc32", "AAAAAA=="),
        ("x-amz-checksum-sha256", "A" * 43 + "="),
        ("content-md5", "A" * 22 + "=="),
    ):
        reply = send(place, "PUT", f"/{bucket}/x", body=b"abc", headers={name: value})
        assert (reply.status, reply.code) == (400, "BadDigest")
    assert keys(s3, bucket) == []


def test_declared_length_must_be_true(place: Gateway, s3: Any, bucket: str) -> None:
    for length in (1, 9):
        reply = send_chunks(place, f"/{bucket}/x", [b"12345"], decoded_length=length)
        assert (reply.status, reply.code) == (400, "IncompleteBody")
    reply = send(
        place,
        "PUT",
        f"/{bucket}/x",
        payload_hash="UNSIGNED-PAYLOAD",
        headers={"transfer-encoding": "chunked"},
        body=b"0\r\n\r\n",
    )
    assert (reply.status, reply.code) == (411, "MissingContentLength")
    assert keys(s3, bucket) == []


@pytest.mark.parametrize("close_after", [0, 100_000])
def test_client_that_goes_away_leaves_no_object(
    place: Gateway, s3: Any, bucket: str, close_after: int
) -> None:
    send(
        place,
        "PUT",
        f"/{bucket}/x",
        body=bytes(1_000_000),
        payload_hash="UNSIGNED-PAYLOAD",
        close_after=close_after,
    )
    s3.put_object(Bucket=bucket, Key="later", Body=b"")
    assert keys(s3, bucket) == ["later"]


# --- policies -------------------------------------------------------------------------------------


def allow(actions: str | list[str], resources: str | list[str], effect: str = "Allow") -> str:
    statement = {"Effect": effect, "Action": actions, "Resource": resources}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def test_user_without_a_policy_may_nothing(place: Gateway, bucket: str) -> None:
    s3 = place.client(place.user())
    with pytest.raises(ClientError) as error:
        s3.list_objects_v2(Bucket=bucket)
    assert code_of(error) == "AccessDenied"
    message = error.value.response["Error"]["Message"]
    assert f"is not authorized to perform: s3:ListBucket on resource: arn:aws:s3:::{bucket}" in (
        message
    )


def test_user_may_what_the_policy_allows_and_no_more(place: Gateway, s3: Any, bucket: str) -> None:
    arn = f"arn:aws:s3:::{bucket}"
    user = place.client(
        place.user(
            allow(["s3:GetObject", "s3:PutObject"], f"{arn}/pub/*"),
            allow("s3:ListBucket", arn),
            allow("s3:*", f"{arn}/pub/secret*", effect="Deny"),
        )
    )
    s3.put_object(Bucket=bucket, Key="private", Body=b"p")
    s3.put_object(Bucket=bucket, Key="pub/secret", Body=b"p")
    user.put_object(Bucket=bucket, Key="pub/x", Body=b"1")
    assert user.get_object(Bucket=bucket, Key="pub/x")["Body"].read() == b"1"
    assert user.head_object(Bucket=bucket, Key="pub/x")["ContentLength"] == 1
    user.list_objects_v2(Bucket=bucket)
    refused: list[tuple[str, dict[str, Any]]] = [
        ("get_object", {"Key": "private"}),
        ("head_object", {"Key": "private"}),
        ("get_object", {"Key": "pub/secret"}),
        ("put_object", {"Key": "private", "Body": b"x"}),
        ("put_object", {"Key": "pub/x", "Body": b"x", "Tagging": "a=b"}),
        ("delete_object", {"Key": "pub/x"}),
        ("create_multipart_upload", {"Key": "private"}),
        ("copy_object", {"Key": "pub/c", "CopySource": {"Bucket": bucket, "Key": "private"}}),
        ("copy_object", {"Key": "private", "CopySource": {"Bucket": bucket, "Key": "pub/x"}}),
        ("get_object_tagging", {"Key": "pub/x"}),
        ("get_object", {"Key": "pub/x", "VersionId": "null"}),
        ("delete_objects", {"Delete": {"Objects": [{"Key": "pub/x"}]}}),
        ("get_bucket_versioning", {}),
        ("delete_bucket", {}),
    ]
    for operation, parameters in refused:
        with pytest.raises(ClientError) as error:
            getattr(user, operation)(Bucket=bucket, **parameters)
        assert code_of(error) in ("AccessDenied", "403"), operation
    with pytest.raises(ClientError) as error:
        user.list_buckets()
    assert code_of(error) == "AccessDenied"
    assert keys(s3, bucket) == ["private", "pub/secret", "pub/x"]


def test_one_forbidden_key_keeps_all_of_a_request_to_delete(
    place: Gateway, s3: Any, bucket: str
) -> None:
    for key in ("a", "b"):
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    user = place.client(place.user(allow("s3:DeleteObject", f"arn:aws:s3:::{bucket}/a")))
    with pytest.raises(ClientError) as error:
        user.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "a"}, {"Key": "b"}]})
    assert code_of(error) == "AccessDenied"
    assert keys(s3, bucket) == ["a", "b"]


def test_bucket_of_another_owner_is_refused(s3: Any, bucket: str) -> None:
    s3.head_bucket(Bucket=bucket, ExpectedBucketOwner="123456789012")
    with pytest.raises(ClientError) as error:
        s3.list_objects_v2(Bucket=bucket, ExpectedBucketOwner="210987654321")
    assert code_of(error) == "AccessDenied"


def test_what_would_be_kept_without_being_obeyed_is_refused(
    place: Gateway, s3: Any, bucket: str
) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("put_bucket_policy", {"Policy": "{}"}, "NotImplemented"),
        ("put_bucket_acl", {"ACL": "public-read"}, "AccessControlListNotSupported"),
        ("put_object", {"Key": "x", "ACL": "public-read"}, "AccessControlListNotSupported"),
        ("put_object", {"Key": "x", "ServerSideEncryption": "aws:kms"}, "NotImplemented"),
        ("put_object", {"Key": "x", "ObjectLockLegalHoldStatus": "ON"}, "NotImplemented"),
        (
            "put_bucket_encryption",
            {
                "ServerSideEncryptionConfiguration": {
                    "Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}]
                }
            },
            "NotImplemented",
        ),
        (
            "put_bucket_website",
            {"WebsiteConfiguration": {"IndexDocument": {"Suffix": "i"}}},
            "NotImplemented",
        ),
    ]
    for operation, parameters, code in refused:
        with pytest.raises(ClientError) as error:
            getattr(s3, operation)(Bucket=bucket, **parameters)
        assert code_of(error) == code, operation
    reply = send(place, "DELETE", f"/{bucket}", query="no-such-subresource=")
    assert (reply.status, reply.code) == (501, "NotImplemented")
    s3.head_bucket(Bucket=bucket)


# --- the object store goes away -------------------------------------------------------------------


def test_requests_fail_politely_without_the_store_and_go_on_when_it_is_back(
    tmp_path: Path,
) -> None:
    with gateway(tmp_path / "data") as place:
        s3, bucket = place.client(), place.bucket()
        s3.put_object(Bucket=bucket, Key="x", Body=b"1")
        place.store.stop_all(10)
        for key in ("x", "y"):
            reply = send(place, "GET", f"/{bucket}/{key}")
            assert (reply.status, reply.code) == (503, "ServiceUnavailable")
        reply = send(place, "PUT", f"/{bucket}/x", body=bytes(200_000))
        assert (reply.status, reply.code) == (503, "ServiceUnavailable")
        with embedded.running(place.settings):  # on other ports
            assert s3.get_object(Bucket=bucket, Key="x")["Body"].read() == b"1"
            assert send(place, "PUT", f"/{bucket}/x", body=bytes(200_000)).status == 200


def test_throughput_is_printed(
    s3: Any, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = os.urandom(1 << 20) * 32
    started = time.perf_counter()
    s3.upload_fileobj(io.BytesIO(data), bucket, "big")
    put = time.perf_counter()
    s3.download_file(bucket, "big", str(tmp_path / "big"))
    got = time.perf_counter()
    for number in range(40):
        s3.put_object(Bucket=bucket, Key=f"k{number}", Body=b"a" * 1024)
    small = time.perf_counter()
    for number in range(40):
        s3.get_object(Bucket=bucket, Key=f"k{number}")["Body"].read()
    done = time.perf_counter()
    with capsys.disabled():
        print(  # noqa: T201 - a measurement, printed and not asserted
            f"\n32 MiB put {32 / (put - started):.0f} MiB/s, get {32 / (got - put):.0f} MiB/s; "
            f"1 KiB put {25 * (small - got):.1f} ms, get {25 * (done - small):.1f} ms"
        )
    assert (tmp_path / "big").read_bytes() == data
