"""How many records a job may have and how long one may be.

The numbers are Bedrock's, from the catalogue; a token limit in force is the lesser of Bedrock's and
what the real model was made for, and the message names both. An operator's setting replaces a
record quota.

Source: the error texts in the Bedrock user guide, "Troubleshoot model customization".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outcrop.data.read import quoted
from outcrop.data.records import Message
from outcrop.errors import DataError
from outcrop.models.catalog import FINE_TUNING, BaseModel

TRAINING, VALIDATION = "training", "validation"

CHARACTERS_PER_TOKEN = 6
"""Bedrock's quota of characters, for each token of a limit. Source: Bedrock user guide, quotas."""


def record_quota(
    base: BaseModel, role: str, setting: int, customization_type: str = FINE_TUNING
) -> int | None:
    """Return how many records a file may hold; None means as many as there are.

    Args:
        role: "training" or "validation".
        setting: the operator's number; 0 keeps the family's.
        customization_type: the job's.
    """
    if setting:
        return setting
    records = base.record_quota(customization_type)
    quota = records.max_training if role == TRAINING else records.max_validation
    return quota if quota is not None else records.max_total


def check_record_count(
    base: BaseModel,
    role: str,
    count: int,
    setting: int,
    file: str,
    customization_type: str = FINE_TUNING,
) -> None:
    """Refuse one record too many.

    Raises:
        DataError: `count` is above the quota.
    """
    quota = record_quota(base, role, setting, customization_type)
    if quota is not None and count > quota:
        whose = "This server takes" if setting else f"{base.model_id} takes"
        raise DataError(
            f"{file} holds more than {quota:,} records. {whose} at most {quota:,} {role} records "
            f"in a job; the setting max_{role}_records changes that.",
            code="too_many_records",
            file=file,
            line=None,
        )


def check_total_records(
    base: BaseModel,
    num_training: int,
    num_validation: int,
    customization_type: str = FINE_TUNING,
) -> None:
    """Refuse a job whose files are within their quotas but too many together.

    For use where the operator has set neither quota.

    Raises:
        DataError: the sum is above the family's.
    """
    quota = base.record_quota(customization_type).max_total
    if quota is not None and num_training + num_validation > quota:
        raise DataError(
            f"The job has {num_training:,} training and {num_validation:,} validation records. "
            f"{base.model_id} takes at most {quota:,} together; the settings max_training_records "
            "and max_validation_records change that.",
            code="too_many_records",
            file="",
        )


@dataclass(frozen=True)
class Exceeded:
    """A limit that a record is too long for."""

    count: int
    """Tokens that it has, of the kind that is limited."""
    sentence: str
    """AWS's, with the numbers."""
    source: str
    """Where the limit comes from: Bedrock's and the real model's; it begins in lower case."""

    @property
    def message(self) -> str:
        """Both, as two sentences."""
        return f"{self.sentence} T{self.source[1:]}"


@dataclass(frozen=True)
class TokenCheck:
    """The limits of one model at one batch size."""

    base: BaseModel
    batch_size: int

    @property
    def longest_piece(self) -> int:
        """Tokens of the longest piece that a document is cut into.

        Bedrock counts a document's tokens as those of a record's input and output together.
        """
        bedrock = self.base.token_limit(self.batch_size)
        context = self.base.context_tokens
        return min(context, (bedrock.total if bedrock else None) or context)

    @property
    def max_characters(self) -> int | None:
        """Characters that Bedrock takes for a record; None where it documents no limit."""
        bedrock = self.base.token_limit(self.batch_size)
        if bedrock is None:
            return None
        both = (bedrock.input or 0) + (bedrock.output or 0)
        return CHARACTERS_PER_TOKEN * (bedrock.total or both) or None

    def characters_exceeded(self, count: int) -> str:
        """Return what is said of a record of too many characters."""
        return (
            f"It has {count:,} characters. {self.base.model_id} takes {self.max_characters:,} at "
            f"batch size {self.batch_size}: {CHARACTERS_PER_TOKEN} for each token of its limit."
        )

    def check_characters(self, messages: Sequence[Message], file: str, line: int) -> None:
        """Refuse a record of more characters than Bedrock takes.

        Raises:
            DataError: it has more.
        """
        quota = self.max_characters
        count = sum(len(message.text) for message in messages)
        if quota is not None and count > quota:
            raise DataError(
                f"Input size exceeded in file {file} for record starting with "
                f"{quoted(messages[0].text)}. Line {line}: {self.characters_exceeded(count)}",
                code="too_long",
                file=file,
                line=line,
            )

    def exceeded(self, num_input: int, num_output: int) -> Exceeded | None:
        """Return the first limit that a record is too long for, or None.

        Args:
            num_input: tokens of the prompt as it is rendered.
            num_output: tokens that come after it.
        """
        bedrock = self.base.token_limit(self.batch_size)
        context = self.base.context_tokens
        counts = (
            ("input", num_input, bedrock.input if bedrock else None),
            ("output", num_output, bedrock.output if bedrock else None),
            ("total", num_input + num_output, bedrock.total if bedrock else None),
        )
        for name, count, documented in counts:
            limit = min(context, documented or context)
            if count > limit:
                return Exceeded(
                    count,
                    _exceeded(name, count, limit),
                    f"the limit of {self.base.model_id} at batch size {self.batch_size} is "
                    f"{f'{documented:,}' if documented else 'not documented'}, the context of "
                    f"{self.base.full_name} is {context:,} tokens.",
                )
        return None

    def check(self, num_input: int, num_output: int, file: str, line: int) -> None:
        """Refuse a record that is too long.

        Args:
            num_input: tokens of the prompt as it is rendered.
            num_output: tokens that come after it.
        Raises:
            DataError: a limit is exceeded; the message names Bedrock's and the real model's.
        """
        exceeded = self.exceeded(num_input, num_output)
        if exceeded is not None:
            message = f"{exceeded.sentence} {file}, line {line}: {exceeded.source}"
            raise DataError(message, code="too_long", file=file, line=line)


def _exceeded(name: str, count: int, limit: int) -> str:
    """Return AWS's sentence."""
    if name == "total":
        return f"Max sum of input and output token length {count} exceeds total limit of {limit}."
    return f"Maximum {name} token count {count} exceeds limit of {limit}."
