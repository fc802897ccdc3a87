"""Check data files: every rule over every record, and what the records are like.

One call reads all files of a job once, in order, and answers with a `Check`. Nothing is changed.
What needs one record only is done chunk by chunk (`scanning.py`), in several processes where the
files are large; what needs all of them is done here, afterwards.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from outcrop.data.defects import Finding, Severity
from outcrop.data.facts import (
    MAX_LISTED,
    ROLES,
    TEST,
    TRAINING,
    VALIDATION,
    Check,
    DataFile,
    FileFacts,
    Histogram,
    LabelStatistics,
    Lengths,
    TokenStatistics,
)
from outcrop.data.findings import Findings
from outcrop.data.formats import DATA_KINDS, formats_for, recognize
from outcrop.data.near import DEFAULT_THRESHOLD, NearIndex
from outcrop.data.pool import scan_in_order
from outcrop.data.read import Chunk, LineParser, split_chunks
from outcrop.data.render import Renderer
from outcrop.data.scanning import Context, Scanned
from outcrop.data.summary import Gathered, summarize
from outcrop.errors import DataError
from outcrop.models.catalog import FINE_TUNING, BaseModel

__all__ = [
    "MAX_LISTED",
    "ROLES",
    "TEST",
    "TRAINING",
    "VALIDATION",
    "Check",
    "DataFile",
    "FileFacts",
    "Histogram",
    "LabelStatistics",
    "Lengths",
    "TokenStatistics",
    "check_files",
]

_HEAD_CHUNKS = 8
"""Chunks that are read before it is decided how to go on. What fits into them is checked here:
other processes need longer to start."""


def check_files(
    files: Sequence[DataFile],
    *,
    base: BaseModel | None = None,
    customization_type: str = FINE_TUNING,
    batch_size: int = 1,
    renderer: Renderer | None = None,
    hyper_parameters: Mapping[str, str] | None = None,
    max_training_records: int = 0,
    max_validation_records: int = 0,
    near_threshold: float = DEFAULT_THRESHOLD,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Check:
    """Check the files of one job together.

    A file that cannot be read, is packed and broken, or changes meanwhile is a defect of that file.

    Args:
        files: at least one; a leak is looked for from training into validation and test files, and
            from validation into test files.
        base: the model they are for; None checks what holds for any, and takes the format that most
            records at the beginning have.
        customization_type: a job's, or one of `formats.DATA_KINDS`.
        batch_size: decides the token limit.
        renderer: counts tokens; without one, only characters are held against the limit.
        hyper_parameters: a job's, as strings; only advice follows from them.
        max_training_records, max_validation_records: the operator's quotas; 0 keeps the family's.
        near_threshold: share of their runs of words, `near.MIN_THRESHOLD` to 1, that near
            duplicates have in common.
        workers: processes beside this one; None takes what the size of the files and the cores
            suggest, 0 checks in this process.
        progress: called with the bytes read so far, of all files.
    Raises:
        DataError: there is no such customization type.
        SettingsError: the threshold is out of bounds.
        ModelError: the model's tokenizer cannot be used.
        ObjectStoreError: a file lies in S3, and it or the store went away.
    """
    began = time.monotonic()
    files = sorted(files, key=lambda file: ROLES.index(file.role))
    formats = formats_for(base, customization_type)
    findings = Findings([file.name for file in files])
    states = [_FileState() for _ in files]
    chunks = _chunks(files, states, findings, progress)
    head = list(itertools.islice(chunks, _HEAD_CHUNKS))
    if base is None:
        formats = _found_formats(head, customization_type, formats)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if len(head) == _HEAD_CHUNKS else 0
    context = Context(
        formats, base, batch_size, renderer.folder if renderer and base else None, MAX_LISTED
    )
    with NearIndex(near_threshold) as index:
        gathered = Gathered(index)
        for number, scanned in _scan(itertools.chain(head, chunks), context, workers, renderer):
            _take_in(number, scanned, states[number], findings, gathered)
        for number, state in enumerate(states):
            if not state.num_records and not state.is_broken:
                findings.add(number, None, _EMPTY)
        settings = {TRAINING: max_training_records, VALIDATION: max_validation_records}
        return summarize(
            files=files,
            facts=[state.facts(file) for file, state in zip(files, states, strict=True)],
            findings=findings,
            gathered=gathered,
            base=base,
            customization_type=customization_type,
            batch_size=batch_size,
            hyper_parameters=hyper_parameters or {},
            quotas=settings,
            began=began,
        )


_EMPTY = Finding("empty_file", Severity.REJECT, "The file holds no record.")


@dataclass
class _FileState:
    """What is known of a file so far."""

    digest: str = ""
    num_bytes: int = 0
    num_lines: int = 0
    num_records: int = 0
    num_usable: int = 0
    num_characters: int = 0
    is_broken: bool = False
    formats: Counter[str] = field(default_factory=Counter)

    def facts(self, file: DataFile) -> FileFacts:
        formats = dict(self.formats.most_common())
        return FileFacts(
            name=file.name,
            role=file.role,
            digest=self.digest,
            num_bytes=self.num_bytes,
            num_lines=self.num_lines,
            num_records=self.num_records,
            num_usable=self.num_usable,
            format=next((name for name in formats if name), ""),
            formats=formats,
            num_characters=self.num_characters,
        )


class _Counting:
    """Passes a stream on, takes its digest and counts its bytes."""

    def __init__(self, stream: BinaryIO, file: DataFile, report: Callable[[int], None]) -> None:
        self._stream, self._file, self._report = stream, file, report
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        self.num_bytes += len(block)
        expected = self._file.num_bytes
        if expected is not None and self.num_bytes > expected:
            # Here and not at the end: what is written to without end is read without end.
            raise DataError(
                f"{self._file.name} grew while it was read: it had {expected:,} bytes. Check it "
                "again when nothing writes to it.",
                code="changed_while_read",
                file=self._file.name,
            )
        self._report(len(block))
        return block


def _chunks(
    files: Sequence[DataFile],
    states: Sequence[_FileState],
    findings: Findings,
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[int, Chunk]]:
    """Yield (file number, chunk); what is wrong with a file as a whole is a finding."""
    total = 0

    def report(num_bytes: int) -> None:
        nonlocal total
        total += num_bytes
        if progress:
            progress(total)

    for number, file in enumerate(files):
        try:
            with file.open() as stream:
                counting = _Counting(stream, file, report)
                try:
                    for chunk in split_chunks(cast(BinaryIO, counting), file.name):
                        yield number, chunk
                    while counting.read(1 << 20):  # what is packed may be followed by something
                        pass
                finally:
                    states[number].num_bytes = counting.num_bytes
                    states[number].digest = counting.digest.hexdigest()
        except DataError as error:
            states[number].is_broken = True
            findings.add(number, None, Finding(error.code, Severity.REJECT, error.message))


def _found_formats(
    head: Iterable[tuple[int, Chunk]], customization_type: str, formats: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the format that most records at the beginning of the first file have."""
    parser = LineParser()
    counts: Counter[str] = Counter()
    for number, chunk in head:
        if number == 0:
            for line in parser.chunk(chunk):
                found = None if line.value is None else recognize(line.value)
                if found is not None:
                    counts[found] += 1
        if counts.total() > 1000:
            break
    known = DATA_KINDS[customization_type]
    return next(((name,) for name, _ in counts.most_common() if name in known), formats)


def _scan(
    chunks: Iterable[tuple[int, Chunk]],
    context: Context,
    workers: int,
    renderer: Renderer | None,
) -> Iterator[tuple[int, Scanned]]:
    """Yield (file number, what became of a chunk), in order."""
    numbers: deque[int] = deque()

    def bare() -> Iterator[Chunk]:
        for number, chunk in chunks:
            numbers.append(number)
            yield chunk

    for scanned in scan_in_order(bare(), context, workers, renderer):
        yield numbers.popleft(), scanned


def _take_in(
    number: int, scanned: Scanned, state: _FileState, findings: Findings, gathered: Gathered
) -> None:
    state.num_lines += scanned.num_lines
    state.num_records += scanned.num_records
    state.formats += scanned.formats
    if scanned.columns is not None:
        state.num_usable += len(scanned.columns)
        state.num_characters += int(scanned.columns.num_characters.sum())
    findings.add_all(number, scanned.counts, scanned.listed)
    gathered.add(number, scanned)
