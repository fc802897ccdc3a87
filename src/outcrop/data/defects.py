"""What the checks of data find: a stable code, how grave it is, where it stands, and what to do.

A code is one word and never changes its meaning: programs, reports and documentation name it.
KINDS is the list of all codes; `docs/data-defects.md` has a section for each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

MAX_SHOWN_CHARACTERS = 80
"""Of somebody's data that a message or a report quotes, at most."""


class Severity(StrEnum):
    """What becomes of a record with a defect; the gravest first."""

    REJECT = "reject"
    """It cannot be trained on. In a job it ends the job."""
    DROP = "drop"
    """It should be left out: another record says the same, or a test record does."""
    REPAIR = "repair"
    """Cleaning can mend it."""
    REVIEW = "review"
    """A person or a policy decides."""
    SKIP = "skip"
    """No record stands there; the line is passed over."""
    ADVICE = "advice"
    """Says something about the data as a whole; never a reason to refuse."""


SEVERITIES = tuple(Severity)
"""From the gravest to the mildest."""


@dataclass(frozen=True)
class DefectKind:
    """One code: what it means, wherever it is found."""

    code: str
    severity: Severity
    """The usual one; a defect may have another where its message says why."""
    summary: str
    """What is wrong, in one sentence."""
    remedy: str
    """What to do, in one sentence."""


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    file: str
    """As its owner named it, such as `s3://bucket/train.jsonl`."""
    line: int | None
    """Counts from 1; None where the file as a whole is meant."""


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong, or worth a look."""

    code: str
    severity: Severity
    place: Place
    message: str
    """For the owner: what, which value, what is allowed, what to do; without file and line."""
    value: str = ""
    """The data in question, at most MAX_SHOWN_CHARACTERS."""
    twin: Place | None = None
    """The record that this one repeats or contradicts: an earlier one, or one of another file."""


class Finding(NamedTuple):
    """A defect of the line at hand, before file and line are put to it."""

    code: str
    severity: Severity
    message: str
    value: str = ""

    def at(self, file: str, line: int | None, twin: Place | None = None) -> Defect:
        """Return the defect at a place."""
        return Defect(self.code, self.severity, Place(file, line), self.message, self.value, twin)


class Unusable(Exception):
    """A line cannot be used; `finding` says why."""

    def __init__(self, code: str, message: str, value: str = "") -> None:
        super().__init__(message)
        self.finding = Finding(code, Severity.REJECT, message, value)


def shown(text: str) -> str:
    """Return a text of somebody's data, cut and fit for one line of a report."""
    # `ascii` would hide what a Japanese text says; what cannot be printed is escaped.
    head = text[:MAX_SHOWN_CHARACTERS]
    safe = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in head
    )
    return safe[:MAX_SHOWN_CHARACTERS]


def _kinds(severity: Severity, *rows: tuple[str, str, str]) -> list[DefectKind]:
    return [DefectKind(code, severity, summary, remedy) for code, summary, remedy in rows]


_CONVERT = "Write the record in the format named, or choose the customization type that takes it."

