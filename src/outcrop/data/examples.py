"""From a data file to rendered examples: the one way in for a job.

Puts reading, formats, limits and rendering in a row and stops at the first defect, which names the
file and the line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from outcrop.data.documents import render_document
from outcrop.data.formats import parse_document, parse_record
from outcrop.data.limits import TokenCheck, check_record_count
from outcrop.data.read import read_lines
from outcrop.data.records import Example, Record
from outcrop.data.render import Renderer
from outcrop.errors import DataError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, FINE_TUNING, BaseModel


@dataclass(frozen=True)
class Rendered:
    """What a data file became."""

    examples: list[Example]
    """In the order of the file."""
    num_records: int
    """Lines that are not blank. A document may be several examples."""


def read_examples(
    stream: BinaryIO,
    file: str,
    base: BaseModel,
    renderer: Renderer,
    *,
    role: str,
    batch_size: int,
    max_records: int = 0,
    customization_type: str = FINE_TUNING,
) -> Rendered:
    """Read and render every record of a file.

    Args:
        file: the file's name for messages.
        role: "training" or "validation"; decides the record quota.
        batch_size: decides the token limit.
        max_records: the operator's quota; 0 keeps that of the model's family.
        customization_type: decides the format: labelled records, or raw text.
    Raises:
        DataError: the first record that cannot be used, or one record too many.
        ModelError: raw text is wanted, and the model has no token that ends one.
    """
    limits = TokenCheck(base, batch_size)
    examples: list[Example] = []
    num_records = 0
    for line, value in read_lines(stream, file):
        num_records += 1
        check_record_count(base, role, num_records, max_records, file, customization_type)
        if customization_type == CONTINUED_PRE_TRAINING:
            document = parse_document(value, file, line)
            examples += render_document(document, renderer.tokenizer, limits.longest_piece)
            continue
        record = parse_record(value, base.data_formats, file, line, body_family=base.body_family)
        examples.append(render_record(record, renderer, limits))
    return Rendered(examples, num_records)


def render_record(record: Record, renderer: Renderer, limits: TokenCheck) -> Example:
    """Render one record and check its length, first in characters, then in tokens.

    Raises:
        DataError: it is too long, or the model's template cannot show it; with file and line.
    """
    limits.check_characters(record.messages, record.file, record.line)
    try:
        example = renderer.render_example(record.messages)
    except DataError as error:
        raise DataError(
            f"{record.file}, line {record.line}: {error.message}",
            code=error.code,
            file=record.file,
            line=record.line,
        ) from error
    num_input = _answer_start(example)
    limits.check(num_input, len(example.input_ids) - num_input, record.file, record.line)
    return example


def _answer_start(example: Example) -> int:
    """Return where the last answer begins: all before it is the prompt."""
    place = len(example.loss_mask)
    while place and not example.loss_mask[place - 1]:
        place -= 1
    while place and example.loss_mask[place - 1]:
        place -= 1
    return place
