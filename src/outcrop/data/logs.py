"""Training records from the logs of model invocations: what was asked, and what was answered.

Reads the records of invocation logging, whichever operation and whichever family's body they hold,
also of streams. Which calls are taken can be narrowed by the metadata that callers gave with them.

Source: contract of ModelInvocationLog in the Bedrock user guide, "Monitor model invocation", and
the inference parameters of each family there; botocore's shape RequestMetadataFilters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from outcrop.data.convert import Row, write_messages
from outcrop.data.defects import Unusable
from outcrop.data.facts import DataFile
from outcrop.data.markup import parse_prompt
from outcrop.data.read import kind_of, scan_lines
from outcrop.data.records import BETWEEN_BLOCKS, Message
from outcrop.data.schemas import LOG_TYPE
from outcrop.errors import DataError

MAX_FILTERS = 16
_BASE_FILTERS = ("equals", "notEquals")

Filter = Callable[[Mapping[str, str]], bool]


def make_filter(value: object) -> Filter:
    """Return what decides by a call's metadata whether it is taken.

    Args:
        value: as `requestMetadataFilters`: one of equals, notEquals (each of one key), andAll,
            orAll (each of 1 to MAX_FILTERS of those). A call without the key is not equal.
    Raises:
        DataError: it is not of that form.
    """
    name, held = _only_member(value, (*_BASE_FILTERS, "andAll", "orAll"))
    if name in _BASE_FILTERS:
        return _base_filter(value)
    if not isinstance(held, list) or not 1 <= len(held) <= MAX_FILTERS:
        raise _bad_filter(f"{name} holds a list of 1 to {MAX_FILTERS} filters")
    filters = [_base_filter(each) for each in held]
    together = all if name == "andAll" else any
    return lambda metadata: together(each(metadata) for each in filters)


def _base_filter(value: object) -> Filter:
    name, held = _only_member(value, _BASE_FILTERS)
    if not isinstance(held, dict) or len(held) != 1:
        raise _bad_filter(f"{name} holds one key and its value")
    ((key, wanted),) = held.items()
    if not isinstance(wanted, str):
        raise _bad_filter(f"the value of {key} must be a string, not {kind_of(wanted)}")
    is_equal = name == "equals"
    return lambda metadata: (metadata.get(key) == wanted) is is_equal


def _only_member(value: object, names: tuple[str, ...]) -> tuple[str, object]:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in names:
        raise _bad_filter(f"exactly one of {', '.join(names)} is given")
    return next(iter(value.items()))


def _bad_filter(reason: str) -> DataError:
    return DataError(
        f'The metadata filter is not of the form {{"equals": {{"key": "value"}}}}: {reason}.',
        code="bad_filter",
        file="",
    )


def log_rows(
    data: DataFile,
    target: str,
    *,
    matches: Filter | None = None,
    use_prompt_response: bool = True,
    fetch: Callable[[str], Any] | None = None,
) -> Iterator[Row]:
    """Yield the calls of a log, as training records.

    Args:
        data: newline-delimited records, packed or not.
        target: as in `convert.convert_record`.
        matches: which calls are taken, by their metadata; None takes all. Others are passed over.
        use_prompt_response: whether the logged answer is taken; without it only what was asked is,
            for a teacher to answer.
        fetch: gives the body that lies at a URI, or raises Unusable; None refuses calls whose
            bodies lie in objects of their own.
    """
    with data.open() as stream:
        for line in scan_lines(stream, data.name):
            if line.is_blank:
                continue
            if line.value is None:
                yield Row(data.name, line.number, None, line.findings[-1])
                continue
            metadata = line.value.get("requestMetadata")
            if matches and not matches(metadata if isinstance(metadata, dict) else {}):
                continue
            try:
                value = line.value if fetch is None else _with_bodies(line.value, fetch)
                messages = read_call(value, answered=use_prompt_response)
                yield Row(data.name, line.number, write_messages(messages, target))
            except Unusable as error:
                yield Row(data.name, line.number, None, error.finding)


def read_call(value: Mapping[str, Any], *, answered: bool = True) -> tuple[Message, ...]:
    """Return what was said in one call, the answer last.

    Args:
        value: one record of a log.
        answered: whether the answer is wanted.
    Raises:
        Unusable: it is no such record, the call failed, its bodies are elsewhere, or
            they hold more than text.
    """
    if value.get("schemaType") != LOG_TYPE:
        raise Unusable("wrong_keys", "It is no record of invocation logging.")
    asked = _read_body(_body(value, "input"))
    if not asked or asked[-1].role != "user":
        raise Unusable("role_order", "What was asked does not end with a user's turn.")
    if not answered:
        return asked
    if value.get("errorCode"):
        raise Unusable("missing_output", f"The call failed with {value['errorCode']}.")
    answer = _read_answer(_body(value, "output"))
    if not answer.strip():
        raise Unusable("missing_output", "The answer is empty.")
    return (*asked, Message("assistant", answer))


def _with_bodies(value: Mapping[str, Any], fetch: Callable[[str], Any]) -> dict[str, Any]:
    """Return a call with the bodies that lie elsewhere."""
    whole = dict(value)
    if value.get("errorCode"):
        return whole  # it is left out anyway
    for side in ("input", "output"):
        held = value.get(side)
        path = held.get(f"{side}BodyS3Path") if isinstance(held, dict) else None
        if isinstance(held, dict) and isinstance(path, str) and f"{side}BodyJson" not in held:
            whole[side] = {**held, f"{side}BodyJson": fetch(path)}
    return whole


def _body(value: Mapping[str, Any], side: str) -> Any:
    held = value.get(side)
    if not isinstance(held, dict):
        raise Unusable("missing_output" if side == "output" else "wrong_keys", f"It has no {side}.")
    body = held.get(f"{side}BodyJson")
    if body is None:
        if held.get(f"{side}BodyS3Path"):
            raise Unusable(
                "body_elsewhere",
                f"Its {side} is in {held[f'{side}BodyS3Path']}, which is not read.",
            )
        raise Unusable("missing_output" if side == "output" else "wrong_keys", f"It has no {side}.")
    return body


# -- what was asked


def _read_body(body: Any) -> tuple[Message, ...]:
    if not isinstance(body, dict):
        raise Unusable("wrong_type", f"Its input must be an object, not {kind_of(body)}.")
    if isinstance(body.get("inputText"), str):
        return parse_prompt("titan", body["inputText"])
    if isinstance(body.get("prompt"), str):
        return parse_prompt("llama", body["prompt"])
    if isinstance(body.get("messages"), list):
        turns = body["messages"]
        if turns and isinstance(turns[0], dict) and turns[0].get("role") in ("system", "developer"):
            return (
                Message("system", _text(turns[0].get("content"), "system")),
                *map(_turn, turns[1:]),
            )
        return (*_system(body.get("system")), *map(_turn, turns))
    names = ", ".join(sorted(map(str, body))[:5])
    raise Unusable("unsupported_block", f"Its input is of no known text model; it has {names}.")


def _system(value: object) -> tuple[Message, ...]:
    if value is None or value == [] or value == "":
        return ()
    return (Message("system", _text(value, "system")),)


def _turn(value: object) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ("user", "assistant"):
        raise Unusable("bad_role", "A turn has no role of user or assistant.")
    return Message(value["role"], _text(value.get("content"), "content"))


def _text(value: object, where: str) -> str:
    """Return the text of content, or of its blocks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise Unusable("wrong_type", f"{where} must be text or blocks, not {kind_of(value)}.")
    texts = []
    for block in value:
        if not isinstance(block, dict) or not isinstance(block.get("text"), str):
            kinds = ", ".join(map(str, block)) if isinstance(block, dict) else kind_of(block)
            raise Unusable("unsupported_block", f"{where} holds {kinds}; only text is taken.")
        texts.append(block["text"])
    return BETWEEN_BLOCKS.join(texts)