_ALL = (
    *_kinds(
        Severity.REJECT,
        ("empty_file", "The file holds no record.", "Name the file that has the records."),
        (
            "unreadable_file",
            "The file cannot be read: it is not there, is a directory, or may not be read.",
            "Name a file that can be read.",
        ),
        (
            "invalid_gzip",
            "The file begins as gzip and cannot be unpacked to its end.",
            "Upload it again, or upload it unpacked.",
        ),
        (
            "invalid_json",
            "The line is not one JSON value: cut off, two values, single quotes, a comment, CSV, "
            "an object spread over several lines, nesting without end.",
            "Write each record as one JSON object on one line, with a JSON library.",
        ),
        (
            "invalid_utf8",
            "The line holds bytes that are not UTF-8.",
            "Write the file in UTF-8; such bytes are mostly Latin-1, Shift-JIS or EUC-JP, or a "
            "character cut in two.",
        ),
        (
            "null_byte",
            "The line holds a raw NUL byte; or (repair) a text holds the escaped character.",
            "Take it out; it mostly comes from a wrong encoding or a damaged file.",
        ),
        ("not_an_object", "The line is JSON, but no object.", "Write an object with the keys."),
        (
            "mixed_schema",
            "The record is of another format than the file's, or of two at once.",
            _CONVERT,
        ),
        ("wrong_keys", "The object has none of the keys of a known format.", _CONVERT),
        ("missing_prompt", "A pair has no prompt.", "Add it."),
        ("missing_completion", "A pair has no completion.", "Add it."),
        ("missing_caption", "An image has no caption.", "Add it."),
        ("missing_model_input", "A record of a batch has no modelInput.", "Add it."),
        (
            "missing_schema_version",
            "A conversation has no schemaVersion.",
            'Add "schemaVersion": "bedrock-conversation-2024".',
        ),
        (
            "bad_schema_version",
            "schemaVersion is not bedrock-conversation-2024.",
            "Write exactly that.",
        ),
        ("missing_messages", "A conversation has no messages.", "Add them."),
        ("empty_messages", "messages is empty.", "Add the turns, or leave the record out."),
        ("missing_role", "A turn has no role.", "Add user or assistant."),
        ("bad_role", "A turn's role is not one that the format has.", "Use user and assistant."),
        ("missing_content", "A turn has no content.", "Add it."),
        (
            "role_order",
            "Turns do not go user, assistant, user, ... to the assistant's.",
            "Join turns of one side; begin with the user's; end with the answer to be learnt.",
        ),
        ("empty_prompt", "The prompt shows nothing.", "Fill it, or leave the record out."),
        ("empty_completion", "The completion shows nothing.", "Fill it, or leave the record out."),
        ("empty_input", "The text shows nothing.", "Fill it, or leave the record out."),
        ("empty_content", "A turn shows nothing.", "Fill it, or leave the record out."),
        ("wrong_type", "A value has another JSON type than its key demands.", "Correct it."),
        (
            "unsupported_block",
            "A content block is not text; a person decides (review) while no model is named.",
            "Choose a model that takes it, or take the block out.",
        ),
        ("bad_image", "An image reference is not what the format demands.", "Correct it."),
        (
            "too_long",
            "The record is longer than the model takes at this batch size, or the line than any.",
            "Shorten or split it, use a smaller batch size, or a model with a longer context.",
        ),
        (
            "refused_by_template",
            "The model's chat template refuses the turns.",
            "Use the roles and the order that the model was made for.",
        ),
        (
            "too_many_records",
            "The file, or all files together, hold more records than a job may.",
            "Take fewer, or have the operator raise the quota.",
        ),
        (
            "changed_while_read",
            "The file changed, or went away, while it was read.",
            "Check it again when nothing writes to it.",
        ),
    ),
    *_kinds(
        Severity.DROP,
        (
            "exact_duplicate",
            "An earlier record has the same content, whatever the order of its keys.",
            "Leave it out: a record that stands twice counts twice.",
        ),
        (
            "near_duplicate",
            "An earlier record says nearly the same: other case, spaces, signs, a word more.",
            "Leave it out, or raise the threshold.",
        ),
        (
            "test_leak",
            "The record, or nearly the same, is in the test file.",
            "Take it out of the training data: the test would only measure memory.",
        ),
        (
            "validation_leak",
            "The record, or nearly the same, is in the validation file.",
            "Take it out of the training data: the validation loss would be too good.",
        ),
    ),
    *_kinds(
        Severity.REPAIR,
        ("bom", "The file begins with a byte-order mark.", "Write UTF-8 without it."),
        ("crlf", "The line ends with CR LF.", "Write LF alone."),
        ("extra_keys", "The record has further keys.", "Take them out; they are not trained on."),
        (
            "lone_surrogate",
            "A text holds half of a surrogate pair, which UTF-8 cannot write.",
            "Mend the text; it is trained with U+FFFD in that place.",
        ),
        ("html", "A text holds HTML tags, comments or entities.", "Have them removed."),
        (
            "mojibake",
            "A text was read in a wrong encoding; or (review) has U+FFFD where bytes were lost.",
            "Have it mended; what is lost must come from the source.",
        ),
        (
            "control_characters",
            "A text holds characters that do not show: controls, zero-width, direction marks, "
            "separators, odd spaces.",
            "Have them removed.",
        ),
        (
            "stray_whitespace",
            "A text begins or ends with white space that says nothing.",
            "Have it cut; one space before a completion is a convention and is left.",
        ),
    ),
    *_kinds(
        Severity.REVIEW,
        (
            "duplicate_key",
            "A key stands twice in one object; the last one counts.",
            "Look which one is right.",
        ),
        (
            "missing_reference",
            "A prompt for reinforcement fine-tuning has no reference_answer.",
            "Add it, unless the grader does without.",
        ),
        ("missing_output", "An invocation log has no answer.", "Leave out calls that failed."),
        ("empty_system", "system is an empty list; it is passed over.", "Fill it or leave it out."),
        (
            "conflicting_label",
            "An earlier record has the same prompt and another completion.",
            "Decide which is right; where both are, keep both.",
        ),
        (
            "completion_repeats_prompt",
            "The completion begins with the whole prompt.",
            "Give only what the model shall write.",
        ),
        (
            "low_information",
            "The completion is a placeholder, punctuation, keyboard noise, or a rare letter.",
            "Write the answer, or leave the record out.",
        ),
        (
            "pii",
            "A text seems to hold personal data: e-mail, phone, card, IBAN, social security.",
            "Replace it, unless you may train on it; a model can repeat it word for word.",
        ),
        (
            "language_mix",
            "Some records are in another language than most.",
            "Look whether they belong there.",
        ),
        (
            "outlier_length",
            "The record is many times as long as others.",
            "Look whether it is one record, and whether it is whole.",
        ),
    ),
    *_kinds(Severity.SKIP, ("blank_line", "The line is blank.", "Take it out.")),
    *_kinds(
        Severity.ADVICE,
        (
            "too_few_records",
            "There are fewer records than Bedrock takes, or than guidance asks for.",
            "Add records; good ones count more than many.",
        ),
        (
            "too_few_tokens",
            "There is less raw text than guidance asks for.",
            "Add text, or expect a change of style more than of knowledge.",
        ),
        (
            "large_set",
            "There are more pairs than guidance asks for.",
            "A few thousand good ones often do as well.",
        ),
        (
            "many_epochs",
            "More than 10 epochs are asked for.",
            "Watch the validation loss; more records help more than more epochs.",
        ),
        (
            "small_set_multiplier",
            "learningRateMultiplier is high for a small set.",
            "Begin with 0.1.",
        ),
        ("no_validation", "No validation file is named.", "Name one, to see over-fitting."),
        (
            "label_imbalance",
            "Some labels have many times as many records as others.",
            "Add records of the rare labels.",
        ),
        (
            "ungrounded_answer",
            "An answer shares next to no words with the <context> its prompt gives.",
            "Give the context that answers, or teach the model to say that it does not know.",
        ),
    ),
)

KINDS: dict[str, DefectKind] = {kind.code: kind for kind in _ALL}
"""Every code, by its name."""
