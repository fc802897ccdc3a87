"""The embedded store behaves as S3 where clients of Outcrop rely on it, asked through botocore."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import urllib.error
import urllib.request
import zlib
from typing import TYPE_CHECKING, Any

import botocore.session
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

if TYPE_CHECKING:
    from tests.unit.objects.conftest import Running


@pytest.fixture(scope="module")
def s3(shared: Running) -> Any:
    return client(shared)


def client(running: Running, **options: Any) -> Any:
    backend = running.objects.backend
    config = Config(
        signature_version="s3v4",
        s3={"addressing_style": "path", **options},
        retries={"total_max_attempts": 1},
    )
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=backend.url,
        aws_access_key_id=backend.access_key_id,
        aws_secret_access_key=backend.secret_access_key,
        region_name=backend.region,
        config=config,
    )


def code_of(error: pytest.ExceptionInfo[ClientError]) -> str:
    return str(error.value.response["Error"]["Code"])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        content: bytes = answer.read()
    return content


def test_etag_is_the_md5(s3: Any, bucket: str) -> None:
    body = b'{"a": 1}\n' * 1000
    etag = s3.put_object(Bucket=bucket, Key="d/train.jsonl", Body=body)["ETag"]
    answer = s3.get_object(Bucket=bucket, Key="d/train.jsonl")

    assert etag.strip('"') == hashlib.md5(body).hexdigest()
    assert answer["Body"].read() == body
    assert answer["ETag"] == etag


def test_content_type_and_metadata_are_kept(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", ContentType="application/jsonl", Metadata={"a": "b"})
    answer = s3.head_object(Bucket=bucket, Key="k")

    assert answer["ContentType"] == "application/jsonl"
    assert answer["Metadata"] == {"a": "b"}


def test_range(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    answer = s3.get_object(Bucket=bucket, Key="k", Range="bytes=2-4")

    assert answer["Body"].read() == b"234"
    assert answer["ContentRange"] == "bytes 2-4/10"


def test_multipart(s3: Any, bucket: str) -> None:
    where = {"Bucket": bucket, "Key": "big"}
    blocks = [os.urandom(5 << 20), os.urandom(1000)]
    upload = s3.create_multipart_upload(**where)["UploadId"]
    parts = []
    for number, block in enumerate(blocks, 1):
        answer = s3.upload_part(**where, UploadId=upload, PartNumber=number, Body=block)
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    assert len(s3.list_parts(**where, UploadId=upload)["Parts"]) == 2
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(**where)
    s3.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})
    assert s3.get_object(**where)["Body"].read() == b"".join(blocks)


def test_listing_with_delimiter_and_pages(s3: Any, bucket: str) -> None:
    for number in range(5):
        s3.put_object(Bucket=bucket, Key=f"l/{number}", Body=b"")
    s3.put_object(Bucket=bucket, Key="top", Body=b"")

    pages = s3.get_paginator("list_objects_v2").paginate(
        Bucket=bucket, Prefix="l/", PaginationConfig={"PageSize": 2}
    )
    assert [[item["Key"] for item in page["Contents"]] for page in pages] == [
        ["l/0", "l/1"],
        ["l/2", "l/3"],
        ["l/4"],
    ]
    answer = s3.list_objects_v2(Bucket=bucket, Delimiter="/")
    assert answer["CommonPrefixes"] == [{"Prefix": "l/"}]
    assert [item["Key"] for item in answer["Contents"]] == ["top"]


def test_presigned_urls(s3: Any, bucket: str) -> None:
    where = {"Bucket": bucket, "Key": "a key+ü"}
    put = s3.generate_presigned_url("put_object", Params=where, ExpiresIn=60)
    urllib.request.urlopen(urllib.request.Request(put, data=b"zz", method="PUT")).close()
    url = s3.generate_presigned_url("get_object", Params=where, ExpiresIn=60)

    assert get(url) == b"zz"
    with pytest.raises(urllib.error.HTTPError, match="403") as raised:
        get(url.replace("X-Amz-Expires=60", "X-Amz-Expires=600"))
    raised.value.close()


def test_unsigned_payload(shared: Running, bucket: str) -> None:
    unsigned = client(shared, payload_signing_enabled=False)
    unsigned.put_object(Bucket=bucket, Key="u", Body=io.BytesIO(b"1" * 100_000))

    assert unsigned.head_object(Bucket=bucket, Key="u")["ContentLength"] == 100_000


def test_copy(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="a", Body=b"1")
    s3.copy_object(Bucket=bucket, Key="b", CopySource={"Bucket": bucket, "Key": "a"})

    assert s3.get_object(Bucket=bucket, Key="b")["Body"].read() == b"1"


def test_checksums_are_kept_and_checked(s3: Any, bucket: str) -> None:
    sha256 = base64.b64encode(hashlib.sha256(b"abc").digest()).decode()
    crc32 = base64.b64encode(zlib.crc32(b"abc").to_bytes(4, "big")).decode()
    first = s3.put_object(Bucket=bucket, Key="k", Body=b"abc", ChecksumAlgorithm="SHA256")
    second = s3.put_object(Bucket=bucket, Key="k", Body=b"abc", ChecksumAlgorithm="CRC32")

    assert first["ChecksumSHA256"] == sha256
    assert second["ChecksumCRC32"] == crc32
    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="wrong", Body=b"abd", ChecksumSHA256=sha256)
    assert code_of(error) in ("BadDigest", "XAmzContentChecksumMismatch")
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket, Prefix="wrong")


def test_conditions(s3: Any, bucket: str) -> None:
    etag = s3.put_object(Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")["ETag"]

    with pytest.raises(ClientError) as error:
        s3.put_object(Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*")
    assert code_of(error) == "PreconditionFailed"
    assert s3.get_object(Bucket=bucket, Key="k", IfMatch=etag)["Body"].read() == b"1"
    s3.put_object(Bucket=bucket, Key="k", Body=b"2")
    with pytest.raises(ClientError) as error:
        s3.get_object(Bucket=bucket, Key="k", IfMatch=etag)
    assert code_of(error) == "PreconditionFailed"


def test_encryption_with_the_stores_key(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"secret", ServerSideEncryption="AES256")
    answer = s3.get_object(Bucket=bucket, Key="k")

    assert answer["ServerSideEncryption"] == "AES256"
    assert answer["Body"].read() == b"secret"


def test_encryption_as_a_buckets_default(s3: Any, bucket: str) -> None:
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    s3.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration={"Rules": [rule]})
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")

    assert s3.head_object(Bucket=bucket, Key="k")["ServerSideEncryption"] == "AES256"


def test_encryption_with_the_callers_key(s3: Any, bucket: str) -> None:
    key = os.urandom(32)
    arguments = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
    s3.put_object(Bucket=bucket, Key="k", Body=b"q", **arguments)

    assert s3.get_object(Bucket=bucket, Key="k", **arguments)["Body"].read() == b"q"
    with pytest.raises(ClientError):
        s3.get_object(Bucket=bucket, Key="k")


def test_encryption_with_kms_is_refused_and_not_lost(s3: Any, bucket: str) -> None:
    """It could keep such keys in memory only, and the objects would not survive a restart."""
    with pytest.raises(ClientError):
        s3.put_object(Bucket=bucket, Key="k", Body=b"1", ServerSideEncryption="aws:kms")

    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)


def test_bucket_policy(s3: Any, bucket: str, shared: Running) -> None:
    statement = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": "s3:GetObject",
        "Resource": f"arn:aws:s3:::{bucket}/pub/*",
    }
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    s3.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    s3.put_object(Bucket=bucket, Key="pub/x", Body=b"p")
    s3.put_object(Bucket=bucket, Key="private", Body=b"q")
    url = shared.objects.backend.url

    assert get(f"{url}/{bucket}/pub/x") == b"p"
    with pytest.raises(urllib.error.HTTPError, match="403") as raised:
        get(f"{url}/{bucket}/private")
    raised.value.close()
    assert json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]


def test_versions(s3: Any, bucket: str) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    first = s3.put_object(Bucket=bucket, Key="v", Body=b"1")["VersionId"]
    second = s3.put_object(Bucket=bucket, Key="v", Body=b"2")["VersionId"]

    assert first != second
    assert s3.get_object(Bucket=bucket, Key="v", VersionId=first)["Body"].read() == b"1"
    assert s3.get_object(Bucket=bucket, Key="v")["Body"].read() == b"2"


def test_tags_do_not_touch_the_object(s3: Any, bucket: str) -> None:
    tags = [{"Key": "team", "Value": "a"}]
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    s3.put_object_tagging(Bucket=bucket, Key="k", Tagging={"TagSet": tags})

    assert s3.get_object_tagging(Bucket=bucket, Key="k")["TagSet"] == tags
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"1"


def test_lifecycle(s3: Any, bucket: str) -> None:
    rule = {
        "ID": "tidy",
        "Status": "Enabled",
        "Filter": {"Prefix": "tmp/"},
        "Expiration": {"Days": 1},
    }
    s3.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})

    (found,) = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert found["Expiration"] == {"Days": 1}


def test_errors_have_the_codes_of_s3(s3: Any, bucket: str) -> None:
    s3.put_object(Bucket=bucket, Key="k", Body=b"1")
    for call, arguments, code in (
        ("get_object", {"Bucket": bucket, "Key": "nothing"}, "NoSuchKey"),
        ("get_object", {"Bucket": "no-such-bucket", "Key": "k"}, "NoSuchBucket"),
        ("list_objects_v2", {"Bucket": "no-such-bucket"}, "NoSuchBucket"),
        ("put_object", {"Bucket": "no-such-bucket", "Key": "k"}, "NoSuchBucket"),
        ("create_bucket", {"Bucket": bucket}, "BucketAlreadyOwnedByYou"),
        ("delete_bucket", {"Bucket": bucket}, "BucketNotEmpty"),
    ):
        with pytest.raises(ClientError) as error:
            getattr(s3, call)(**arguments)
        assert code_of(error) == code, call


def test_delete_many_then_the_bucket(s3: Any, bucket: str) -> None:
    keys = [{"Key": f"k{number}"} for number in range(12)]
    for key in keys:
        s3.put_object(Bucket=bucket, **key, Body=b"")

    assert len(s3.delete_objects(Bucket=bucket, Delete={"Objects": keys})["Deleted"]) == 12
    s3.delete_bucket(Bucket=bucket)
    with pytest.raises(ClientError):
        s3.head_bucket(Bucket=bucket)


def test_strangers_list_nothing(shared: Running, bucket: str) -> None:
    for path in ("/", f"/{bucket}"):
        with pytest.raises(urllib.error.HTTPError, match="403") as raised:
            get(shared.objects.backend.url + path)
        raised.value.close()
