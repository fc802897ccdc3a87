"""Rules about length: what a record may have, and what is far from the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from outcrop.data.defects import Finding, Severity
from outcrop.data.limits import TokenCheck
from outcrop.data.read import quoted
from outcrop.data.records import Message
from outcrop.data.render import Renderer
from outcrop.errors import DataError

MIN_RECORDS = 50
"""With fewer, no length is far from the others."""
OUTLIER_DEVIATIONS = 8.0
OUTLIER_TIMES = 8.0
"""A length is an outlier where it is so many times the median, and so many deviations (of the
logarithms, by their median) above it."""
MAX_OUTLIERS = 2
MAX_OUTLIER_SHARE = 0.005
"""Where more records are so long, they are another kind of record and no outliers."""


@dataclass(frozen=True)
class Counted:
    """How long one record is."""

    num_input: int = 0
    num_output: int = 0
    finding: Finding | None = None
    """Why it cannot be used."""
    fills_limit: bool = False
    """Whether it is too long and its prompt alone fills the limit."""


def character_quota(messages: tuple[Message, ...], limits: TokenCheck) -> Finding | None:
    """More characters than Bedrock takes for a record, whatever its tokens."""
    quota = limits.max_characters
    count = sum(len(message.text) for message in messages)
    if quota is None or count <= quota:
        return None
    start = quoted(messages[0].text)
    message = limits.characters_exceeded(count)
    return Finding("too_long", Severity.REJECT, message, start)


def count_record(messages: tuple[Message, ...], renderer: Renderer, limits: TokenCheck) -> Counted:
    """Count a record's tokens as they are rendered, and hold them against the limits."""
    try:
        if messages[-1].role == "assistant":
            num_input, num_output = renderer.count_example(messages)
        else:
            num_input, num_output = len(renderer.render_prompt(messages)), 0
    except DataError as error:
        return Counted(finding=Finding(error.code, Severity.REJECT, error.message))
    exceeded = limits.exceeded(num_input, num_output)
    if exceeded is None:
        return Counted(num_input, num_output)
    fills_limit = num_input >= limits.longest_piece
    message = exceeded.message
    if fills_limit:
        message += (
            " The prompt alone fills the limit: cut there, nothing of the completion would be left "
            "to learn."
        )
    finding = Finding("too_long", Severity.REJECT, message, f"{exceeded.count:,} tokens")
    return Counted(num_input, num_output, finding, fills_limit)


def outliers(lengths: NDArray[np.uint32]) -> tuple[NDArray[np.int64], float]:
    """Return the places of lengths that are far above the others, and the median."""
    if len(lengths) < MIN_RECORDS:
        return np.empty(0, np.int64), 0.0
    logs = np.log(np.maximum(lengths, 1))
    middle = float(np.median(logs))
    # 1.4826 makes of a median deviation what a standard deviation is for a normal distribution.
    deviation = 1.4826 * float(np.median(np.abs(logs - middle)))
    bound = middle + max(OUTLIER_DEVIATIONS * deviation, float(np.log(OUTLIER_TIMES)))
    found = np.flatnonzero(logs > bound)
    if len(found) > max(MAX_OUTLIERS, MAX_OUTLIER_SHARE * len(lengths)):
        found = found[:0]
    return found, float(np.exp(middle))
