"""Policy documents in IAM's JSON: checked when they are saved, decided on when a request comes.

Turns (policies, action, resource) into Allow, Deny or ImplicitDeny. Fails closed: an element this
evaluator does not know (Condition, policy variables, ...) is refused when the document is saved,
because one that is ignored could allow what its author meant to forbid. It knows no users and no
database.
Source: IAM User Guide, "Grammar of the IAM JSON policy language", "Policy evaluation logic".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from outcrop.errors import ValidationException

Decision = Literal["Allow", "Deny", "ImplicitDeny"]
Matcher = Callable[[str], bool]

VERSIONS = ("2012-10-17", "2008-10-17")
MAX_POLICY_CHARACTERS = 10_240
"""Length of one document. Source: IAM quotas, aggregate size of a role's inline policies."""
CACHED_DOCUMENTS = 4096
"""Parsed documents kept in memory, by their text; a document weighs some kilobytes."""

_POLICY_ELEMENTS = frozenset({"Version", "Id", "Statement"})
_STATEMENT_ELEMENTS = frozenset(
    {"Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Principal"}
)
_ACTION = re.compile(r"[A-Za-z0-9-]+:[A-Za-z0-9*?]+")
_SERVICE_PRINCIPAL = re.compile(r"[a-z0-9.-]+\.amazonaws\.com")


@dataclass(frozen=True)
class Statement:
    """One statement, its patterns compiled."""

    allows: bool
    """True for Effect Allow, False for Deny."""
    matches_action: Matcher
    """Takes the action in lower case."""
    matches_resource: Matcher
    services: frozenset[str]
    """Principals of a trust policy: service names, or "*". Empty in a policy of a user or role."""


Policy = tuple[Statement, ...]
"""The statements of one document."""


def check_policy(document: str) -> None:
    """Refuse a document for a user or a role that cannot be decided on in full.

    Raises:
        ValidationException: code MalformedPolicyDocument; the message names the element.
    """
    parse_policy(document)


def check_trust_policy(document: str) -> None:
    """Refuse a trust policy of a role (who may assume it) that cannot be decided on in full.

    Raises:
        ValidationException: code MalformedPolicyDocument; the message names the element.
    """
    parse_trust_policy(document)


@lru_cache(maxsize=CACHED_DOCUMENTS)
def parse_policy(document: str) -> Policy:
    """Compile a user's or role's policy; the result is kept by the document's text.

    Raises:
        ValidationException: as `check_policy`.
    """
    return _parse(document, trust=False)


@lru_cache(maxsize=CACHED_DOCUMENTS)
def parse_trust_policy(document: str) -> Policy:
    """Compile a role's trust policy; the result is kept by the document's text.

    Raises:
        ValidationException: as `check_trust_policy`.
    """
    return _parse(document, trust=True)


def decide(
    policies: Iterable[Policy],
    action: str,
    resource: str,
) -> Decision:
    """Decide as IAM does: one Deny that applies wins, else one Allow is needed.

    Args:
        policies: compiled policies, all of which belong to the caller.
        action: `service:Operation`, compared without regard to case.
        resource: an ARN, compared as it is.
    """
    lowered = action.lower()
    allowed = False
    for policy in policies:
        for statement in policy:
            if statement.matches_action(lowered) and statement.matches_resource(resource):
                if not statement.allows:
                    return "Deny"
                allowed = True
    return "Allow" if allowed else "ImplicitDeny"


def service_may_assume(trust_policy: Policy, service: str) -> bool:
    """Say whether a trust policy lets a service (`bedrock.amazonaws.com`) assume the role.

    "*" in a Deny covers the service; in an Allow it does not, because a service must be named.
    """
    allowed = False
    for statement in trust_policy:
        if not statement.matches_action("sts:assumerole"):
            continue
        if not statement.allows and statement.services & {service, "*"}:
            return False
        allowed = allowed or (statement.allows and service in statement.services)
    return allowed


def compile_pattern(pattern: str) -> Matcher:
    """Return a test whether a whole text matches a pattern of literals, `*` and `?`.

    The pattern is cut at its stars and the pieces are looked for from left to right, which never
    goes back: the time is at most len(text) x len(longest piece), whatever the pattern.
    """
    first, *rest = pattern.split("*")
    if not rest:
        whole = _piece(first)
        return lambda text: whole.fullmatch(text) is not None
    if not first and not any(rest):
        return lambda text: True
    *middle, last = rest
    head, tail = _piece(first), _piece(last)
    pieces = [_piece(piece) for piece in middle if piece]

    def matches(text: str) -> bool:
        found = head.match(text)
        if found is None:
            return False
        end = len(text) - len(last)
        position = found.end()
        if end < position or tail.match(text, end) is None:
            return False
        for piece in pieces:
            found = piece.search(text, position, end)
            if found is None:
                return False
            position = found.end()
        return True

    return matches


def _piece(text: str) -> re.Pattern[str]:
    # No quantifier comes in, so there is nothing to go back to.
    return re.compile(re.escape(text).replace(r"\?", "."), re.DOTALL)


