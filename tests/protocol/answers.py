"""Answers as botocore's clients read them, held against the output shapes of the service models.

botocore checks what it sends and believes what it gets. Here the other half is checked: required
members, types, lengths, ranges, patterns, enums, and unions with one member. Patterns are matched
by the `regex` package, so nothing here leans on the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import regex  # type: ignore[import-untyped]
from botocore.model import OperationModel, Shape

from outcrop.wire.model import SERVICES

DEVIATIONS = {
    # A job that starts from a custom model names it; the model's pattern has base models only.
    ("GetModelCustomizationJob", "baseModelArn", "pattern"),
    ("GetDataTask", "baseModelArn", "pattern"),
    # The throughput of an imported model names it; Bedrock's have custom and base models only.
    *(
        (operation, place + name, "pattern")
        for operation, place in (
            ("GetProvisionedModelThroughput", ""),
            ("ListProvisionedModelThroughputs", "provisionedModelSummaries.1."),
        )
        for name in ("modelArn", "desiredModelArn", "foundationModelArn")
    ),
}
"""Operation, member and constraint of what docs/differences.md says is answered otherwise."""

_TYPES: dict[str, tuple[type, ...]] = {
    "structure": (dict,),
    "map": (dict,),
    "list": (list,),
    "string": (str,),
    "integer": (int,),
    "long": (int,),
    "float": (float, int),
    "double": (float, int),
    "boolean": (bool,),
    "blob": (bytes,),
    "timestamp": (datetime,),
}


def check_answer(operation: OperationModel, parsed: Mapping[str, Any]) -> None:
    """Fail unless an answer that botocore parsed satisfies its output shape.

    Args:
        parsed: as a client returns it; `ResponseMetadata` is looked over, and so is what the caller
            reads as a stream.
    """
    shape = operation.output_shape
    if shape is None:
        return
    read_by_caller = {
        name
        for name, member in shape.members.items()
        if member.serialization.get("eventstream")
        or (member.type_name == "blob" and name == shape.serialization.get("payload"))
    }
    members = {
        name: value
        for name, value in parsed.items()
        if name != "ResponseMetadata" and name not in read_by_caller
    }
    found = [
        f"{where or operation.name}: {what}"
        for where, rule, what in _violations(shape, members, "", read_by_caller)
        if (operation.name, where, rule) not in DEVIATIONS
    ]
    assert not found, f"{operation.name} answered what its model does not allow:\n" + "\n".join(
        found
    )


def check_client(client: Any) -> Any:
    """Have every successful answer of a boto3 client checked from now on; returns the client.

    S3's are left alone: the object store makes them.
    """

    def check(http_response: Any, parsed: dict[str, Any], model: OperationModel, **_: Any) -> None:
        if http_response.status_code < 300:
            check_answer(model, parsed)

    if client.meta.service_model.service_name in SERVICES:
        client.meta.events.register("after-call", check)
    return client


_Violation = tuple[str, str, str]
"""Where, the constraint's name, and what is wrong."""


def _violations(
    shape: Shape, value: Any, where: str, left_out: set[str] | frozenset[str] = frozenset()
) -> list[_Violation]:
    kind = shape.type_name
    if kind == "structure" and shape.is_document_type:
        return []
    has_type = isinstance(value, bool) == (kind == "boolean") and isinstance(value, _TYPES[kind])
    if not has_type:
        return [(where, "type", f"{value!r:.100} is no {kind}")]
    found = _limits(shape, value, where)
    if kind == "structure":
        prefix = f"{where}." if where else ""
        for name in shape.required_members:
            if name not in value and name not in left_out:
                found.append((prefix + name, "required", "it is missing"))
        if shape.is_tagged_union and len(value) != 1:
            found.append((where, "union", f"it has {sorted(value)} and not one member"))
        for name, item in value.items():
            if name not in shape.members:  # botocore's name for a member that it does not know
                found.append((prefix + name, "member", "the model has no such member"))
            else:
                found += _violations(shape.members[name], item, prefix + name)
    elif kind == "list":
        for index, item in enumerate(value, 1):
            found += _violations(shape.member, item, f"{where}.{index}")
    elif kind == "map":
        for key, item in value.items():
            found += _violations(shape.key, key, f"{where}.key")
            found += _violations(shape.value, item, f"{where}.{key}")
    return found


def _limits(shape: Shape, value: Any, where: str) -> list[_Violation]:
    limits = shape.metadata
    found: list[_Violation] = []
    if limits.get("enum") and value not in limits["enum"]:
        found.append((where, "enum", f"{value!r} is none of {limits['enum']}"))
    size = value if isinstance(value, int | float) else _size(value)
    if "min" in limits and size < limits["min"]:
        found.append((where, "min", f"{value!r:.100} is below {limits['min']}"))
    if "max" in limits and size > limits["max"]:
        found.append((where, "max", f"{value!r:.100} is above {limits['max']}"))
    pattern = limits.get("pattern")
    if pattern and not regex.fullmatch(pattern, value, timeout=5):
        found.append((where, "pattern", f"{value!r:.200} does not match {pattern}"))
    return found


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | dict) else 0
