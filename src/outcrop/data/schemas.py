"""What each format demands of one line's object, and the messages or the text that it holds.

One function a format. What cannot be lived with raises `Unusable`; what can is added to a list of
findings, and the record is taken as it stands. A format's name is given by `formats.py`.

Source: Bedrock user guide, "Prepare data for fine-tuning", "Distillation", "Reinforcement
fine-tuning", "Evaluation", "Format and upload your batch inference data", "Invocation logging".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outcrop.data.defects import Finding, Severity, Unusable, shown
from outcrop.data.markup import parse_prompt
from outcrop.data.read import kind_of
from outcrop.data.records import BETWEEN_BLOCKS, Message

SCHEMA_VERSION = "bedrock-conversation-2024"
IMAGE_FORMATS = ("png", "jpeg", "gif", "webp")
IMAGE_FILES = (".png", ".jpg", ".jpeg")
LOG_TYPE = "ModelInvocationLog"

# White space to Unicode, and what shows as nothing: zero-width characters and the byte-order mark.
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_NOTHING = str.maketrans(dict.fromkeys(INVISIBLE, ""))
_FOREIGN_KEYS = {"input", "messages", "schemaVersion", "image-ref", "recordId", "modelInput"}
"""What belongs to other formats than pairs."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a record says."""

    messages: tuple[Message, ...] = ()
    """Of labelled records and of prompts; the last one is the assistant's where there is an
    answer."""
    text: str | None = None
    """Of a document."""
    is_opaque: bool = False
    """Whether neither is there: the record is another API's body."""


