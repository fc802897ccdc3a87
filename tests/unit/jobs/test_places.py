"""Places: what is missing is the owner's mistake, and a store that is away is not."""

from __future__ import annotations

import pytest
from tests.unit.jobs.memory_store import BUCKET, MemoryStore

from outcrop.errors import ObjectStoreError, ValidationException
from outcrop.ids import S3Uri
from outcrop.jobs.places import (
    TRAINING,
    VALIDATION,
    check_bucket,
    check_present,
    file_place,
    output_place,
)
from outcrop.objects.client import IS_AWAY


@pytest.fixture
def objects() -> MemoryStore:
    return MemoryStore(**{"train.jsonl": b"{}", "folder/train.jsonl": b"{}"})


def test_object_that_is_there_passes(objects: MemoryStore) -> None:
    check_present(objects, S3Uri(BUCKET, "train.jsonl"), TRAINING)
    check_bucket(objects, S3Uri(BUCKET, "output"))


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (S3Uri("nowhere", "train.jsonl"), "The bucket does not exist"),
        (S3Uri(BUCKET, "other.jsonl"), "There is no object with this key"),
        (S3Uri(BUCKET, "folder"), "Uri should be a file, not a directory"),
    ],
)
def test_missing_bucket_missing_key_and_folder_are_told_apart(
    objects: MemoryStore, uri: S3Uri, says: str
) -> None:
    with pytest.raises(ValidationException, match=says):
        check_present(objects, uri, TRAINING)


def test_store_that_is_away_says_nothing_about_the_object(objects: MemoryStore) -> None:
    objects.go_away()
    with pytest.raises(ObjectStoreError) as raised:
        check_present(objects, S3Uri(BUCKET, "train.jsonl"), TRAINING)
    assert raised.value.code == IS_AWAY


def test_store_that_refuses_is_quoted(objects: MemoryStore) -> None:
    objects.refusal = "AccessDenied"
    with pytest.raises(ValidationException, match=r"at key train\.jsonl\. AccessDenied: the store"):
        check_present(objects, S3Uri(BUCKET, "train.jsonl"), TRAINING)
    with pytest.raises(
        ValidationException, match=rf"S3 bucket: {BUCKET}\. AccessDenied: the store"
    ):
        check_bucket(objects, S3Uri(BUCKET, "output"))


def test_bucket_that_is_missing_is_refused(objects: MemoryStore) -> None:
    with pytest.raises(ValidationException, match=r"nowhere\. The bucket does not exist"):
        check_bucket(objects, S3Uri("nowhere", "output"))


@pytest.mark.parametrize("text", ["s3://bucket", "s3://bucket/folder/"])
def test_folder_where_a_file_is_wanted_is_refused_by_its_form(text: str) -> None:
    with pytest.raises(ValidationException, match="Invalid validation input data configuration"):
        file_place(VALIDATION, text)


def test_text_that_is_no_uri_is_refused_with_the_member() -> None:
    with pytest.raises(ValidationException, match=r"trainingDataConfig\.s3Uri is 'http://x/y'"):
        file_place(TRAINING, "http://x/y")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("s3://bucket/.uploads/x", r"below \.uploads/"),
        ("s3://bucket/x.versions", r"ends in \.versions"),
        ("s3://bucket/a/../b", r"a part \. or \.\."),
        ("s3://bucket/" + "x" * 256, "255 bytes"),
        ("s3://bucket/" + "folder/" * 130, "too long"),
    ],
)
def test_an_output_whose_files_could_not_be_read_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValidationException, match=rf"outputDataConfig\.s3Uri leads to .*{reason}"):
        output_place("outputDataConfig.s3Uri", text)


@pytest.mark.parametrize(
    "text", ["s3://bucket", "s3://bucket/", "s3://bucket/a/b", "s3://bucket/a/"]
)
def test_an_output_may_be_a_bucket_or_a_folder_in_it(text: str) -> None:
    assert output_place("outputDataConfig.s3Uri", text).bucket == "bucket"


def test_a_file_whose_key_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationException, match=r"trainingDataConfig\.s3Uri leads to"):
        file_place(TRAINING, "s3://bucket/a//b.jsonl")
