"""Look at the lines of one chunk: every rule that needs no other record than the one at hand.

Turns a chunk into findings and columns. Chunks are independent of each other, so several processes
can do this (`pool.py`); what needs all records together is done with the columns afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outcrop.data.checks import personal, texts, tokens
from outcrop.data.checks.texts import Texts
from outcrop.data.columns import Columns
from outcrop.data.defects import Finding, Severity, Unusable
from outcrop.data.formats import meant_format, read_content
from outcrop.data.limits import TokenCheck
from outcrop.data.near import label_hashes
from outcrop.data.read import Chunk, Line, LineParser
from outcrop.data.render import Renderer
from outcrop.data.schemas import Content
from outcrop.data.shingles import normalized, shingles
from outcrop.models.catalog import BaseModel

MAX_LABEL_CHARACTERS = 60
MAX_LABELS = 2000
"""Different completions; with more, or longer ones, completions are no labels."""
SAMPLES_OF_CHUNK = 100
MAX_SAMPLE_CHARACTERS = 400
RULES = (*texts.RULES, personal.pii)


@dataclass(frozen=True)
class Context:
    """What is the same for all chunks of a check; travels to other processes."""

    formats: tuple[str, ...]
    base: BaseModel | None
    batch_size: int
    folder: Path | None
    """Whose tokenizer and template count tokens; None counts none."""
    max_listed: int


@dataclass
class Scanned:
    """What became of one chunk."""

    first_line: int
    num_lines: int = 0
    num_records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    counts: Counter[tuple[str, Severity]] = field(default_factory=Counter)
    listed: list[tuple[int, Finding]] = field(default_factory=list)
    """(line, finding), the first `max_listed` of each code."""
    columns: Columns | None = None
    """Of usable records; None where there is none."""
    runs: NDArray[np.uint64] | None = None
    run_ends: NDArray[np.int64] | None = None
    """Of those records' prompts or documents, as `shingles` returns them."""
    num_no_label: int = 0
    labels: Counter[str] | None = None
    """Completions; None where they are too long or too many to be labels."""
    letters: list[tuple[int, str]] = field(default_factory=list)
    """Lines whose completion is one letter."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """(line, beginning of its text) of some records."""


class Scanner:
    """Scans chunks, one at a time; one for each process."""

    def __init__(self, context: Context, renderer: Renderer | None = None) -> None:
        """Load the tokenizer, where tokens are counted.

        Args:
            renderer: that of the context's folder, if it is loaded already.
        Raises:
            ModelError: it cannot be used.
        """
        self._context = context
        self._parser = LineParser()
        self._renderer = None
        if context.folder is not None:
            self._renderer = renderer or Renderer(context.folder)
        self._limits = TokenCheck(context.base, context.batch_size) if context.base else None
        self._body_family = context.base.body_family if context.base else ""

    def scan(self, chunk: Chunk) -> Scanned:
        """Look at every line of a chunk."""
        work = _Work(Scanned(chunk.first_line, labels=Counter()), self._context.max_listed)
        for line in self._parser.chunk(chunk):
            self._line(line, work)
        return self._finished(work)

    def _line(self, line: Line, work: _Work) -> None:
        scanned = work.scanned
        scanned.num_lines += 1
        for finding in line.findings:
            work.report(line.number, finding)
        if not line.is_blank:
            scanned.num_records += 1
        if line.value is None:
            return
        scanned.formats[meant_format(line.value, self._context.formats) or ""] += 1
        findings: list[Finding] = []
        try:
            content = read_content(
                line.value,
                self._context.formats,
                findings,
                body_family=self._body_family,
                text_only=self._context.base is not None,
            )
        except Unusable as error:
            work.report(line.number, error.finding)
            return
        counted = self._count(content)
        scanned.num_no_label += counted.fills_limit
        if counted.finding is not None:
            work.report(line.number, counted.finding)
            return
        for finding in findings:
            work.report(line.number, finding)
        record = _texts(content)
        # What stands in its place by now would be taken for damage of another kind.
        had_surrogate = any(finding.code == "lone_surrogate" for finding in findings)
        if not content.is_opaque:
            for rule in RULES:
                found = rule(record)
                if found is not None and not (had_surrogate and found.code == "mojibake"):
                    work.report(line.number, found)
        work.add(line, content, record, counted)

    def _count(self, content: Content) -> tokens.Counted:
        """Count a record and hold it against the limits."""
        if self._limits is not None and content.messages:
            finding = tokens.character_quota(content.messages, self._limits)
            if finding is not None:
                return tokens.Counted(finding=finding)
        if self._renderer is None or self._limits is None:
            return tokens.Counted()
        if content.text is not None:
            tokenizer = self._renderer.tokenizer
            length = self._renderer.counter.count(content.text) + len(tokenizer.document_start) + 1
            return tokens.Counted(length)
        if not content.messages:
            return tokens.Counted()
        return tokens.count_record(content.messages, self._renderer, self._limits)

    def _finished(self, work: _Work) -> Scanned:
        scanned = work.scanned
        if len(work.lines):
            scanned.columns = work.columns()
            scanned.runs, scanned.run_ends = work.runs()
        return scanned


class _Work:
    """What is gathered while a chunk is looked at."""

    def __init__(self, scanned: Scanned, max_listed: int) -> None:
        self.scanned = scanned
        self._max_listed = max_listed
        self._num_listed: Counter[str] = Counter()
        self.lines: list[int] = []
        self._digests: list[bytes] = []
        self._words: list[str] = []
        self._completions: list[str] = []
        self._counted: list[tokens.Counted] = []
        self._num_characters: list[int] = []

    def report(self, line: int, finding: Finding) -> None:
        """Count a finding, and list it where not enough of its code are listed."""
        self.scanned.counts[finding.code, finding.severity] += 1
        if self._num_listed[finding.code] < self._max_listed:
            self._num_listed[finding.code] += 1
            self.scanned.listed.append((line, finding))

    def add(self, line: Line, content: Content, record: Texts, counted: tokens.Counted) -> None:
        """Take in a usable record."""
        completion = record.completion or ""
        self.lines.append(line.number)
        self._digests.append(_digest(content, line.value))
        self._words.append(normalized(record.prompt))
        self._completions.append(completion)
        self._counted.append(counted)
        self._num_characters.append(len(record.prompt) + len(completion))
        self._label(line.number, completion.strip())
        if len(self.scanned.samples) < SAMPLES_OF_CHUNK and record.prompt:
            self.scanned.samples.append((line.number, record.prompt[:MAX_SAMPLE_CHARACTERS]))

    def _label(self, line: int, completion: str) -> None:
        labels = self.scanned.labels
        # Of a script with capitals: elsewhere a character may be a word.
        if len(completion) == 1 and completion.lower() != completion.upper():
            self.scanned.letters.append((line, completion))
        if labels is None:
            return
        if len(completion) > MAX_LABEL_CHARACTERS or not completion or "\n" in completion:
            self.scanned.labels = None
            return
        labels[completion] += 1
        if len(labels) > MAX_LABELS:
            self.scanned.labels = None

    def columns(self) -> Columns:
        """Return the columns of all records that were added."""
        return Columns(
            file=np.zeros(len(self.lines), np.int32),
            line=np.array(self.lines, np.int64),
            content=np.frombuffer(b"".join(self._digests), np.uint64).reshape(-1, 2),
            prompt=_keys(self._words),
            completion=label_hashes(self._completions),
            num_characters=np.array(self._num_characters, np.uint32),
            num_input=np.array([counted.num_input for counted in self._counted], np.uint32),
            num_output=np.array([counted.num_output for counted in self._counted], np.uint32),
        )

    def runs(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the runs of words of all records that were added."""
        return shingles(self._words)


def _texts(content: Content) -> Texts:
    if content.text is not None:
        return Texts(content.text, None, is_document=True)
    *before, last = content.messages or (None,)
    if last is None:
        return Texts("", None)
    if last.role != "assistant":
        return Texts("\n".join(message.text for message in content.messages), None)
    if len(before) == 1:
        return Texts(before[0].text, last.text)
    return Texts("\n".join(message.text for message in before), last.text)


def _digest(content: Content, value: Mapping[str, Any] | None) -> bytes:
    """Return 16 bytes that stand for what a record says."""
    digest = hashlib.blake2b(digest_size=16)
    if content.text is not None:
        digest.update(content.text.encode())
    elif content.messages:
        for message in content.messages:
            text = message.text.encode()
            digest.update(f"{message.role} {len(text)} ".encode())
            digest.update(text)
    else:
        whole = json.dumps(value, sort_keys=True)
        digest.update(whole.encode())
    return digest.digest()


def _keys(words: Sequence[str]) -> NDArray[np.uint64]:
    """Hash normalized texts; 0 for those without words."""
    digests = b"".join(
        hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8)
        for text in words
    )
    return np.frombuffer(digests, np.uint64)
