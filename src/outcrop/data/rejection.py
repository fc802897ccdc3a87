"""Why data are rejected, in one message: the first defects with their lines, Bedrock's words first.

Source: the sentences are those of the Bedrock user guide, "Troubleshoot model customization".
"""

from __future__ import annotations

from outcrop.data.check import Check, FileFacts
from outcrop.data.defects import Defect, Severity
from outcrop.data.formats import FORMS
from outcrop.errors import DataError

MAX_CHARACTERS = 2048
"""Of the message. Source: botocore's `ErrorMessage` shape of bedrock."""
_SHOWN_CHARACTERS = 400
"""Of one defect."""

_NOT_JSONL = frozenset(
    {
        *("empty_file", "invalid_gzip", "invalid_json", "invalid_utf8", "null_byte"),
        "not_an_object",
    }
)
_BEDROCKS_LENGTHS = ("Max sum of input and output", "Maximum input", "Maximum output")
_OTHER = frozenset(
    {
        *("too_long", "too_many_records", "changed_while_read", "unreadable_file"),
        "too_few_records",
    }
)
"""Codes whose own messages begin with Bedrock's sentence where it has one."""


def rejection(check: Check, formats: tuple[str, ...], *, report: str = "") -> DataError | None:
    """Return the error of data that cannot be trained on; None where they can.

    Args:
        formats: those that the model takes, the preferred first.
        report: where the full report is; "" where there is none.
    """
    defects = [defect for defect in check.defects if defect.severity is Severity.REJECT]
    if not defects:
        return None
    first = defects[0]
    tail = _tail(check, report)
    parts = [_with_bedrocks_words(first, check.files, formats)]
    last = first.place.file
    for defect in defects[1:]:
        text = _further(defect, last)
        if sum(map(len, parts)) + len(parts) + len(text) + len(tail) + 1 > MAX_CHARACTERS:
            break
        parts.append(text)
        last = defect.place.file
    parts.append(tail)
    message = " ".join(parts)
    return DataError(
        message[:MAX_CHARACTERS], code=first.code, file=first.place.file, line=first.place.line
    )


def _with_bedrocks_words(
    defect: Defect, files: tuple[FileFacts, ...], formats: tuple[str, ...]
) -> str:
    file = defect.place.file
    said = _said(defect)
    if defect.code in _NOT_JSONL:
        opening = (
            f"Unable to parse Amazon S3 file: {file}. Data files must conform to JSONL format."
        )
    elif defect.code == "too_long" and not defect.message.startswith(_BEDROCKS_LENGTHS):
        opening = f"Input size exceeded in file {file} for record starting with {defect.value}."
    elif defect.code in _OTHER:
        # The sentence about a length names no file, so it is named after it.
        where = file if defect.place.line is None else f"{file}, line {defect.place.line}"
        return f"{defect.message[:_SHOWN_CHARACTERS]} ({where})"
    else:
        found = next((facts.format for facts in files if facts.name == file), "")
        form = FORMS[found if found in formats else formats[0]]
        opening = f"Input data at {file} must follow '{form}' format."
    return said if defect.message.startswith(opening) else f"{opening} {said}"


def _said(defect: Defect) -> str:
    message = defect.message[:_SHOWN_CHARACTERS]
    return message if defect.place.line is None else f"Line {defect.place.line}: {message}"


def _further(defect: Defect, last_file: str) -> str:
    file = "" if defect.place.file == last_file else f"{defect.place.file}: "
    return f"{file}{_said(defect)}"


def _tail(check: Check, report: str) -> str:
    counts = {
        code: found[Severity.REJECT]
        for code, found in check.counts.items()
        if found.get(Severity.REJECT)
    }
    total = sum(counts.values())
    by_code = ", ".join(
        f"{code} {count:,}" for code, count in sorted(counts.items(), key=lambda row: -row[1])
    )
    noun = "defect rejects" if total == 1 else "defects reject"
    where = f" The report: {report}" if report else ""
    return f"In all {total:,} {noun} the data ({by_code[:_SHOWN_CHARACTERS]}).{where}"