# -- what was answered


def _read_answer(body: Any) -> str:
    if isinstance(body, list):
        return "".join(map(_chunk, body))
    if not isinstance(body, dict):
        raise Unusable("wrong_type", f"Its output must be an object, not {kind_of(body)}.")
    _refuse_tools(body)
    message = (
        body.get("output", {}).get("message") if isinstance(body.get("output"), dict) else None
    )
    if isinstance(message, dict):  # Converse, Nova
        return _text(message.get("content"), "output")
    if isinstance(body.get("content"), list):  # Claude
        return _text(body["content"], "output")
    if isinstance(body.get("choices"), list):  # the OpenAI-style paths
        if len(body["choices"]) != 1:
            raise Unusable("missing_output", f"It has {len(body['choices'])} answers, not one.")
        return _choice(body["choices"][0], "message")
    for key, inner in (("results", "outputText"), ("generations", "text"), ("outputs", "text")):
        found = body.get(key)
        if isinstance(found, list):  # Titan, Cohere, Mistral
            if len(found) != 1:
                raise Unusable("missing_output", f"It has {len(found)} answers, not one.")
            return _text(found[0].get(inner) if isinstance(found[0], dict) else None, "output")
    if isinstance(body.get("generation"), str):  # Llama
        return str(body["generation"])
    names = ", ".join(sorted(map(str, body))[:5])
    raise Unusable("missing_output", f"Its output is of no known text model; it has {names}.")


def _choice(choice: Any, name: str) -> str:
    """Return the text of one answer in OpenAI's form, or of a part of it."""
    if not isinstance(choice, dict):
        raise Unusable("wrong_type", f"An answer is {kind_of(choice)}, not an object.")
    if choice.get("index"):
        raise Unusable("missing_output", "It has several answers, not one.")
    held = choice.get(name)
    if not isinstance(held, dict):
        return str(choice.get("text") or "")
    if held.get("tool_calls"):
        raise Unusable("unsupported_block", "The answer calls a tool; only text is taken.")
    return str(held.get("content") or "")


def _refuse_tools(body: Mapping[str, Any]) -> None:
    reason = body.get("stopReason") or body.get("stop_reason")
    if reason in ("tool_use", "malformed_tool_use", "guardrail_intervened", "content_filtered"):
        raise Unusable("unsupported_block", f"The answer ended with {reason}; only text is taken.")


def _chunk(chunk: Any) -> str:
    """Return the text of one part of a stream."""
    if not isinstance(chunk, dict):
        raise Unusable("wrong_type", f"A part of its output is {kind_of(chunk)}, not an object.")
    if isinstance(chunk.get("choices"), list):  # the OpenAI-style paths
        return "".join(_choice(choice, "delta") for choice in chunk["choices"])
    delta = chunk.get("delta")
    if "contentBlockDelta" in chunk:  # Converse, Nova
        held = chunk["contentBlockDelta"]
        delta = held.get("delta") if isinstance(held, dict) else None
    if isinstance(delta, dict):  # Claude too
        if delta.get("type", "text_delta") == "text_delta" and isinstance(delta.get("text"), str):
            return str(delta["text"])
        if "toolUse" in delta or delta.get("type") == "input_json_delta":
            raise Unusable("unsupported_block", "The answer calls a tool; only text is taken.")
        return ""
    for key in ("outputText", "generation", "text"):  # Titan, Llama, Cohere
        if isinstance(chunk.get(key), str):
            return str(chunk[key])
    outputs = chunk.get("outputs")
    if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict):  # Mistral
        return str(outputs[0].get("text") or "")
    return ""