def read_statements(document: str, max_characters: int = MAX_POLICY_CHARACTERS) -> list[object]:
    """Return the statements of a document, which are not looked into.

    Raises:
        ValidationException: code MalformedPolicyDocument; it is too long, or no policy document.
    """
    if len(document) > max_characters:
        raise malformed(
            f"the document has {len(document)} characters; {max_characters} are allowed"
        )
    try:
        policy = json.loads(document, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, too
        raise malformed(f"the document is not JSON: {error}") from error
    if not isinstance(policy, dict):
        raise malformed("the document must be a JSON object")
    refuse_unknown(policy, _POLICY_ELEMENTS, "the policy")
    # IAM reads an absent version as the older one. Only policy variables tell the two apart, and
    # those are refused in both.
    if policy.get("Version", VERSIONS[1]) not in VERSIONS:
        raise malformed(f"Version must be one of {', '.join(VERSIONS)}")
    if not isinstance(policy.get("Id", ""), str):
        raise malformed("Id must be a string")
    statements = policy.get("Statement")
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not statements:
        raise malformed("Statement must be an object or a list of at least one")
    return statements


def _parse(document: str, *, trust: bool) -> Policy:
    statements = read_statements(document)
    return tuple(
        _statement(statement, f"Statement[{index}]", trust=trust)
        for index, statement in enumerate(statements)
    )


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise malformed(f"{name} stands twice in one object")
        found[name] = value
    return found


def _statement(statement: object, place: str, *, trust: bool) -> Statement:
    if not isinstance(statement, dict):
        raise malformed(f"{place} must be an object")
    refuse_unknown(statement, _STATEMENT_ELEMENTS, place)
    if not isinstance(statement.get("Sid", ""), str):
        raise malformed(f"{place}.Sid must be a string")
    effect = statement.get("Effect")
    if effect not in ("Allow", "Deny"):
        raise malformed(f"{place}.Effect must be Allow or Deny")
    actions = _matcher(statement, "Action", place, check_action, lower=True)
    if trust:
        for element in ("Resource", "NotResource"):
            if element in statement:
                raise malformed(f"{place}.{element} has no place in a trust policy")
        return Statement(effect == "Allow", actions, lambda text: True, _services(statement, place))
    if "Principal" in statement:
        raise malformed(f"{place}.Principal has no place in a policy of a user or a role")
    resources = _matcher(statement, "Resource", place, check_resource, lower=False)
    return Statement(effect == "Allow", actions, resources, frozenset())


def _matcher(
    statement: dict[str, object],
    element: str,
    place: str,
    check: Callable[[str, str], None],
    *,
    lower: bool,
) -> Matcher:
    """Compile Action or NotAction (or the like), of which exactly one must be there."""
    negated = "Not" + element
    if (element in statement) == (negated in statement):
        raise malformed(f"{place} must have either {element} or {negated}")
    name = element if element in statement else negated
    patterns = strings(statement[name], f"{place}.{name}")
    for pattern in patterns:
        check(pattern, f"{place}.{name}")
    compiled = [compile_pattern(text.lower() if lower else text) for text in patterns]
    if name == negated:
        return lambda text: not any(matches(text) for matches in compiled)
    if len(compiled) == 1:
        return compiled[0]
    return lambda text: any(matches(text) for matches in compiled)


def check_action(pattern: str, place: str) -> None:
    """Refuse what names no action.

    Raises:
        ValidationException: the pattern is neither "*" nor `service:Action`.
    """
    if pattern != "*" and not _ACTION.fullmatch(pattern):
        raise malformed(
            f'{place}: {pattern!r} must be "*" or `service:Action`; the action may hold * and ?'
        )


def check_resource(pattern: str, place: str) -> None:
    """Refuse what names no resource.

    Raises:
        ValidationException: the pattern is neither "*" nor an ARN, or holds a policy variable.
    """
    if "${" in pattern:
        raise malformed(f"{place}: {pattern!r} holds a policy variable, which is not supported")
    if pattern != "*" and not pattern.startswith("arn:"):
        raise malformed(f'{place}: {pattern!r} must be in ARN format or "*"')


def _services(statement: dict[str, object], place: str) -> frozenset[str]:
    principal = statement.get("Principal")
    if principal == "*":
        return frozenset({"*"})
    if not isinstance(principal, dict) or set(principal) != {"Service"}:
        raise malformed(
            f'{place}.Principal must be {{"Service": ...}}; other principals are not supported'
        )
    names = strings(principal["Service"], f"{place}.Principal.Service")
    for name in names:
        if not _SERVICE_PRINCIPAL.fullmatch(name):
            raise malformed(
                f"{place}.Principal.Service: {name!r} is not the name of a service, "
                "such as bedrock.amazonaws.com"
            )
    return frozenset(names)


def strings(value: object, place: str) -> list[str]:
    """Return an element that is a string or a list of strings as a list.

    Raises:
        ValidationException: it is neither, or has an empty string.
    """
    values = value if isinstance(value, list) else [value]
    strings = [item for item in values if isinstance(item, str) and item]
    if not values or len(strings) != len(values):
        raise malformed(f"{place} must be a string or a list of strings, none of them empty")
    return strings


def refuse_unknown(found: dict[str, object], known: frozenset[str], place: str) -> None:
    """Refuse an object with an element that is not known.

    Raises:
        ValidationException: names the first.
    """
    for element in found:
        if element not in known:
            raise malformed(f"{place} holds {element}, which is not supported")


def malformed(reason: str) -> ValidationException:
    """Return the error for a document that cannot be used."""
    return ValidationException(
        f"The policy document is malformed: {reason}.", code="MalformedPolicyDocument"
    )
