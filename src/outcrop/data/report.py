"""What a check found, for programs and for terminals: one JSON object, and a few lines of text.

The JSON object holds nothing that differs between two checks of the same bytes: no time, no host.
Its fields are described in docs/data-report.md; one that changes its meaning changes SCHEMA.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outcrop.data.check import MAX_LISTED, Check, FileFacts, Lengths
from outcrop.data.defects import KINDS, SEVERITIES, Defect, Place, Severity

SCHEMA = "outcrop-data-report/1"
_SHOWN_DEFECTS = 10
_SHOWN_LABELS = 200
"""Labels that are listed; the rest is one number."""


@dataclass(frozen=True)
class Training:
    """What a job with these data would do."""

    num_epochs: int
    tokens_per_second: float | None = None
    """What this machine measured in an earlier job of the same model and method; None where there
    was none."""
    measured_by: str = ""
    """The name of that job."""


def build_report(
    check: Check,
    *,
    model_name: str = "",
    training: Training | None = None,
    rejection: str | None = None,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the report as a JSON object.

    Args:
        model_name: full name of the real model.
        training: what a job would do with the data; None where no job is meant.
        rejection: the message that such a job fails with.
        made_from: where the data were cleaned: name of the cleaned file -> name of the original.
    """
    return {
        "schema": SCHEMA,
        "verdict": check.verdict,
        "rejection": rejection,
        "model": {"id": check.base_model_id, "name": model_name} if check.base_model_id else None,
        "customizationType": check.customization_type,
        "batchSize": check.batch_size,
        "files": [_file(facts, made_from or {}) for facts in check.files],
        "counts": {str(severity): check.count(severity) for severity in SEVERITIES},
        "codes": _codes(check),
        "defects": [describe_defect(defect) for defect in check.defects],
        "defectsListedForEachCode": MAX_LISTED,
        "duplicates": {
            "exact": check.num_exact_duplicates,
            "near": check.num_near_duplicates,
            "conflictingLabels": check.num_conflicts,
        },
        "tokens": _tokens(check),
        "characters": _lengths(check.characters),
        "labels": _labels(check),
        "languages": dict(check.languages),
        "training": _training(check, training),
    }


