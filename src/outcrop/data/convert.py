"""Turn records of one format into records of another, without losing anything that is trained on.

What the other format has no place for is refused with the reason: several turns or a system text
in a pair, an image, further keys. Where records come from besides JSONL is in `tables.py`,
`folders.py` and `logs.py`; all of them yield rows, which `write_rows` writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from outcrop.data.defects import Defect, Finding, Severity, Unusable
from outcrop.data.facts import MAX_LISTED, DataFile
from outcrop.data.formats import (
    CLAUDE_MESSAGES,
    CONVERSATION,
    DISTILLATION_PROMPTS,
    EVALUATION_PROMPTS,
    NAMES,
    PROMPT_COMPLETION,
    REINFORCEMENT,
    read_content,
    recognize,
)
from outcrop.data.output import check_target, write_whole
from outcrop.data.read import scan_lines
from outcrop.data.records import Message
from outcrop.data.schemas import SCHEMA_VERSION
from outcrop.errors import DataError
from outcrop.models.catalog import DOCUMENTS

SOURCES = (
    PROMPT_COMPLETION,
    CONVERSATION,
    DISTILLATION_PROMPTS,
    CLAUDE_MESSAGES,
    EVALUATION_PROMPTS,
    DOCUMENTS,
)
"""Formats that can be converted from; invocation logs are read by `logs.py`."""
TARGETS = (
    PROMPT_COMPLETION,
    CONVERSATION,
    CLAUDE_MESSAGES,
    DISTILLATION_PROMPTS,
    EVALUATION_PROMPTS,
    REINFORCEMENT,
    DOCUMENTS,
)
"""Formats that can be converted to."""


class Row(NamedTuple):
    """One record on its way, or why there is none."""

    file: str
    line: int | None
    """From 1; None where the file is the record."""
    value: dict[str, Any] | None
    finding: Finding | None = None
    """Why there is no value."""


@dataclass(frozen=True)
class Converted:
    """What came of a conversion."""

    num_records: int
    """That were written."""
    num_refused: int
    refused: tuple[Defect, ...]
    """The first ones, at most facts.MAX_LISTED."""
    digest: str
    """SHA-256 of what was written, in hex, before packing."""
    num_bytes: int
    """Of what was written, before packing."""


def convert_record(
    value: Mapping[str, Any], target: str, *, body_family: str = ""
) -> dict[str, Any]:
    """Return a record in another format.

    Args:
        value: an object of one of SOURCES.
        target: one of TARGETS.
        body_family: whose mark-up prompts are written in, as in `markup.parse_prompt`; "" leaves a
            prompt as it stands.
    Raises:
        Unusable: the record breaks a rule of its own format, or the other has no place for it.
    """
    found = recognize(value)
    if found is None:
        raise Unusable("wrong_keys", "Its keys are those of no known format.")
    if found == PROMPT_COMPLETION and value.keys() == {"prompt"}:
        found = EVALUATION_PROMPTS
    if found not in SOURCES:
        raise Unusable("mixed_schema", f"This is {NAMES[found]}, which cannot be converted.")
    findings: list[Finding] = []
    formats = (CONVERSATION, DISTILLATION_PROMPTS) if found == CONVERSATION else (found,)
    if found == CONVERSATION and not _is_answered(value):
        formats = (DISTILLATION_PROMPTS,)
    content = read_content(value, formats, findings, body_family=body_family)
    for finding in findings:
        if finding.code in ("extra_keys", "duplicate_key"):
            raise Unusable(finding.code, f"{finding.message} They would be lost.", finding.value)
    if content.text is not None:
        if target != DOCUMENTS:
            raise Unusable("mixed_schema", "Raw text has no prompt and no answer.")
        return {"input": content.text}
    messages = content.messages
    if found == EVALUATION_PROMPTS:
        messages = _evaluated(value, messages)
    return write_messages(messages, target)


def _is_answered(value: Mapping[str, Any]) -> bool:
    messages = value.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return not (isinstance(last, dict) and last.get("role") == "user")


def _evaluated(value: Mapping[str, Any], messages: Sequence[Message]) -> tuple[Message, ...]:
    lost = [key for key in ("category", "modelResponses") if key in value]
    if lost:
        raise Unusable("extra_keys", f"{' and '.join(lost)} would be lost. Take them out.")
    asked = tuple(message for message in messages if message.role != "assistant")
    reference = value.get("referenceResponse")
    return (*asked, Message("assistant", reference)) if isinstance(reference, str) else asked


def write_messages(messages: Sequence[Message], target: str) -> dict[str, Any]:
    """Return messages as a record.

    Args:
        messages: the system's, if there is one, then turns from the user's on.
        target: one of TARGETS.
    Raises:
        Unusable: the format has no place for them.
    """
    system = messages[0].text if messages and messages[0].role == "system" else None
    turns = messages[1:] if system is not None else messages
    if target in (CONVERSATION, CLAUDE_MESSAGES, DISTILLATION_PROMPTS):
        if target != DISTILLATION_PROMPTS and turns[-1].role != "assistant":
            raise Unusable("role_order", "It has no answer.")
        return _conversation(system, turns, target)
    prompt, answer = _single(system, turns, target)
    if target == PROMPT_COMPLETION:
        if answer is None:
            raise Unusable("missing_completion", "It has no answer.")
        return {"prompt": prompt, "completion": answer}
    if target == EVALUATION_PROMPTS:
        return (
            {"prompt": prompt}
            if answer is None
            else {
                "prompt": prompt,
                "referenceResponse": answer,
            }
        )
    if target == REINFORCEMENT:
        if answer is None:
            raise Unusable("missing_reference", "It has no answer to be the reference.")
        asked = [{"role": "user", "content": prompt}]
        if system is not None:
            asked.insert(0, {"role": "system", "content": system})
        return {"messages": asked, "reference_answer": answer}
    raise Unusable("mixed_schema", f"A labelled record is no {NAMES.get(target, target)}.")


def _conversation(system: str | None, turns: Sequence[Message], target: str) -> dict[str, Any]:
    if target == CLAUDE_MESSAGES:
        value: dict[str, Any] = {} if system is None else {"system": system}
        value["messages"] = [{"role": turn.role, "content": turn.text} for turn in turns]
        return value
    value = {"schemaVersion": SCHEMA_VERSION}
    if system is not None:
        value["system"] = [{"text": system}]
    value["messages"] = [{"role": turn.role, "content": [{"text": turn.text}]} for turn in turns]
    return value


def _single(system: str | None, turns: Sequence[Message], target: str) -> tuple[str, str | None]:
    """Return the one prompt, and the answer where there is one."""
    name = NAMES[target]
    if system is not None and target != REINFORCEMENT:
        raise Unusable("mixed_schema", f"It has a system text, and {name} has no place for one.")
    if len(turns) > 2:
        raise Unusable(
            "mixed_schema",
            f"It has {len(turns)} turns, and {name} has place for a prompt and an answer.",
        )
    return turns[0].text, turns[1].text if len(turns) == 2 else None


def jsonl_rows(data: DataFile, target: str, *, body_family: str = "") -> Iterator[Row]:
    """Yield the records of a JSONL file, converted; blank lines are passed over.

    Args:
        target, body_family: as in `convert_record`.
    """
    with data.open() as stream:
        for line in scan_lines(stream, data.name):
            if line.is_blank:
                continue
            if line.value is None:
                yield Row(data.name, line.number, None, line.findings[-1])
                continue
            doubles = [found for found in line.findings if found.code == "duplicate_key"]
            if doubles:
                yield Row(data.name, line.number, None, doubles[0])
                continue
            try:
                value = convert_record(line.value, target, body_family=body_family)
            except Unusable as error:
                yield Row(data.name, line.number, None, error.finding)
            else:
                yield Row(data.name, line.number, value)


def converted_rows(rows: Iterable[Row], target: str, *, body_family: str = "") -> Iterator[Row]:
    """Yield rows of pairs or documents in another format; see `convert_record`."""
    for row in rows:
        if row.value is None:
            yield row
            continue
        try:
            yield row._replace(value=convert_record(row.value, target, body_family=body_family))
        except Unusable as error:
            yield Row(row.file, row.line, None, error.finding)


def write_rows(
    rows: Iterable[Row],
    target: Path,
    *,
    sources: Sequence[Path] = (),
    skip_refused: bool = False,
    packed: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Converted:
    """Write rows as JSONL.

    Args:
        sources: the files that rows come from, which the target must not be.
        skip_refused: whether records that cannot be converted are left out; otherwise the first one
            ends the conversion.
        packed: whether the file is packed with gzip.
        force: whether a file that is there may be replaced.
        progress: called with the number of records so far.
    Raises:
        DataError: a record cannot be converted; or none was; or the file cannot be written.
    """
    check_target(target, sources, force=force)
    refused: list[Defect] = []
    num_refused = 0
    name = ""
    with write_whole(target, packed=packed) as out:
        for number, row in enumerate(rows, 1):
            name = row.file
            if row.value is None:
                assert row.finding is not None
                num_refused += 1
                if not skip_refused:
                    raise _refused(row, row.finding)
                if len(refused) < MAX_LISTED:
                    refused.append(row.finding.at(row.file, row.line))
                continue
            out.write((json.dumps(row.value, ensure_ascii=False) + "\n").encode())
            if progress and not number % 100:
                progress(number)
        if not out.num_lines:
            reason = f" {num_refused:,} could not be converted." if num_refused else ""
            raise DataError(
                f"There is no record to convert{f' in {name}' if name else ''}.{reason}"
                + (f" The first: {refused[0].message}" if refused else ""),
                code="empty_file",
                file=name,
            )
        return Converted(
            out.num_lines, num_refused, tuple(refused), out.digest.hexdigest(), out.num_bytes
        )


def refuse(code: str, message: str, value: str = "") -> Finding:
    """Return why a row cannot be converted."""
    return Finding(code, Severity.REJECT, message, value)


def _refused(row: Row, finding: Finding) -> DataError:
    where = f"{row.file}, line {row.line}" if row.line is not None else row.file
    return DataError(
        f"{where} cannot be converted: {finding.message} With --skip-refused, such records are "
        "left out.",
        code=finding.code,
        file=row.file,
        line=row.line,
    )