class Reader:
    """Reads values of one record and keeps what is wrong with them."""

    def __init__(
        self,
        findings: list[Finding],
        *,
        body_family: str = "",
        text_only: bool = True,
    ) -> None:
        """Begin a record.

        Args:
            findings: what can be lived with is added here.
            body_family: whose mark-up a prompt may be written in, as in `markup.parse_prompt`.
            text_only: whether an image cannot be used; otherwise somebody is to decide.
        """
        self._findings = findings
        self._body_family = body_family
        self._text_only = text_only

    # -- labelled records and documents

    def pair(self, value: Mapping[str, Any]) -> Content:
        """Read `{"prompt": ..., "completion": ...}`."""
        others = _FOREIGN_KEYS & value.keys()
        if others:
            names = ", ".join(sorted(others))
            raise Unusable("mixed_schema", f"It mixes prompt/completion with {names}.", names)
        known = ("prompt", "completion")
        for key in known:
            if key not in value:
                if not value.keys() <= set(known):
                    raise wrong_keys(value)
                raise Unusable(f"missing_{key}", f"It has no {key}.")
        if len(value) > 2:
            self._extra_keys(value, set(known))
        prompt = self._text(value["prompt"], "prompt", "empty_prompt")
        completion = self._text(value["completion"], "completion", "empty_completion")
        messages = parse_prompt(self._body_family, prompt)
        if messages[-1].role == "assistant":
            # The prompt begins the answer itself; what the model shall write still starts after it.
            raise Unusable(
                "role_order", "The prompt's mark-up ends inside an answer, not with a user's turn."
            )
        return Content((*messages, Message("assistant", completion)))

    def conversation(self, value: Mapping[str, Any], *, answer_needed: bool = True) -> Content:
        """Read a Converse conversation; distillation needs no answer."""
        if "messages" not in value and {"role", "content"} <= value.keys():
            raise Unusable(
                "role_order",
                "It is one turn, outside of messages. A conversation has the user's turn and then "
                "the assistant's.",
            )
        if "schemaVersion" not in value:
            raise Unusable("missing_schema_version", "It has no schemaVersion.")
        version = value["schemaVersion"]
        if version != SCHEMA_VERSION:
            named = ascii(version[:60]) if isinstance(version, str) else kind_of(version)
            raise Unusable(
                "bad_schema_version", f"schemaVersion is {named}, not {SCHEMA_VERSION}.", named
            )
        self._extra_keys(value, {"schemaVersion", "system", "messages"})
        messages = []
        if "system" in value:
            system = self._blocks(value["system"], "system")
            if system is not None:
                messages.append(Message("system", system))
        turns = _turns(value, answer_needed=answer_needed)
        for index, turn in enumerate(turns):
            self._extra_keys(turn, {"role", "content"}, f"messages[{index}]")
            text = self._blocks(turn["content"], f"messages[{index}].content")
            messages.append(Message(turn["role"], text or ""))
        return Content(tuple(messages))

    def claude(self, value: Mapping[str, Any]) -> Content:
        """Read Claude's `system` and `messages`; Bedrock refuses further keys here."""
        known = {"system", "messages"}
        self._extra_keys(value, known, severity=Severity.REJECT)
        messages = []
        if "system" in value:
            messages.append(Message("system", self._text(value["system"], "system")))
        for index, turn in enumerate(_turns(value)):
            where = f"messages[{index}]"
            self._extra_keys(turn, {"role", "content"}, where, severity=Severity.REJECT)
            messages.append(Message(turn["role"], self._text(turn["content"], f"{where}.content")))
        return Content(tuple(messages))

    def document(self, value: Mapping[str, Any]) -> Content:
        """Read `{"input": ...}`."""
        self._extra_keys(value, {"input"})
        return Content(text=self._text(value["input"], "input", "empty_input"))

    # -- what is checked here and trained elsewhere

    def image_caption(self, value: Mapping[str, Any]) -> Content:
        """Read `{"image-ref": "s3://...", "caption": ...}`."""
        self._extra_keys(value, {"image-ref", "caption"})
        reference = value.get("image-ref")
        if not isinstance(reference, str):
            raise Unusable("wrong_type", f"image-ref must be a string, not {kind_of(reference)}.")
        if not reference.lower().endswith(IMAGE_FILES):
            raise Unusable(
                "bad_image",
                f"image-ref is {shown(reference)}; it must name a PNG or JPEG file.",
                shown(reference),
            )
        if "caption" not in value:
            raise Unusable("missing_caption", "It has no caption.")
        caption = self._text(value["caption"], "caption")
        return Content((Message("user", reference), Message("assistant", caption)))

    def reinforcement(self, value: Mapping[str, Any]) -> Content:
        """Read OpenAI's chat form with a reference answer; further keys go to the grader."""
        turns = value.get("messages")
        if not isinstance(turns, list):
            raise Unusable("wrong_type", f"messages must be an array, not {kind_of(turns)}.")
        if not turns:
            raise Unusable("empty_messages", "messages is empty.")
        messages = []
        for index, turn in enumerate(turns):
            where = f"messages[{index}]"
            _check_turn(turn, where, ("system", "user", "assistant"))
            messages.append(Message(turn["role"], self._text(turn["content"], f"{where}.content")))
        if not any(message.role == "user" for message in messages):
            raise Unusable("role_order", "No message is the user's.")
        if "reference_answer" not in value:
            self._note(
                "missing_reference",
                Severity.REVIEW,
                "It has no reference_answer: the grader must do without.",
            )
        return Content(tuple(messages))

    def evaluation(self, value: Mapping[str, Any]) -> Content:
        """Read a prompt of an evaluation, with its reference and category where given."""
        self._extra_keys(value, {"prompt", "referenceResponse", "category", "modelResponses"})
        if "prompt" not in value:
            raise Unusable("missing_prompt", "It has no prompt.")
        messages = [Message("user", self._text(value["prompt"], "prompt", "empty_prompt"))]
        if "category" in value:
            self._text(value["category"], "category")
        if "modelResponses" in value:
            _check_model_responses(value["modelResponses"])
        if "referenceResponse" in value:
            reference = self._text(value["referenceResponse"], "referenceResponse")
            messages.append(Message("assistant", reference))
        return Content(tuple(messages))

    def batch(self, value: Mapping[str, Any]) -> Content:
        """Read a record of a batch; its body is the model's own and is not looked into."""
        self._extra_keys(value, {"recordId", "modelInput"})
        if not isinstance(value.get("recordId", ""), str):
            raise Unusable(
                "wrong_type", f"recordId must be a string, not {kind_of(value['recordId'])}."
            )
        if "modelInput" not in value:
            raise Unusable("missing_model_input", "It has no modelInput.")
        _check_object(value["modelInput"], "modelInput")
        return Content(is_opaque=True)

    def invocation_log(self, value: Mapping[str, Any]) -> Content:
        """Read a record of invocation logging; its bodies are the models' own."""
        for key in ("modelId", "operation"):
            if not isinstance(value.get(key), str):
                raise Unusable("wrong_type", f"{key} must be a string, not {_kind_at(value, key)}.")
        _check_object(value.get("input"), "input")
        if not {"inputBodyJson", "inputBodyS3Path"} & value["input"].keys():
            raise Unusable("missing_prompt", "Its input has neither inputBodyJson nor a path.")
        output = value.get("output")
        if not isinstance(output, dict) or not {"outputBodyJson", "outputBodyS3Path"} & set(output):
            self._note(
                "missing_output",
                Severity.REVIEW,
                "It has no answer: the call failed, or text delivery was off.",
            )
        return Content(is_opaque=True)

    # -- values

    def _blocks(self, value: object, where: str) -> str | None:
        """Return the text of content blocks, joined by an empty line; None where none is left."""
        if not isinstance(value, list):
            raise Unusable("wrong_type", f"{where} must be an array, not {kind_of(value)}.")
        if not value:
            if where == "system":
                self._note("empty_system", Severity.REVIEW, "system is empty. It is passed over.")
                return None
            raise Unusable("empty_content", f"{where} is empty.")
        texts = [self._block(block, f"{where}[{index}]") for index, block in enumerate(value)]
        return BETWEEN_BLOCKS.join(text for text in texts if text is not None)

    def _block(self, block: object, where: str) -> str | None:
        if not isinstance(block, dict):
            raise Unusable("wrong_type", f"{where} must be an object, not {kind_of(block)}.")
        if "text" not in block:
            names = ", ".join(ascii(name[:40]) for name in list(block)[:5]) or "nothing"
            message = f"{where} holds {names}; only text is taken for this model."
            if self._text_only or "image" not in block:
                raise Unusable("unsupported_block", message, names)
            _check_image(block["image"], f"{where}.image")
            message = f"{where} is an image, which models of text alone refuse."
            self._note("unsupported_block", Severity.REVIEW, message, names)
            return None
        self._extra_keys(block, {"text"}, where)
        return self._text(block["text"], f"{where}.text")

    def _text(self, value: object, where: str, empty_code: str = "empty_content") -> str:
        """Return a text that shows something and can be encoded."""
        if not isinstance(value, str):
            raise Unusable("wrong_type", f"{where} must be a string, not {kind_of(value)}.")
        if not shows(value):
            raise Unusable(empty_code, f"{where} is empty.", shown(value))
        if "\0" in value:
            place = value.index("\0")
            self._note(
                "null_byte",
                Severity.REPAIR,
                f"{where} holds a NUL character at character {place + 1}.",
            )
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                self._note(
                    "lone_surrogate",
                    Severity.REPAIR,
                    f"{where} holds half of a surrogate pair at character {error.start + 1}; it is "
                    "trained as U+FFFD.",
                    ascii(value[error.start]),
                )
                return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value

    def _extra_keys(
        self,
        value: Mapping[str, Any],
        known: set[str],
        where: str = "It",
        *,
        severity: Severity = Severity.REPAIR,
    ) -> None:
        if value.keys() <= known:
            return
        extra = [name for name in value if name not in known]
        names = ", ".join(ascii(name[:40]) for name in extra[:5])
        message = f"{where} has further keys: {names}. Take them out."
        if severity is Severity.REJECT:
            raise Unusable("extra_keys", message, names)
        self._note("extra_keys", severity, message, names)

    def _note(self, code: str, severity: Severity, message: str, value: str = "") -> None:
        self._findings.append(Finding(code, severity, message, value))


