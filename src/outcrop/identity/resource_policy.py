"""Resource policies in IAM's JSON: checked when they are put.

Says whether a document is one, and nothing about who may do what: no decision asks these policies
yet. Unlike a user's or a role's policy, it names principals and may hold conditions.
Source: IAM User Guide, "Grammar of the IAM JSON policy language".
"""

from __future__ import annotations

from outcrop.errors import ValidationException
from outcrop.identity.policy import (
    check_action,
    check_resource,
    malformed,
    read_statements,
    refuse_unknown,
    strings,
)

MAX_CHARACTERS = 20_480
"""Source: botocore's bedrock model, ResourcePolicyDocument."""

_ELEMENTS = frozenset(
    {"Sid", "Effect", "Condition"}
    | {name + element for name in ("", "Not") for element in ("Principal", "Action", "Resource")}
)
_PRINCIPALS = frozenset({"AWS", "Service", "Federated", "CanonicalUser"})


def check_resource_policy(document: str) -> None:
    """Refuse what is no resource policy in full.

    Raises:
        ValidationException: the message names the element.
    """
    try:
        for index, statement in enumerate(read_statements(document, MAX_CHARACTERS)):
            _check_statement(statement, f"Statement[{index}]")
    except ValidationException as error:
        # The code of a malformed policy is IAM's; the bedrock model does not have it.
        raise ValidationException(error.message) from None


def _check_statement(statement: object, place: str) -> None:
    if not isinstance(statement, dict):
        raise malformed(f"{place} must be an object")
    refuse_unknown(statement, _ELEMENTS, place)
    if not isinstance(statement.get("Sid", ""), str):
        raise malformed(f"{place}.Sid must be a string")
    if statement.get("Effect") not in ("Allow", "Deny"):
        raise malformed(f"{place}.Effect must be Allow or Deny")
    name = _one_of(statement, "Principal", place)
    _check_principal(statement[name], f"{place}.{name}")
    for element, check in (("Action", check_action), ("Resource", check_resource)):
        name = _one_of(statement, element, place)
        for pattern in strings(statement[name], f"{place}.{name}"):
            check(pattern, f"{place}.{name}")
    _check_condition(statement.get("Condition", {}), f"{place}.Condition")


def _one_of(statement: dict[str, object], element: str, place: str) -> str:
    negated = "Not" + element
    if (element in statement) == (negated in statement):
        raise malformed(f"{place} must have either {element} or {negated}")
    return element if element in statement else negated


def _check_principal(principal: object, place: str) -> None:
    if principal == "*":
        return
    if not isinstance(principal, dict) or not principal:
        raise malformed(f'{place} must be "*" or an object such as {{"AWS": ...}}')
    refuse_unknown(principal, _PRINCIPALS, place)
    for kind, names in principal.items():
        strings(names, f"{place}.{kind}")


def _check_condition(condition: object, place: str) -> None:
    """Check that a condition is operators, each with keys and their values."""
    if not isinstance(condition, dict):
        raise malformed(f"{place} must be an object of operators")
    for operator, keys in condition.items():
        if not isinstance(keys, dict) or not keys:
            raise malformed(f"{place}.{operator} must be an object of keys and values")
        for key, values in keys.items():
            for value in values if isinstance(values, list) else [values]:
                if not isinstance(value, str | int | float):
                    raise malformed(
                        f"{place}.{operator}.{key} must be a string, a number, true or false, or "
                        "a list of those"
                    )
