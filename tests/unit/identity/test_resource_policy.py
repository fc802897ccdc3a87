"""A resource policy is IAM's JSON with principals, or is refused with the element that is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outcrop.errors import ValidationException
from outcrop.identity.resource_policy import MAX_CHARACTERS, check_resource_policy

STATEMENT: dict[str, Any] = {
    "Sid": "Share",
    "Effect": "Allow",
    "Principal": {"AWS": ["arn:aws:iam::210987654321:root"], "Service": "bedrock.amazonaws.com"},
    "Action": ["bedrock:InvokeModel", "bedrock:GetCustomModel*"],
    "Resource": "arn:aws:bedrock:us-east-1:123456789012:custom-model/*",
    "Condition": {"StringEquals": {"aws:SourceAccount": ["1", "2"]}, "Bool": {"aws:X": True}},
}


def document(*statements: object, **elements: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements), **elements})


def without(name: str, **others: Any) -> dict[str, Any]:
    return {key: value for key, value in STATEMENT.items() if key != name} | others


@pytest.mark.parametrize(
    "text",
    [
        document(STATEMENT),
        document(STATEMENT, {**STATEMENT, "Effect": "Deny"}, Id="id"),
        document(Statement=STATEMENT),
        document(without("Principal", NotPrincipal={"AWS": "*"})),
        document(without("Principal", Principal="*")),
        document(without("Action", NotAction="bedrock:*")),
        document(without("Resource", NotResource="*")),
        document(without("Condition")),
    ],
)
def test_a_policy_of_iams_grammar_is_taken(text: str) -> None:
    check_resource_policy(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not JSON"),
        ('{"Version": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 20_000, "not JSON"),
        ("[]", "must be a JSON object"),
        ('{"Statement": [], "Statement": []}', "Statement stands twice"),
        (document(), "Statement must be an object or a list of at least one"),
        (document(STATEMENT, Version="2020-01-01"), "Version must be one of"),
        (document(STATEMENT, Extra=1), "holds Extra"),
        (document("Allow"), r"Statement\[0\] must be an object"),
        (document(STATEMENT, {**STATEMENT, "Effekt": 1}), r"Statement\[1\] holds Effekt"),
        (document({**STATEMENT, "Effect": "Maybe"}), "Effect must be Allow or Deny"),
        (document({**STATEMENT, "Sid": 1}), "Sid must be a string"),
        (document(without("Principal")), "either Principal or NotPrincipal"),
        (document({**STATEMENT, "NotAction": "*"}), "either Action or NotAction"),
        (document({**STATEMENT, "Principal": []}), r'Principal must be "\*" or an object'),
        (document({**STATEMENT, "Principal": {"User": "a"}}), "Principal holds User"),
        (document({**STATEMENT, "Principal": {"AWS": []}}), "Principal.AWS must be a string or"),
        (document({**STATEMENT, "Action": "Invoke"}), "Action: 'Invoke' must be"),
        (document({**STATEMENT, "Resource": "model"}), "Resource: 'model' must be in ARN"),
        (document({**STATEMENT, "Condition": []}), "Condition must be an object of operators"),
        (document({**STATEMENT, "Condition": {"Bool": True}}), "Condition.Bool must be an object"),
        (document({**STATEMENT, "Condition": {"Bool": {"k": [{}]}}}), "Bool.k must be a string"),
        (document({**STATEMENT, "Sid": "x" * MAX_CHARACTERS}), f"{MAX_CHARACTERS} are allowed"),
    ],
)
def test_what_is_no_policy_is_refused_with_the_element(text: str, named: str) -> None:
    with pytest.raises(ValidationException, match=named) as refused:
        check_resource_policy(text)
    assert refused.value.code == "ValidationException"
