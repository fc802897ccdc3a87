"""A check that nobody made: every field filled, with hostile texts where data stand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from outcrop.data.check import (
    Check,
    FileFacts,
    Histogram,
    LabelStatistics,
    Lengths,
    TokenStatistics,
)
from outcrop.data.defects import Defect, Place, Severity

TRAIN, VALIDATION = "s3://bucket/train.jsonl", "s3://bucket/validation.jsonl"
SCRIPT = "<script>alert('x')</script>"


def lengths(*counts: int, width: int = 16) -> Lengths:
    """Lengths of as many records as the bins say, each bin `width` wide."""
    edges = tuple(width * place for place in range(len(counts) + 1))
    total = sum(count * (low + width // 2) for count, low in zip(counts, edges, strict=False))
    return Lengths(total, 1, edges[1], edges[-2], edges[-1], Histogram(edges, counts))


def facts(name: str, role: str, **fields: Any) -> FileFacts:
    """What a file of 12 records is, one of which cannot be used."""
    values: dict[str, Any] = {
        "digest": "ab" * 32,
        "num_bytes": 4096,
        "num_lines": 13,
        "num_records": 12,
        "num_usable": 11,
        "format": "prompt-completion",
        "formats": {"prompt-completion": 11, "": 1},
        "num_characters": 900,
        **fields,
    }
    return FileFacts(name=name, role=role, **values)


def defect(
    code: str,
    severity: Severity,
    line: int | None,
    message: str = "It is wrong.",
    value: str = "",
    file: str = TRAIN,
    twin: Place | None = None,
) -> Defect:
    """A defect of the training file."""
    return Defect(code, severity, Place(file, line), message, value, twin)


def check(**fields: Any) -> Check:
    """A check whose training file has one record that cannot be used and some worth a look."""
    values: dict[str, Any] = {
        "base_model_id": "amazon.titan-text-lite-v1",
        "customization_type": "FINE_TUNING",
        "batch_size": 8,
        "files": (facts(TRAIN, "training"), facts(VALIDATION, "validation")),
        "defects": (
            defect("no_validation", Severity.ADVICE, None),
            defect("wrong_type", Severity.REJECT, 3, "prompt must be a string, not a number."),
            defect("html", Severity.REPAIR, 5, "It holds tags.", SCRIPT),
            defect("near_duplicate", Severity.DROP, 9, twin=Place(TRAIN, 2)),
        ),
        "counts": {
            "no_validation": {Severity.ADVICE: 1},
            "wrong_type": {Severity.REJECT: 1},
            "html": {Severity.REPAIR: 7},
            "near_duplicate": {Severity.DROP: 1},
        },
        "tokens": TokenStatistics(
            lengths(2, 5, 3, 1), lengths(1, 6, 4), lengths(9, 2), limit=48, num_no_label=1
        ),
        "characters": lengths(4, 7, width=64),
        "labels": LabelStatistics({"yes & no": 9, SCRIPT: 2}),
        "languages": {"en": 10, "ja": 1},
        "num_exact_duplicates": 0,
        "num_near_duplicates": 1,
        "num_conflicts": 0,
        "seconds": 0.25,
    }
    return replace(Check(**values), **fields)


def clean_check() -> Check:
    """A check that found nothing."""
    return check(
        files=(facts(TRAIN, "training", num_usable=12),),
        defects=(),
        counts={},
        labels=None,
        num_near_duplicates=0,
    )
