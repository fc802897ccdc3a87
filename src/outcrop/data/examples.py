"""From a data file to rendered examples: the one way in for a job.

Puts reading, formats, limits and rendering in a row and stops at the first defect, which names the
file and the line.
"""

from __future__ import annotations

from typing import BinaryIO

from outcrop.data.formats import parse_record
from outcrop.data.limits import TokenCheck, check_record_count
from outcrop.data.read import read_lines
from outcrop.data.records import Example, Record
from outcrop.data.render import Renderer
from outcrop.errors import DataError
from outcrop.models.catalog import BaseModel


def read_examples(
    stream: BinaryIO,
    file: str,
    base: BaseModel,
    renderer: Renderer,
    *,
    role: str,
    batch_size: int,
    max_records: int = 0,
) -> list[Example]:
    """Read and render every record of a file.

    Args:
        file: the file's name for messages.
        role: "training" or "validation"; decides the record quota.
        batch_size: decides the token limit.
        max_records: the operator's quota; 0 keeps that of the model's family.
    Raises:
        DataError: the first record that cannot be used, or one record too many.
    """
    limits = TokenCheck(base, batch_size)
    examples: list[Example] = []
    for line, value in read_lines(stream, file):
        check_record_count(base, role, len(examples) + 1, max_records, file)
        record = parse_record(value, base.data_formats, file, line, body_family=base.body_family)
        examples.append(render_record(record, renderer, limits))
    return examples


def render_record(record: Record, renderer: Renderer, limits: TokenCheck) -> Example:
    """Render one record and check its length.

    Raises:
        DataError: it is too long, or the model's template cannot show it; with file and line.
    """
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
