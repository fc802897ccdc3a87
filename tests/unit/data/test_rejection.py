"""Why data are rejected: Bedrock's words first, then lines, and never more than a row can hold."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.data.made_check import TRAIN, VALIDATION, check, clean_check, defect

from outcrop.data.defects import Severity
from outcrop.data.rejection import MAX_CHARACTERS, rejection
from outcrop.errors import DataError

PAIRS = ("prompt-completion",)
FORM = '{"prompt": "<input text>", "completion": "<output text>"}'


def refused(*defects: Any, total: int | None = None, report: str = "") -> DataError:
    counts: dict[str, dict[Severity, int]] = {}
    for found in defects:
        counts.setdefault(found.code, {}).setdefault(found.severity, 0)
        counts[found.code][found.severity] += 1
    if total is not None:
        counts[defects[0].code][Severity.REJECT] = total
    error = rejection(check(defects=defects, counts=counts), PAIRS, report=report)
    assert error is not None
    return error


def reject(code: str, line: int | None, message: str = "It is wrong.", **fields: Any) -> Any:
    return defect(code, Severity.REJECT, line, message, **fields)


@pytest.mark.parametrize(
    ("code", "line", "message", "value", "opening"),
    [
        (
            *("invalid_json", 3, "It is cut off.", ""),
            f"Unable to parse Amazon S3 file: {TRAIN}. Data files must conform to JSONL format. "
            "Line 3: It is cut off.",
        ),
        (
            *("empty_file", None, "The file holds no record.", ""),
            f"Unable to parse Amazon S3 file: {TRAIN}. Data files must conform to JSONL format. "
            "The file holds no record.",
        ),
        (
            *("missing_completion", 7, "It has no completion.", ""),
            f"Input data at {TRAIN} must follow '{FORM}' format. Line 7: It has no completion.",
        ),
        (
            *("too_long", 2, "Maximum input token count 4097 exceeds limit of 4096.", ""),
            f"Maximum input token count 4097 exceeds limit of 4096. ({TRAIN}, line 2)",
        ),
        (
            *("too_long", 2, "It is longer than 8,388,608 bytes.", "'abc'..."),
            f"Input size exceeded in file {TRAIN} for record starting with 'abc'.... "
            "Line 2: It is longer than 8,388,608 bytes.",
        ),
    ],
)
def test_the_message_begins_as_bedrocks_does(
    code: str, line: int | None, message: str, value: str, opening: str
) -> None:
    error = refused(reject(code, line, message, value=value))
    assert error.message.startswith(opening)
    assert (error.code, error.file, error.line) == (code, TRAIN, line)


def test_further_defects_are_named_with_their_lines_and_files() -> None:
    error = refused(
        reject("wrong_type", 3, "A."),
        reject("wrong_type", 8, "B."),
        reject("invalid_json", 2, "C.", file=VALIDATION),
        report="s3://out/report.html",
    )
    assert error.message.endswith(
        f"Line 3: A. Line 8: B. {VALIDATION}: Line 2: C. In all 3 defects reject the data "
        "(wrong_type 2, invalid_json 1). The report: s3://out/report.html"
    )


def test_only_what_rejects_is_a_reason() -> None:
    error = refused(defect("html", Severity.REPAIR, 1, "Tags."), reject("wrong_type", 4, "A."))
    assert "Tags." not in error.message
    assert error.line == 4
    assert rejection(clean_check(), PAIRS) is None


def test_the_message_fits_into_the_row_and_keeps_its_end() -> None:
    long = [reject("wrong_type", line, "x" * 300) for line in range(1, 101)]
    error = refused(*long, total=12345, report="s3://out/report.html")
    assert len(error.message) <= MAX_CHARACTERS
    assert error.message.endswith(
        "In all 12,345 defects reject the data (wrong_type 12,345). The report: s3://out/report.html"
    )
    assert "Line 1: " in error.message
    assert "Line 2: " in error.message
