"""Quotas: Bedrock's number, the operator's, and the real model's, each named in the refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outcrop.data.limits import (
    TokenCheck,
    check_record_count,
    check_total_records,
    record_quota,
)
from outcrop.errors import DataError
from outcrop.models.catalog import BaseModel, shipped_models

MODELS = {model.model_id: model for model in shipped_models()}
LIGHT = MODELS["cohere.command-light-text-v14"]
EXPRESS = MODELS["amazon.titan-text-express-v1"]
MISTRAL = MODELS["mistral.mistral-7b-instruct-v0:2"]


@pytest.mark.parametrize(
    ("base", "role", "setting", "quota"),
    [
        (LIGHT, "training", 0, 10_000),
        (LIGHT, "validation", 0, 1_000),
        (LIGHT, "validation", 5, 5),
        (EXPRESS, "validation", 0, 10_000),
        (EXPRESS, "training", 50_000, 50_000),
        (MISTRAL, "training", 0, None),
    ],
)
def test_the_operators_quota_replaces_the_familys(
    base: BaseModel, role: str, setting: int, quota: int | None
) -> None:
    assert record_quota(base, role, setting) == quota


def test_one_record_too_many_is_refused_with_the_setting_that_changes_it() -> None:
    check_record_count(LIGHT, "validation", 1_000, 0, "s3://b/v.jsonl")
    with pytest.raises(DataError, match=r"at most 1,000 validation records") as raised:
        check_record_count(LIGHT, "validation", 1_001, 0, "s3://b/v.jsonl")
    assert raised.value.code == "too_many_records"
    assert "max_validation_records" in str(raised.value)
    with pytest.raises(DataError, match="This server takes at most 5 training"):
        check_record_count(LIGHT, "training", 6, 5, "f")


def test_the_sum_of_both_files_has_a_quota_of_its_own() -> None:
    check_total_records(EXPRESS, 9_000, 1_000)
    check_total_records(LIGHT, 10_000, 1_000)
    with pytest.raises(DataError, match="at most 10,000 together"):
        check_total_records(EXPRESS, 9_000, 1_001)


def test_continued_pre_training_has_quotas_of_its_own() -> None:
    assert record_quota(EXPRESS, "training", 0, "CONTINUED_PRE_TRAINING") == 100_000
    check_record_count(EXPRESS, "training", 100_000, 0, "f", "CONTINUED_PRE_TRAINING")
    check_total_records(EXPRESS, 99_000, 1_000, "CONTINUED_PRE_TRAINING")
    with pytest.raises(DataError, match="at most 100,000 together"):
        check_total_records(EXPRESS, 99_000, 1_001, "CONTINUED_PRE_TRAINING")


def test_a_piece_of_a_document_has_the_lesser_of_the_total_limit_and_the_context() -> None:
    pieces = [TokenCheck(EXPRESS, size).longest_piece for size in (1, 2, 64)]
    assert pieces == [4096, 2048, 2048]
    assert TokenCheck(replace(EXPRESS, context_tokens=512), 1).longest_piece == 512
    assert TokenCheck(replace(EXPRESS, token_limits=()), 1).longest_piece == 8192


@pytest.mark.parametrize(
    ("base", "batch_size", "num_input", "num_output", "says"),
    [
        (LIGHT, 8, 4097, 1, "Maximum input token count 4097 exceeds limit of 4096. "),
        (LIGHT, 32, 1, 2049, "Maximum output token count 2049 exceeds limit of 2048. "),
        (EXPRESS, 1, 4000, 97, "token length 4097 exceeds total limit of 4096. "),
        (EXPRESS, 4, 2000, 49, "token length 2049 exceeds total limit of 2048. "),
        (EXPRESS, 64, 2000, 49, "token length 2049 exceeds total limit of 2048. "),
        (MISTRAL, 8, 8000, 193, "token length 8193 exceeds total limit of 8192. "),
    ],
)
def test_a_record_that_is_too_long_is_refused_with_both_limits(
    base: BaseModel, batch_size: int, num_input: int, num_output: int, says: str
) -> None:
    check = TokenCheck(base, batch_size)
    with pytest.raises(DataError) as raised:
        check.check(num_input, num_output, "s3://b/t.jsonl", 3)
    error = raised.value
    assert (error.code, error.file, error.line) == ("too_long", "s3://b/t.jsonl", 3)
    assert says in str(error)
    assert f"at batch size {batch_size}" in str(error)
    assert "the context of SmolLM2-135M-Instruct is 8,192 tokens" in str(error)


def test_a_record_at_the_limit_is_taken() -> None:
    TokenCheck(LIGHT, 8).check(4096, 2048, "f", 1)
    TokenCheck(EXPRESS, 1).check(4000, 96, "f", 1)


def test_a_real_model_with_a_short_context_limits_what_bedrock_would_take() -> None:
    small = replace(EXPRESS, context_tokens=512, full_name="Tiny")
    with pytest.raises(DataError, match="exceeds limit of 512") as raised:
        TokenCheck(small, 1).check(513, 10, "f", 1)
    assert "the context of Tiny is 512 tokens" in str(raised.value)