def shows(text: str) -> bool:
    """Return whether a text has anything that can be seen."""
    bare = text.strip()
    if not bare or bare[0] not in INVISIBLE:
        return bool(bare)
    return bool(bare.translate(_NOTHING).strip())


def wrong_keys(value: Mapping[str, Any]) -> Unusable:
    """Return what is said of an object whose keys belong to no format."""
    names = ", ".join(ascii(name[:40]) for name in list(value)[:5]) or "none"
    return Unusable("wrong_keys", f"Its keys are {names}.", names)


def _turns(value: Mapping[str, Any], *, answer_needed: bool = True) -> list[dict[str, Any]]:
    """Return the turns, which begin with the user's, alternate, and end with the assistant's."""
    if "messages" not in value:
        raise Unusable("missing_messages", "It has no messages.")
    turns = value["messages"]
    if not isinstance(turns, list):
        raise Unusable("wrong_type", f"messages must be an array, not {kind_of(turns)}.")
    if not turns:
        raise Unusable("empty_messages", "messages is empty.")
    for index, turn in enumerate(turns):
        _check_turn(turn, f"messages[{index}]", ("user", "assistant"))
    for index, turn in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if turn["role"] != expected:
            raise Unusable(
                "role_order",
                f"messages[{index}] is the {turn['role']}'s. Turns alternate from the user's on, "
                f"so it must be the {expected}'s.",
                turn["role"],
            )
    if answer_needed and turns[-1]["role"] != "assistant":
        raise Unusable("role_order", "The last message is not the assistant's.")
    return turns


