"""Policies: what they decide, and what is refused when one is saved."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.errors import ValidationException
from outcrop.identity.policy import (
    check_policy,
    check_trust_policy,
    compile_pattern,
    decide,
    parse_policy,
    parse_trust_policy,
    service_may_assume,
)

TRUST = {
    "Effect": "Allow",
    "Principal": {"Service": "bedrock.amazonaws.com"},
    "Action": "sts:AssumeRole",
}


def document(*statements: dict[str, Any], version: str = "2012-10-17") -> str:
    return json.dumps({"Version": version, "Statement": list(statements)})


def allow(action: Any, resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def deny(action: Any, resource: Any = "*") -> dict[str, Any]:
    return {"Effect": "Deny", "Action": action, "Resource": resource}


# --- patterns -------------------------------------------------------------------------------------


def naive_match(pattern: str, text: str) -> bool:
    """The definition of a pattern, without care for time."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(naive_match(pattern[1:], text[start:]) for start in range(len(text) + 1))
    return bool(text) and pattern[0] in ("?", text[0]) and naive_match(pattern[1:], text[1:])


@given(st.text("ab?*\\.\n", max_size=9), st.text("ab?*\\.\n", max_size=9))
def test_pattern_matches_as_defined(pattern: str, text: str) -> None:
    assert compile_pattern(pattern)(text) == naive_match(pattern, text)


@given(st.text("ab?*", max_size=8), st.text("ab", max_size=8))
def test_pattern_matches_as_defined_on_few_letters(pattern: str, text: str) -> None:
    assert compile_pattern(pattern)(text) == naive_match(pattern, text)


@pytest.mark.parametrize("pattern", ["*a" * 2000 + "b", "*?" * 2000 + "b", "a*" * 3000 + "??b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    started = time.perf_counter()
    assert not compile_pattern(pattern)("a" * 5000)
    assert time.perf_counter() - started < 2.0


# --- decisions ------------------------------------------------------------------------------------

ARN = "arn:aws:bedrock:us-east-1:123456789012:custom-model/amazon.titan/abcdefghijkl"


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([], "ImplicitDeny"),
        ([allow("*")], "Allow"),
        ([allow("bedrock:*")], "Allow"),
        ([allow("BEDROCK:invokemodel")], "Allow"),
        ([allow("bedrock:Invoke?odel")], "Allow"),
        ([allow("bedrock:InvokeModelX")], "ImplicitDeny"),
        ([allow(["s3:*", "bedrock:InvokeModel"])], "Allow"),
        ([allow("*", ARN)], "Allow"),
        ([allow("*", ARN.upper().replace("ARN:", "arn:", 1))], "ImplicitDeny"),
        ([allow("*", "arn:aws:bedrock:*:*:custom-model/*")], "Allow"),
        ([allow("*", "arn:aws:s3:::*")], "ImplicitDeny"),
        ([allow("*"), deny("bedrock:Invoke*")], "Deny"),
        ([deny("bedrock:Invoke*"), allow("*")], "Deny"),
        ([allow("*"), deny("bedrock:Delete*")], "Allow"),
        ([{"Effect": "Allow", "NotAction": "iam:*", "Resource": "*"}], "Allow"),
        ([{"Effect": "Allow", "NotAction": "bedrock:*", "Resource": "*"}], "ImplicitDeny"),
        ([{"Effect": "Allow", "Action": "*", "NotResource": ARN}], "ImplicitDeny"),
        (
            [allow("*"), {"Effect": "Deny", "Action": "*", "NotResource": "arn:aws:s3:::*"}],
            "Deny",
        ),
    ],
)
def test_decision(statements: list[dict[str, Any]], expected: str) -> None:
    policies = [parse_policy(document(statement)) for statement in statements]
    assert decide(policies, "bedrock:InvokeModel", ARN) == expected
    if statements:
        together = [parse_policy(document(*statements))]
        assert decide(together, "bedrock:InvokeModel", ARN) == expected


def naive_decide(statements: list[dict[str, Any]], action: str, resource: str) -> str:
    """The rules as IAM's guide states them, one after the other."""

    def hits(statement: dict[str, Any], element: str, text: str, lower: bool) -> bool:
        if element in statement:
            return any(
                naive_match(pattern.lower() if lower else pattern, text.lower() if lower else text)
                for pattern in statement[element]
            )
        return not hits({element: statement["Not" + element]}, element, text, lower)

    applying = [
        statement["Effect"]
        for statement in statements
        if hits(statement, "Action", action, True) and hits(statement, "Resource", resource, False)
    ]
    if "Deny" in applying:
        return "Deny"
    return "Allow" if "Allow" in applying else "ImplicitDeny"


ACTIONS = st.lists(st.from_regex(r"[ab]:[AaBb*?]{1,3}|\*", fullmatch=True), min_size=1, max_size=2)
RESOURCES = st.lists(st.from_regex(r"arn:[ab*?]{0,3}|\*", fullmatch=True), min_size=1, max_size=2)


