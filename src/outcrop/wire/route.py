"""Method and path of a request to the operation it asks for.

Turns every `requestUri` of the rest-json models into one tree of path segments, and looks a raw
path up in it: one step a segment, whatever the number of operations. Works on the path as it was
sent, because ARNs travel as one label with `%2F` in it. Knows no operation by name.
Source: the `http` trait of the service models; Smithy 2.0, HTTP bindings, for labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from urllib.parse import unquote_to_bytes

from botocore.model import OperationModel

from outcrop.errors import ApiError
from outcrop.wire.model import REST_SERVICES, service_model

MAX_PATH_LENGTH = 16 * 1024
"""The longest raw path that is looked at, in characters. Labels are at most 2,048 decoded."""


@dataclass(frozen=True)
class Route:
    """An operation, and the values of the labels in its path."""

    service: str
    """`bedrock`, `bedrock-runtime` or `outcrop`."""
    operation: OperationModel
    path_params: dict[str, str]
    """Decoded labels by their name in the path template."""


@dataclass(frozen=True)
class _Target:
    service: str
    operation: OperationModel
    labels: tuple[str, ...]


@dataclass
class _Node:
    literals: dict[str, _Node] = field(default_factory=dict)
    label: _Node | None = None
    targets: dict[str, _Target] = field(default_factory=dict)
    """By method."""


def match(method: str, raw_path: str) -> Route:
    """Return the operation that `method` and `raw_path` name.

    Args:
        method: as sent, upper case.
        raw_path: as sent, still percent-encoded, without the query. One trailing slash is ignored.
    Raises:
        ApiError: UnknownOperationException 404, for an unknown path and for a method that the path
            does not have; SerializationException 400, for a label that is not UTF-8.
    """
    if len(raw_path) > MAX_PATH_LENGTH or not raw_path.startswith("/") or not raw_path.isascii():
        raise _unknown(method, raw_path)
    path = raw_path[1:-1] if raw_path.endswith("/") and len(raw_path) > 1 else raw_path[1:]
    found = _find(_tree(), path.split("/"), 0, [], method)
    if found is None:
        raise _unknown(method, raw_path)
    target, values = found
    params = {name: _decode(name, value) for name, value in zip(target.labels, values, strict=True)}
    return Route(target.service, target.operation, params)


def load() -> None:
    """Read the service models now, and not at the first request."""
    _tree()


@cache
def _tree() -> _Node:
    root = _Node()
    for service in REST_SERVICES:
        model = service_model(service)
        for name in model.operation_names:
            _insert(root, service, model.operation_model(name))
    return root


def _insert(root: _Node, service: str, operation: OperationModel) -> None:
    template, method = operation.http["requestUri"], operation.http["method"]
    assert not {"?", "+"} & set(template), f"{operation.name} has a path of a new kind"
    labels: list[str] = []
    node = root
    for segment in template.strip("/").split("/"):
        if not segment.startswith("{"):
            node = node.literals.setdefault(segment, _Node())
        else:
            labels.append(segment[1:-1])
            node.label = node.label or _Node()
            node = node.label
    assert method not in node.targets, f"{operation.name} shares its path with another operation"
    node.targets[method] = _Target(service, operation, tuple(labels))


def _find(
    node: _Node, segments: list[str], at: int, values: list[str], method: str
) -> tuple[_Target, list[str]] | None:
    """Walk the tree from `segments[at]`: literals before labels."""
    if at == len(segments):
        target = node.targets.get(method)
        return None if target is None else (target, values)
    segment = segments[at]
    child = node.literals.get(segment)
    if child is not None:
        found = _find(child, segments, at + 1, values, method)
        if found is not None:
            return found
    # A signature covers the path with its dot segments removed, so they must never be a value.
    if node.label is None or segment in ("", ".", ".."):
        return None
    return _find(node.label, segments, at + 1, [*values, segment], method)


def _decode(name: str, value: str) -> str:
    try:
        text: str | None = unquote_to_bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:
        raise ApiError(
            f"The value of '{name}' in the path is not UTF-8 text, or holds the character U+0000.",
            code="SerializationException",
            http_status=400,
        )
    return text


def _unknown(method: str, raw_path: str) -> ApiError:
    shown = raw_path if len(raw_path) <= 200 else raw_path[:200] + "..."
    return ApiError(
        f"No operation answers {method[:20]} {shown}. Check the method and the path; a resource's "
        "ARN in the path must be percent-encoded.",
        code="UnknownOperationException",
        http_status=404,
    )
