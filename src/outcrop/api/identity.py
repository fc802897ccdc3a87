"""The one operation of STS that clients call here: who am I."""

from __future__ import annotations

from typing import Any

from outcrop.api.context import RequestContext


def get_caller_identity(context: RequestContext, params: dict[str, Any]) -> dict[str, Any]:
    """Name the caller. As in AWS, no permission is needed for it."""
    principal = context.principal
    return {
        "UserId": principal.access_key_id or principal.name,
        "Account": principal.account,
        "Arn": principal.arn,
    }