@st.composite
def statements_(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "Effect": draw(st.sampled_from(["Allow", "Deny"])),
        draw(st.sampled_from(["Action", "NotAction"])): draw(ACTIONS),
        draw(st.sampled_from(["Resource", "NotResource"])): draw(RESOURCES),
    }


@given(
    st.lists(statements_(), min_size=1, max_size=4),
    st.from_regex(r"[ab]:[AaBb]{1,3}", fullmatch=True),
    st.from_regex(r"arn:[ab]{0,3}", fullmatch=True),
)
def test_decision_is_that_of_the_rules(
    statements: list[dict[str, Any]], action: str, resource: str
) -> None:
    expected = naive_decide(statements, action, resource)
    assert decide([parse_policy(document(*statements))], action, resource) == expected
    apart = [parse_policy(document(statement)) for statement in statements]
    assert decide(apart, action, resource) == expected


# --- what is refused when it is saved -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "not JSON"),
        ("[" * 10_000, "not JSON"),
        ("[]", "JSON object"),
        ("{}", "Statement"),
        ('{"Statement": []}', "Statement"),
        ('{"Statement": [1]}', "Statement[0]"),
        (document(version="2020-01-01"), "Version"),
        (json.dumps({"Statement": [allow("*")], "Rules": 1}), "Rules"),
        (document(allow("*", Condition={"Bool": {"aws:SecureTransport": "true"}})), "Condition"),
        (document(allow("*", Conditions={})), "Conditions"),
        (document(allow("*", Principal="*")), "Principal"),
        (document(allow("*", Sid=1)), "Sid"),
        (document(allow("*", NotAction="*")), "Action"),
        (document(allow("*", NotResource="*")), "Resource"),
        (document({"Effect": "Allow", "Action": "*"}), "Resource"),
        (document({"Effect": "Allow", "Resource": "*"}), "Action"),
        (document({"Effect": "allow", "Action": "*", "Resource": "*"}), "Effect"),
        (document(allow([])), "Action"),
        (document(allow(["s3:*", 1])), "Action"),
        (document(allow("")), "Action"),
        (document(allow("GetObject")), "Action"),
        (document(allow("s*:GetObject")), "Action"),
        (document(allow("s3:Get Object")), "Action"),
        (document(allow("*", "bucket")), "Resource"),
        (document(allow("*", "arn:aws:s3:::home/${aws:username}/*")), "variable"),
        ('{"Statement": {"Effect": "Deny", "Effect": "Allow"}}', "Effect stands twice"),
        (document(allow("*", "arn:" + "x" * 20_000)), "characters"),
    ],
)
def test_policy_that_cannot_be_decided_on_in_full_is_refused(text: str, names: str) -> None:
    with pytest.raises(ValidationException) as error:
        check_policy(text)
    assert names in error.value.message
    assert error.value.code == "MalformedPolicyDocument"


@given(
    st.recursive(
        st.none() | st.text() | st.integers(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["Version", "Statement", "Effect", "Action", "Resource", "Principal"]
                ),
                x,
            )
        ),
    )
)
def test_any_document_is_taken_or_refused(value: Any) -> None:
    for check in (check_policy, check_trust_policy):
        with contextlib.suppress(ValidationException):
            check(json.dumps(value))
            assert value["Statement"]


# --- trust policies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([TRUST], True),
        ([{**TRUST, "Action": ["sts:AssumeRole", "sts:TagSession"]}], True),
        (
            [{**TRUST, "Principal": {"Service": ["s3.amazonaws.com", "bedrock.amazonaws.com"]}}],
            True,
        ),
        ([{**TRUST, "Principal": {"Service": "ec2.amazonaws.com"}}], False),
        ([{**TRUST, "Action": "sts:TagSession"}], False),
        ([{**TRUST, "Principal": "*"}], False),
        ([TRUST, {**TRUST, "Effect": "Deny"}], False),
        ([TRUST, {**TRUST, "Effect": "Deny", "Principal": "*"}], False),
        ([TRUST, {**TRUST, "Effect": "Deny", "Action": "sts:TagSession"}], True),
    ],
)
def test_service_must_be_named_to_assume_a_role(
    statements: list[dict[str, Any]], expected: bool
) -> None:
    trust = parse_trust_policy(document(*statements))
    assert service_may_assume(trust, "bedrock.amazonaws.com") is expected


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ({**TRUST, "Resource": "*"}, "Resource"),
        ({**TRUST, "Condition": {}}, "Condition"),
        ({**TRUST, "Principal": {"AWS": "*"}}, "Principal"),
        ({**TRUST, "Principal": {"Service": "bedrock"}}, "Principal.Service"),
        ({"Effect": "Allow", "Action": "sts:AssumeRole"}, "Principal"),
    ],
)
def test_trust_policy_that_cannot_be_decided_on_in_full_is_refused(
    statement: dict[str, Any], names: str
) -> None:
    with pytest.raises(ValidationException, match=names):
        check_trust_policy(document(statement))
