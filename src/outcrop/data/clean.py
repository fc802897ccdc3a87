"""Clean a data file: mend its texts, leave out what repeats, cut what is too long.

The original is only read. What comes out is a file of records that can be trained on, and a change
log (`clean_log.py`) with which the original can be had again, byte for byte. A line that needs
nothing is copied as it stands. The same file and settings give the same bytes.

The file is read twice: what repeats is known only when all of it was seen. Memory is about 200
bytes a record, whatever its length.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcrop.data import text
from outcrop.data.checks.tokens import character_quota, count_record
from outcrop.data.clean_log import (
    DROP,
    REJECT,
    REPAIR,
    SKIP,
    SPLIT,
    Change,
    Entry,
    write_end,
    write_head,
)
from outcrop.data.defects import Defect, Finding, Severity, Unusable
from outcrop.data.facts import MAX_LISTED, TEST, DataFile
from outcrop.data.formats import read_content
from outcrop.data.limits import TokenCheck
from outcrop.data.mend import mend_record
from outcrop.data.near import DEFAULT_THRESHOLD, NearIndex, check_threshold
from outcrop.data.output import check_target, write_whole
from outcrop.data.read import Line, LineParser, empty_file, line_error, split_chunks
from outcrop.data.recognition import main_format
from outcrop.data.render import Renderer
from outcrop.data.repeats import Records
from outcrop.data.schemas import Content
from outcrop.data.sentences import split_text
from outcrop.errors import DataError
from outcrop.models.catalog import BaseModel


@dataclass(frozen=True)
class Cleaning:
    """What is done."""

    repairs: tuple[str, ...] = text.CODES
    """Codes of the repairs that are made in texts."""
    drops_exact_duplicates: bool = True
    drops_near_duplicates: bool = True
    near_threshold: float = DEFAULT_THRESHOLD
    """As in near.NearIndex."""
    splits_documents: bool = True
    """Whether documents longer than the model takes are cut at sentence ends."""

    def __post_init__(self) -> None:
        check_threshold(self.near_threshold)
        unknown = set(self.repairs) - set(text.CODES)
        if unknown:
            raise DataError(
                f"There is no repair {', '.join(sorted(unknown))}. There are "
                f"{', '.join(text.CODES)}.",
                code="unknown_repair",
                file="",
            )


@dataclass(frozen=True)
class Model:
    """Whose limits and formats records are held against."""

    base: BaseModel
    batch_size: int
    renderer: Renderer

    @property
    def limits(self) -> TokenCheck:
        return TokenCheck(self.base, self.batch_size)


@dataclass(frozen=True)
class Cleaned:
    """What became of one file."""

    file: str
    """As its owner named it."""
    original_digest: str
    """SHA-256 of its content, in hex; of the unpacked content, if it was packed."""
    digest: str
    """SHA-256 of the cleaned content, in hex, before packing."""
    num_bytes: int
    num_output_bytes: int
    num_lines: int
    num_records: int
    """Lines of the original that are not blank."""
    num_output_records: int
    actions: Mapping[str, int]
    """Lines by what became of them: clean_log.ACTIONS; those that were copied are not counted."""
    counts: Mapping[str, int]
    """Records by the code of what was changed or was the reason."""
    rejected: tuple[Defect, ...]
    """The first records that cannot be used and were left out, at most facts.MAX_LISTED."""

    @property
    def is_unchanged(self) -> bool:
        """Whether the cleaned file is the original."""
        return self.digest == self.original_digest


@dataclass
class _Record:
    """One line, looked at."""

    line: Line
    raw: bytes
    value: dict[str, Any] | None
    """Mended; None where the line holds no usable record."""
    changes: list[Change]
    content: Content | None = None
    finding: Finding | None = None
    """Why it cannot be used."""


def clean_file(
    data: DataFile,
    target: Path,
    log: Path,
    cleaning: Cleaning,
    formats: Sequence[str],
    *,
    model: Model | None = None,
    against: Sequence[DataFile] = (),
    packed: bool = False,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Cleaned:
    """Clean one file.

    Args:
        data: the original; opened twice, and a few lines more for each file of `against`.
        target: where the cleaned file is written.
        log: where the change log is written; it is there before the cleaned file is.
        formats: those that are taken, as `formats.formats_for` returns them; without a model, only
            the one of them that most records have.
        model: whose token limits hold; None holds records against none.
        against: validation or test files; a record that one of them has too is left out.
        packed: whether the cleaned file is packed with gzip.
        force: whether files that are there may be replaced.
        progress: called with the bytes of the original read so far, over both readings.
    Raises:
        DataError: the original cannot be read, holds no record, has a line that is longer than a
            line may be, or changed between the readings; or an output cannot be written.
    """
    if target == log:
        raise DataError(
            f"{target} is named for the cleaned file and for its log. Name two files.",
            code="cannot_write",
            file=str(target),
        )
    sources = [Path(file.name) for file in (data, *against) if not file.name.startswith("s3://")]
    for path in (target, log):
        check_target(path, sources, force=force)
    taken = tuple(formats) if model else main_format(data, formats)
    work = _Work(data, cleaning, taken, model, progress)
    plan = work.plan(against)
    # The log takes its place first: no cleaned file is ever without one.
    with write_whole(target, packed=packed) as out, write_whole(log) as log_out:
        log_out.write(write_head(data.name, work.settings()))
        for record in work.records():
            lines, entry = work.decide(record, plan.twins)
            out.write(b"".join(line + b"\n" for line in lines))
            if entry is not None:
                log_out.write(entry.write())
        if plan.digest not in ("", work.original_digest):
            raise DataError(
                f"{data.name} changed while it was read. Clean it again when nothing writes to it.",
                code="changed_while_read",
                file=data.name,
            )
        cleaned = work.cleaned(out.digest.hexdigest(), out.num_bytes, out.num_lines)
        log_out.write(write_end(_end(cleaned, work.ends_with_line_end)))
    return cleaned


@dataclass(frozen=True)
class _Plan:
    """Which lines repeat others, known when all of the file was seen."""

    digest: str
    """Of the content that was read; "" where nothing had to be looked for."""
    twins: Mapping[int, tuple[str, str, int]]
    """Line -> (code, file, line)."""


class _Work:
    """One cleaning on its way."""

    def __init__(
        self,
        data: DataFile,
        cleaning: Cleaning,
        formats: tuple[str, ...],
        model: Model | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._data = data
        self._cleaning = cleaning
        self._formats = formats
        self._model = model
        self._progress = progress
        self._num_read = 0
        self._begin()

    def _begin(self) -> None:
        self.original_digest = ""
        self.ends_with_line_end = True
        self._num_bytes = self._num_lines = self._num_records = 0
        self._actions: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._rejected: list[Defect] = []

    def settings(self) -> dict[str, Any]:
        cleaning, model = self._cleaning, self._model
        return {
            "repairs": list(cleaning.repairs),
            "dropsExactDuplicates": cleaning.drops_exact_duplicates,
            "dropsNearDuplicates": cleaning.drops_near_duplicates,
            "nearThreshold": cleaning.near_threshold,
            "splitsDocuments": cleaning.splits_documents,
            "formats": list(self._formats),
            "model": model.base.model_id if model else None,
            "maxTokens": model.limits.longest_piece if model else None,
        }

    # -- reading

    def records(self) -> Iterator[_Record]:
        """Yield every line, mended; afterwards `original_digest` is set."""
        self._begin()
        parser = LineParser()
        digest = hashlib.sha256()
        with self._data.open() as stream:
            for chunk in split_chunks(stream, self._data.name):
                if chunk.is_cut:
                    finding = next(iter(parser.chunk(chunk))).findings[-1]
                    raise line_error(finding, self._data.name, chunk.first_line)
                digest.update(chunk.data)
                self._num_bytes += len(chunk.data)
                self._num_read += len(chunk.data)
                self.ends_with_line_end = chunk.data.endswith(b"\n")
                if self._progress:
                    self._progress(self._num_read)
                lines = chunk.data.split(b"\n")
                if not lines[-1]:
                    lines.pop()
                for number, raw in enumerate(lines, chunk.first_line):
                    self._num_lines += 1
                    record = self._look(parser.line(raw, number), raw)
                    self._num_records += not record.line.is_blank
                    yield record
        if not self._num_records:
            raise empty_file(self._data.name)
        self.original_digest = digest.hexdigest()

    def _look(self, line: Line, raw: bytes) -> _Record:
        """Mend one line and find out whether it can be used."""
        changes = [
            Change(finding.code, message=finding.message)
            for finding in line.findings
            if finding.severity is Severity.REPAIR
        ]
        record = _Record(line, raw, line.value, changes)
        if line.value is None:
            record.finding = line.findings[-1]
            return record
        record.value, made = mend_record(line.value, self._formats, self._cleaning.repairs)
        changes += made
        findings: list[Finding] = []
        body_family = self._model.base.body_family if self._model else ""
        try:
            record.content = read_content(
                record.value,
                self._formats,
                findings,
                body_family=body_family,
                text_only=self._model is not None,
            )
        except Unusable as error:
            record.finding = error.finding
            return record
        if self._model is not None and record.content.messages:
            limits = self._model.limits
            record.finding = (
                character_quota(record.content.messages, limits)
                or count_record(record.content.messages, self._model.renderer, limits).finding
            )
        return record

    # -- what repeats

    def plan(self, against: Sequence[DataFile]) -> _Plan:
        """Read all files once and find out which lines of the original repeat others."""
        cleaning = self._cleaning
        if not (cleaning.drops_exact_duplicates or cleaning.drops_near_duplicates or against):
            return _Plan("", {})
        lines = array("q")
        starts: list[int] = []
        files = (self._data, *against)
        with NearIndex(cleaning.near_threshold) as index:
            records = Records(index)
            for file in files:
                starts.append(len(lines))
                reading = self if file is self._data else self._beside(file)
                for record in reading.records():
                    if record.finding is None and record.content is not None:
                        records.add(record.content)
                        lines.append(record.line.number)
            num_own = starts[1] if against else len(lines)
            twins: dict[int, tuple[str, str, int]] = {}
            for repeat in records.repeats(
                num_own,
                same=cleaning.drops_exact_duplicates,
                near=cleaning.drops_near_duplicates,
            ):
                code = "exact_duplicate" if repeat.is_same else "near_duplicate"
                twins[lines[repeat.place]] = (code, self._data.name, lines[repeat.twin])
            for repeat in records.leaks(num_own, near=cleaning.drops_near_duplicates):
                file = files[bisect_right(starts, repeat.twin) - 1]
                code = "test_leak" if file.role == TEST else "validation_leak"
                twins[lines[repeat.place]] = (code, file.name, lines[repeat.twin])
        return _Plan(self.original_digest, twins)

    def _beside(self, file: DataFile) -> _Work:
        """Return what reads another file as this one is read."""
        return _Work(file, self._cleaning, self._formats, self._model, None)

    # -- what becomes of a line

    def decide(
        self, record: _Record, twins: Mapping[int, tuple[str, str, int]]
    ) -> tuple[list[bytes], Entry | None]:
        """Return the lines to write, and the entry of the log, or None where it is copied."""
        number, raw = record.line.number, record.raw
        if record.line.is_blank:
            return [], self._entry(Entry(number, SKIP, raw, (Change("blank_line"),)))
        if record.finding is not None:
            finding = record.finding
            if len(self._rejected) < MAX_LISTED:
                self._rejected.append(finding.at(self._data.name, number))
            change = Change(finding.code, before=finding.value, message=finding.message)
            return [], self._entry(Entry(number, REJECT, raw, (change,)))
        assert record.value is not None
        if number in twins:
            code, file, line = twins[number]
            entry = Entry(number, DROP, raw, (Change(code),), twin=(file, line))
            return [], self._entry(entry)
        pieces = self._pieces(record)
        if len(pieces) > 1:
            lines = [_written({**record.value, "input": piece}) for piece in pieces]
            change = Change("too_long", "input", message=f"Cut into {len(pieces)} records.")
            changes = (*record.changes, change)
            return lines, self._entry(Entry(number, SPLIT, raw, changes, len(lines)))
        if not record.changes:
            return [raw], None
        # Where only the line was changed (mark, line end), its text stays as it was written.
        is_same = record.value is record.line.value
        lines = [record.line.raw if is_same else _written(record.value)]
        return lines, self._entry(Entry(number, REPAIR, raw, tuple(record.changes), 1))

    def _pieces(self, record: _Record) -> list[str]:
        content, model = record.content, self._model
        if content is None or content.text is None or model is None:
            return []
        if not self._cleaning.splits_documents:
            return []
        tokenizer = model.renderer.tokenizer
        room = model.limits.longest_piece - len(tokenizer.document_start) - 1
        pieces = split_text(content.text, room, model.renderer.counter.count)
        return [piece.rstrip() for piece in pieces if text.shows_something(piece)]

    def _entry(self, entry: Entry) -> Entry:
        self._actions[entry.action] += 1
        self._counts.update({change.code for change in entry.changes})
        return entry

    def cleaned(self, digest: str, num_bytes: int, num_lines: int) -> Cleaned:
        return Cleaned(
            self._data.name,
            self.original_digest,
            digest,
            self._num_bytes,
            num_bytes,
            self._num_lines,
            self._num_records,
            num_lines,
            dict(self._actions),
            dict(self._counts),
            tuple(self._rejected),
        )


def _written(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8")


def _end(cleaned: Cleaned, ends_with_line_end: bool) -> dict[str, Any]:
    return {
        "originalSha256": cleaned.original_digest,
        "cleanedSha256": cleaned.digest,
        "numLines": cleaned.num_lines,
        "numRecords": cleaned.num_records,
        "numOutputRecords": cleaned.num_output_records,
        "actions": dict(cleaned.actions),
        "counts": dict(cleaned.counts),
        "endsWithLineEnd": ends_with_line_end,
    }
