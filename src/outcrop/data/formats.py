"""Know the format of one line's object, and turn it into a record of messages, or a document.

Formats are named as in the catalogue: `prompt-completion`, `conversation` (Converse),
`claude-messages`, and `continued-pre-training` for documents; further ones are known for what they
are and can be checked, but not trained on. A line in a format that is not taken is refused under
its own name. What each format demands is in `schemas.py`.

Source: Bedrock user guide, "Prepare data for fine-tuning"; its error texts come first in messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outcrop.data.defects import Finding, Unusable
from outcrop.data.records import Document, Record
from outcrop.data.schemas import LOG_TYPE, Content, Reader, wrong_keys
from outcrop.errors import DataError
from outcrop.models.catalog import CONTINUED_PRE_TRAINING, DOCUMENTS, FINE_TUNING, BaseModel

PROMPT_COMPLETION = "prompt-completion"
CONVERSATION = "conversation"
CLAUDE_MESSAGES = "claude-messages"
IMAGE_CAPTION = "image-caption"
DISTILLATION_PROMPTS = "distillation-prompts"
REINFORCEMENT = "reinforcement"
EVALUATION_PROMPTS = "evaluation-prompts"
BATCH_RECORDS = "batch-records"
INVOCATION_LOGS = "invocation-logs"

DISTILLATION, REINFORCEMENT_FINE_TUNING = "DISTILLATION", "REINFORCEMENT_FINE_TUNING"
EVALUATION, BATCH_INFERENCE = "EVALUATION", "BATCH_INFERENCE"
"""What data is for besides fine-tuning and continued pre-training. The first two are Bedrock's
customization types; the last two are names of our own for other kinds of job."""

DATA_KINDS: Mapping[str, tuple[str, ...]] = {
    FINE_TUNING: (PROMPT_COMPLETION, CONVERSATION, CLAUDE_MESSAGES, IMAGE_CAPTION),
    CONTINUED_PRE_TRAINING: (DOCUMENTS,),
    DISTILLATION: (DISTILLATION_PROMPTS, INVOCATION_LOGS),
    REINFORCEMENT_FINE_TUNING: (REINFORCEMENT, INVOCATION_LOGS),
    EVALUATION: (EVALUATION_PROMPTS,),
    BATCH_INFERENCE: (BATCH_RECORDS,),
}
"""What data may be for, and the formats of it; a model takes some of those for fine-tuning."""

FORMS: Mapping[str, str] = {
    PROMPT_COMPLETION: '{"prompt": "<input text>", "completion": "<output text>"}',
    CONVERSATION: (
        '{"schemaVersion": "bedrock-conversation-2024", "system": [{"text": "..."}], "messages": '
        '[{"role": "user", "content": [{"text": "..."}]}, '
        '{"role": "assistant", "content": [{"text": "..."}]}]}'
    ),
    CLAUDE_MESSAGES: (
        '{"system": "...", "messages": [{"role": "user", "content": "..."}, '
        '{"role": "assistant", "content": "..."}]}'
    ),
    DOCUMENTS: '{"input": "<raw text>"}',
    IMAGE_CAPTION: '{"image-ref": "s3://bucket/image.png", "caption": "..."}',
    DISTILLATION_PROMPTS: (
        '{"schemaVersion": "bedrock-conversation-2024", "messages": '
        '[{"role": "user", "content": [{"text": "..."}]}]}'
    ),
    REINFORCEMENT: '{"messages": [{"role": "user", "content": "..."}], "reference_answer": ...}',
    EVALUATION_PROMPTS: '{"prompt": "...", "referenceResponse": "...", "category": "..."}',
    BATCH_RECORDS: '{"recordId": "...", "modelInput": {...}}',
    INVOCATION_LOGS: (
        '{"schemaType": "ModelInvocationLog", "modelId": "...", "operation": "...", '
        '"input": {"inputBodyJson": {...}}, "output": {"outputBodyJson": {...}}}'
    ),
}
"""How a line of each format is written."""

NAMES: Mapping[str, str] = {
    PROMPT_COMPLETION: "a prompt/completion record",
    CONVERSATION: "a Converse conversation",
    CLAUDE_MESSAGES: "a Claude conversation",
    DOCUMENTS: "continued pre-training data",
    IMAGE_CAPTION: "image-caption data",
    DISTILLATION_PROMPTS: "a prompt for distillation",
    REINFORCEMENT: "reinforcement fine-tuning data in OpenAI's chat form",
    EVALUATION_PROMPTS: "evaluation data",
    BATCH_RECORDS: "a record of batch inference",
    INVOCATION_LOGS: "a record of invocation logging",
}
"""What "This looks like ..." is followed by."""


def formats_for(base: BaseModel | None, customization_type: str) -> tuple[str, ...]:
    """Return the formats that data may have, the preferred first.

    Args:
        base: the model; None takes what any model does.
        customization_type: one of DATA_KINDS.
    Raises:
        DataError: there is no such type.
    """
    if customization_type not in DATA_KINDS:
        raise DataError(
            f"{customization_type} is not known. Data is for one of {', '.join(DATA_KINDS)}.",
            code="wrong_customization_type",
            file="",
        )
    if base is not None and customization_type in (FINE_TUNING, CONTINUED_PRE_TRAINING):
        return base.formats(customization_type)
    return DATA_KINDS[customization_type]


def recognize(value: Mapping[str, Any]) -> str | None:
    """Return the format that an object is meant in, by its keys; None where they tell nothing."""
    keys = value.keys()
    if "prompt" in keys:
        is_evaluation = {"referenceResponse", "category", "modelResponses"} & keys
        return (
            EVALUATION_PROMPTS if is_evaluation and "completion" not in keys else PROMPT_COMPLETION
        )
    if "completion" in keys:
        return PROMPT_COMPLETION
    if "messages" in keys:
        return _recognize_messages(value)
    if "schemaType" in keys or {"modelId", "operation"} <= keys:
        return INVOCATION_LOGS if value.get("schemaType", LOG_TYPE) == LOG_TYPE else None
    if "schemaVersion" in keys or {"role", "content"} <= keys:
        return CONVERSATION
    if {"recordId", "modelInput"} & keys:
        return BATCH_RECORDS
    if "input" in keys:
        return DOCUMENTS
    if "image-ref" in keys:
        return IMAGE_CAPTION
    return None


def _recognize_messages(value: Mapping[str, Any]) -> str:
    if "schemaVersion" in value or isinstance(value.get("system"), list):
        return CONVERSATION
    if "reference_answer" in value:
        return REINFORCEMENT
    messages = value["messages"]
    first = messages[0] if isinstance(messages, list) and messages else None
    content = first.get("content") if isinstance(first, dict) else None
    return CONVERSATION if isinstance(content, list) else CLAUDE_MESSAGES


_ALSO: Mapping[str, tuple[str, ...]] = {
    PROMPT_COMPLETION: (EVALUATION_PROMPTS,),
    CONVERSATION: (DISTILLATION_PROMPTS,),
    CLAUDE_MESSAGES: (REINFORCEMENT,),
}
"""What keys may also mean where only the other format is taken."""

_READERS: Mapping[str, Callable[[Reader, Mapping[str, Any]], Content]] = {
    PROMPT_COMPLETION: Reader.pair,
    CONVERSATION: Reader.conversation,
    CLAUDE_MESSAGES: Reader.claude,
    DOCUMENTS: Reader.document,
    IMAGE_CAPTION: Reader.image_caption,
    DISTILLATION_PROMPTS: lambda reader, value: reader.conversation(value, answer_needed=False),
    REINFORCEMENT: Reader.reinforcement,
    EVALUATION_PROMPTS: Reader.evaluation,
    BATCH_RECORDS: Reader.batch,
    INVOCATION_LOGS: Reader.invocation_log,
}


def meant_format(value: Mapping[str, Any], formats: Sequence[str]) -> str | None:
    """Return the format that an object is meant in; where its keys fit two, one of `formats`."""
    found = recognize(value)
    if found is None or found in formats:
        return found
    return next((other for other in _ALSO.get(found, ()) if other in formats), found)


def read_content(
    value: Mapping[str, Any],
    formats: Sequence[str],
    findings: list[Finding],
    *,
    body_family: str = "",
    text_only: bool = True,
) -> Content:
    """Understand one line.

    Args:
        formats: those that are taken, the preferred first; at least one.
        findings: what is wrong and can be lived with is added here.
        body_family: whose mark-up a prompt may be written in, as in `markup.parse_prompt`.
        text_only: whether an image cannot be used.
    Raises:
        Unusable: the line is in another format or breaks a rule of its own.
    """
    found = meant_format(value, formats)
    if found is None:
        raise wrong_keys(value)
    if found not in formats:
        raise Unusable(
            "mixed_schema", f"This looks like {NAMES[found]}.{_hint(found, formats)}", NAMES[found]
        )
    reader = Reader(findings, body_family=body_family, text_only=text_only)
    return _READERS[found](reader, value)


def _hint(found: str, formats: Sequence[str]) -> str:
    """Return where a record of another format belongs, with a space before it."""
    if found == DOCUMENTS:
        return f" Raw text is for jobs of customizationType {CONTINUED_PRE_TRAINING}."
    if DOCUMENTS in formats and found in DATA_KINDS[FINE_TUNING]:
        return f" Labelled records are for jobs of customizationType {FINE_TUNING}."
    return ""


def parse_record(
    value: Mapping[str, Any],
    formats: Sequence[str],
    file: str,
    line: int,
    *,
    body_family: str = "",
) -> Record:
    """Understand one line of labelled data, as a job does: what can be lived with is let pass.

    Args:
        formats: those the model takes, the preferred first; at least one.
        body_family: whose mark-up a prompt may be written in, as in `markup.parse_prompt`.
    Raises:
        DataError: the line is in another format or breaks a rule of its own.
    """
    content = _strict(value, formats, file, line, body_family)
    return Record(content.messages, file, line)


def parse_document(value: Mapping[str, Any], file: str, line: int) -> Document:
    """Understand one line of raw text.

    Raises:
        DataError: the line is in another format or breaks a rule of its own.
    """
    content = _strict(value, (DOCUMENTS,), file, line, "")
    assert content.text is not None
    return Document(content.text, file, line)


def _strict(
    value: Mapping[str, Any], formats: Sequence[str], file: str, line: int, body_family: str
) -> Content:
    try:
        return read_content(value, formats, [], body_family=body_family)
    except Unusable as error:
        raise record_error(error.finding, value, formats, file, line) from None


def record_error(
    finding: Finding, value: Mapping[str, Any], formats: Sequence[str], file: str, line: int
) -> DataError:
    """Return what a job fails with because of a record that cannot be used."""
    found = meant_format(value, formats)
    form = FORMS[found if found is not None and found in formats else formats[0]]
    return DataError(
        f"Input data at {file} must follow '{form}' format. Line {line}: {finding.message}",
        code=finding.code,
        file=file,
        line=line,
    )