def _check_turn(turn: object, where: str, roles: tuple[str, ...]) -> None:
    if not isinstance(turn, dict):
        raise Unusable("wrong_type", f"{where} must be an object, not {kind_of(turn)}.")
    if "role" not in turn:
        raise Unusable("missing_role", f"{where} has no role.")
    role = turn["role"]
    if role not in roles:
        named = ascii(role[:40]) if isinstance(role, str) else kind_of(role)
        raise Unusable("bad_role", f"{where}.role is {named}; it is {' or '.join(roles)}.", named)
    if "content" not in turn:
        raise Unusable("missing_content", f"{where} has no content.")


def _check_image(image: object, where: str) -> None:
    _check_object(image, where)
    assert isinstance(image, dict)
    if image.get("format") not in IMAGE_FORMATS:
        raise Unusable("bad_image", f"{where}.format must be one of {', '.join(IMAGE_FORMATS)}.")
    source = image.get("source")
    location = source.get("s3Location") if isinstance(source, dict) else None
    uri = location.get("uri") if isinstance(location, dict) else None
    if not isinstance(uri, str) or not uri.startswith("s3://"):
        raise Unusable("bad_image", f"{where}.source.s3Location.uri must name an S3 object.")


def _check_object(value: object, where: str) -> None:
    if not isinstance(value, dict):
        raise Unusable("wrong_type", f"{where} must be an object, not {kind_of(value)}.")


def _check_model_responses(value: object) -> None:
    if not isinstance(value, list):
        raise Unusable("wrong_type", f"modelResponses must be an array, not {kind_of(value)}.")
    if len(value) != 1 or not isinstance(value[0], dict):
        raise Unusable("wrong_type", "modelResponses must hold exactly one object.")
    for key in ("response", "modelIdentifier"):
        if not isinstance(value[0].get(key), str):
            kind = _kind_at(value[0], key)
            raise Unusable("wrong_type", f"modelResponses[0].{key} must be a string, not {kind}.")


def _kind_at(value: Mapping[str, Any], key: str) -> str:
    return kind_of(value[key]) if key in value else "missing"