def write_json(report: Mapping[str, Any]) -> bytes:
    """Return a report as UTF-8, the same bytes for the same report."""
    return (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def describe_defect(defect: Defect) -> dict[str, Any]:
    """Return a defect as the report has it."""
    return {
        "code": defect.code,
        "severity": str(defect.severity),
        **_place(defect.place),
        "message": defect.message,
        "value": defect.value,
        "twin": None if defect.twin is None else _place(defect.twin),
    }


def write_summary(report: Mapping[str, Any], *, seconds: float | None = None) -> str:
    """Return the report in a few lines of plain text, for a terminal.

    Args:
        seconds: how long the check took; None leaves it out.
    """
    lines = []
    for file in report["files"]:
        format_ = file["format"] or "no known format"
        lines.append(
            f"{file['name']} ({file['role']}): {file['numRecords']:,} records, "
            f"{file['numUsable']:,} usable, {format_}, {file['numBytes']:,} bytes"
        )
        lines.append(f"  SHA-256 {file['sha256']}")
    tokens = report["tokens"]
    if tokens is not None:
        total = tokens["total"]
        lines.append(
            f"tokens: {total['total']:,} an epoch; a record has {total['minimum']:,} to "
            f"{total['maximum']:,}, half of them up to {total['median']:,}, 95 % up to "
            f"{total['percentile95']:,}; the limit is {tokens['limit']:,}"
        )
    training = report["training"]
    if training is not None:
        lines.append(_training_line(training))
    if report["labels"] is not None:
        labels = report["labels"]
        lines.append(f"labels: {labels['numLabels']:,}")
    if report["languages"]:
        shown = ", ".join(f"{name} {count:,}" for name, count in report["languages"].items())
        lines.append(f"languages (of a sample): {shown}")
    for row in report["codes"]:
        counts = ", ".join(f"{count:,} {name}" for name, count in row["counts"].items())
        lines.append(f"{row['code']}: {counts}. {row['summary']}")
    lines += [_defect_line(defect) for defect in gravest_first(report["defects"])[:_SHOWN_DEFECTS]]
    num_defects = sum(report["counts"].values())
    if num_defects > _SHOWN_DEFECTS:
        lines.append(f"  ... {num_defects - _SHOWN_DEFECTS:,} more")
    took = "" if seconds is None else f" in {seconds:.1f} s"
    counts = ", ".join(f"{count:,} {name}" for name, count in report["counts"].items() if count)
    lines.append(f"{report['verdict']}{took}: {counts or 'nothing found'}")
    return "\n".join(map(_printable, lines))


def gravest_first(defects: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the defects of a report by severity, those of one severity in their order."""
    return sorted(defects, key=lambda defect: SEVERITIES.index(Severity(defect["severity"])))


def _printable(line: str) -> str:
    """Return a line without what a terminal would obey: names and values are somebody's data."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in line
    )


def _defect_line(defect: Mapping[str, Any]) -> str:
    where = defect["file"] if defect["line"] is None else f"{defect['file']}:{defect['line']}"
    value = f" [{defect['value']}]" if defect["value"] else ""
    return f"  {where}: {defect['severity']} {defect['code']}: {defect['message']}{value}"


def _training_line(training: Mapping[str, Any]) -> str:
    line = f"training: {training['numEpochs']:,} epochs, {training['numTokens']:,} tokens"
    if training["seconds"] is None:
        return line + "; no job of this model has measured its speed on this machine yet"
    return (
        f"{line}; about {_duration(training['seconds'])} at the "
        f"{training['tokensPerSecond']:,.0f} tokens a second of job {training['measuredBy']}"
    )


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _file(facts: FileFacts, made_from: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": facts.name,
        "role": facts.role,
        "madeFrom": made_from.get(facts.name),
        "sha256": facts.digest,
        "numBytes": facts.num_bytes,
        "numLines": facts.num_lines,
        "numRecords": facts.num_records,
        "numUsable": facts.num_usable,
        "format": facts.format,
        "formats": dict(facts.formats),
        "numCharacters": facts.num_characters,
    }


def _codes(check: Check) -> list[dict[str, Any]]:
    """Return a row for each code that was found, the gravest and then the most frequent first."""
    rows = []
    for code, counts in check.counts.items():
        found = {str(severity): counts[severity] for severity in SEVERITIES if counts.get(severity)}
        if found:
            kind = KINDS[code]
            rows.append(
                {"code": code, "counts": found, "summary": kind.summary, "remedy": kind.remedy}
            )
    return sorted(rows, key=_by_gravity)


def _by_gravity(row: Mapping[str, Any]) -> tuple[int, int, str]:
    gravest = next(iter(row["counts"]))
    return SEVERITIES.index(Severity(gravest)), -sum(row["counts"].values()), str(row["code"])


def _place(place: Place) -> dict[str, Any]:
    return {"file": place.file, "line": place.line}


def _tokens(check: Check) -> dict[str, Any] | None:
    found = check.tokens
    if found is None:
        return None
    return {
        "total": _lengths(found.total),
        "input": _lengths(found.input),
        "output": _lengths(found.output),
        "limit": found.limit,
        "numWithoutLabel": found.num_no_label,
        "perEpoch": found.epoch_tokens,
    }


def _lengths(found: Lengths | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "total": found.total,
        "minimum": found.minimum,
        "median": found.median,
        "percentile95": found.percentile_95,
        "maximum": found.maximum,
        "histogram": {
            "edges": list(found.histogram.edges),
            "counts": list(found.histogram.counts),
        },
    }


def _labels(check: Check) -> dict[str, Any] | None:
    if check.labels is None:
        return None
    counts = check.labels.counts
    listed = list(counts.items())[:_SHOWN_LABELS]
    return {"numLabels": len(counts), "counts": dict(listed)}


def _training(check: Check, training: Training | None) -> dict[str, Any] | None:
    if training is None or check.tokens is None:
        return None
    num_tokens = training.num_epochs * check.tokens.epoch_tokens
    speed = training.tokens_per_second
    return {
        "numEpochs": training.num_epochs,
        "numTokens": num_tokens,
        "tokensPerSecond": speed,
        "measuredBy": training.measured_by or None,
        "seconds": None if not speed else round(num_tokens / speed, 1),
    }
