"""May this principal do this: the one place that answers it, in AWS's wording.

Reads the principal's policies from the store and asks policy.py. Also lets the service take on the
role that a job names, which only the role's trust policy can allow.
Source: the texts follow the IAM User Guide, "Troubleshoot access denied error messages".
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection

from outcrop.errors import AccessDeniedException, ValidationException
from outcrop.identity.policy import (
    Policy,
    decide,
    parse_policy,
    parse_trust_policy,
    service_may_assume,
)
from outcrop.identity.principals import Principal, find_role, role_principal
from outcrop.store import identity as rows

SERVICE = "bedrock.amazonaws.com"
"""The service principal that a customization role's trust policy must name."""


def authorize(
    connection: Connection,
    principal: Principal,
    action: str,
    resource: str,
) -> None:
    """Refuse unless the principal's policies allow the action on the resource.

    Args:
        action: `service:Operation`, as in `bedrock:GetModelCustomizationJob`.
        resource: the ARN of what is acted on.
    Raises:
        AccessDeniedException: an explicit deny applies, or nothing allows it.
    """
    authorize_all(connection, principal, [(action, resource)])


def authorize_all(
    connection: Connection,
    principal: Principal,
    wanted: Iterable[tuple[str, str]],
) -> None:
    """Refuse unless every one of the (action, resource) pairs is allowed; reads the policies once.

    Raises:
        AccessDeniedException: names the first pair that is not allowed.
    """
    policies = load_policies(connection, principal)
    for action, resource in wanted:
        decision = decide(policies, action, resource)
        if decision != "Allow":
            reason = (
                "with an explicit deny in an identity-based policy"
                if decision == "Deny"
                else f"because no identity-based policy allows the {action} action"
            )
            raise AccessDeniedException(
                f"User: {principal.arn} is not authorized to perform: {action} "
                f"on resource: {resource} {reason}"
            )


def load_policies(connection: Connection, principal: Principal) -> list[Policy]:
    """Return the principal's policies, compiled."""
    documents = rows.policies(connection, principal.account, principal.kind, principal.name)
    return [parse_policy(policy.document) for policy in documents]


def assume_role_for_service(connection: Connection, account: str, role_arn: str) -> Principal:
    """Return the principal of the role that a job is to act as.

    The texts avoid "Could not assume provided IAM role" on purpose: infrastructure tools take it
    as IAM being slow to spread a new role and try again for minutes. Here a role exists as soon as
    it is written, so trying again cannot help.

    Raises:
        ValidationException: the account has no such role, or its trust policy does not let
            bedrock.amazonaws.com assume it.
    """
    role = find_role(connection, account, role_arn)
    if role is None:
        raise ValidationException(
            f"The role {role_arn} does not exist in account {account}. "
            f"Give the ARN of an existing role, such as "
            f"arn:aws:iam::{account}:role/BedrockCustomizationRole."
        )
    if not service_may_assume(parse_trust_policy(role.trust_policy), SERVICE):
        raise ValidationException(
            f"The role {role_arn} cannot be used: its trust policy does not allow "
            f"{SERVICE} the action sts:AssumeRole."
        )
    return role_principal(role)
