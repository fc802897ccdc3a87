"""Identifiers have the forms that botocore's model demands."""

from __future__ import annotations

import re
import uuid

import botocore.session
import pytest

from outcrop import ids

REGION, ACCOUNT, BASE = "us-east-1", "123456789012", "amazon.titan-text-express-v1:0:8k"


def _pattern(shape: str) -> str:
    model = botocore.session.get_session().get_service_model("bedrock")
    return str(model.shape_for(shape).metadata["pattern"])


@pytest.mark.parametrize(
    ("shape", "arn"),
    [
        (
            "ModelCustomizationJobArn",
            ids.customization_job_arn(REGION, ACCOUNT, BASE, "a1b2c3d4e5f6"),
        ),
        ("CustomModelArn", ids.custom_model_arn(REGION, ACCOUNT, BASE, "a1b2c3d4e5f6")),
        ("CustomModelArn", ids.created_model_arn(REGION, ACCOUNT, "a1b2c3d4e5f6")),
        ("ModelImportJobArn", ids.import_job_arn(REGION, ACCOUNT, "a1b2c3d4e5f6")),
        ("ImportedModelArn", ids.imported_model_arn(REGION, ACCOUNT, "a1b2c3d4e5f6")),
        ("ModelCopyJobArn", ids.copy_job_arn(REGION, ACCOUNT, "a1b2c3d4e5f6")),
        (
            "CustomModelArn",
            ids.custom_model_arn(REGION, ACCOUNT, ids.imported_key("abc123def456", 7), "a" * 12),
        ),
        ("ProvisionedModelArn", ids.provisioned_model_arn(REGION, ACCOUNT, "a1b2c3d4e5f6")),
        ("FoundationModelArn", ids.foundation_model_arn(REGION, BASE)),
        ("RoleArn", ids.role_arn(ACCOUNT, "BedrockCustomizationRole")),
    ],
)
def test_every_arn_we_make_matches_its_modelled_pattern(shape: str, arn: str) -> None:
    assert re.fullmatch(_pattern(shape), arn)


def test_keys_of_imported_weights_lead_to_their_folder_and_no_other_id_does() -> None:
    key = ids.imported_key("abc123def456", 7)
    assert ids.imported_path(key) == "models/imported/abc123def456/7"
    for other in (BASE, "imported.abc-1", "imported.abc123def456", f"{key}/..", "imported.unknown"):
        assert not ids.is_imported(other)


def test_arns_of_our_own_kinds_have_bedrocks_form() -> None:
    for make, kind in (
        (ids.batch_job_arn, "model-invocation-job"),
        (ids.model_export_arn, "model-export"),
        (ids.checkpoint_model_arn, "checkpoint-model"),
    ):
        arn = make(REGION, ACCOUNT, "a1b2c3d4e5f6")
        assert arn == f"arn:aws:bedrock:{REGION}:{ACCOUNT}:{kind}/a1b2c3d4e5f6"


def test_new_ids_are_twelve_lower_case_letters_and_digits_and_do_not_repeat() -> None:
    made = {ids.new_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch("[a-z0-9]{12}", item) for item in made)


def test_an_arn_that_is_taken_apart_and_put_together_is_the_same() -> None:
    arn = ids.customization_job_arn(REGION, ACCOUNT, BASE, "abcdefghijkl")
    parsed = ids.parse_arn(arn)
    assert parsed is not None
    assert parsed.resource_type == "model-customization-job"
    assert parsed.resource_id == f"{BASE}/abcdefghijkl"
    assert str(parsed) == arn


@pytest.mark.parametrize("text", ["", "name", "arn:aws:bedrock", "arn:aws:s3:::bucket"])
def test_what_is_no_arn_with_a_resource_type_is_none(text: str) -> None:
    assert ids.parse_arn(text) is None


@pytest.mark.parametrize(
    ("text", "bucket", "key"),
    [
        ("s3://my-bucket/a/b.jsonl", "my-bucket", "a/b.jsonl"),
        ("s3://my-bucket/", "my-bucket", ""),
        ("s3://my-bucket", "my-bucket", ""),
        ("s3://my.bucket/with space/ü", "my.bucket", "with space/ü"),
    ],
)
def test_an_s3_uri_is_taken_apart(text: str, bucket: str, key: str) -> None:
    assert ids.parse_s3_uri(text) == ids.S3Uri(bucket, key)


@pytest.mark.parametrize(
    "text", ["", "s3:/bucket/key", "https://bucket/key", "s3://B/key", "s3://ab"]
)
def test_what_is_no_s3_uri_is_none(text: str) -> None:
    assert ids.parse_s3_uri(text) is None


@pytest.mark.parametrize("prefix", ["out", "out/"])
def test_joining_puts_exactly_one_slash_between(prefix: str) -> None:
    assert str(ids.S3Uri("bucket", prefix).join("x.csv")) == "s3://bucket/out/x.csv"
    assert str(ids.S3Uri("bucket", "").join("x.csv")) == "s3://bucket/x.csv"


def test_request_ids_differ_and_are_uuids() -> None:
    first, second = ids.new_request_id(), ids.new_request_id()
    assert first != second
    assert str(uuid.UUID(first)) == first


def test_a_users_arn_has_awss_form() -> None:
    assert ids.user_arn(ACCOUNT, "owner") == f"arn:aws:iam::{ACCOUNT}:user/owner"
