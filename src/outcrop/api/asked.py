"""What an operation asks, found where its request is authenticated.

To resolve a model's id reads the database, and so takes a thread. An operation that says so
beforehand (`asks`) has it done by the thread that has authenticated the request: another hand-over
would cost a part of a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread

from outcrop.api.context import RequestContext
from outcrop.api.targets import Target, resolve

T = TypeVar("T", bound=Callable[..., Any])
_ACTION = "_asks_by"


def asks(action: str) -> Callable[[T], T]:
    """Say that an operation asks the model of its `modelId`.

    Args:
        action: that the caller must be allowed on it, without `bedrock:`.
    """

    def mark(function: T) -> T:
        setattr(function, _ACTION, action)
        return function

    return mark


def look_ahead(
    context: RequestContext, function: Callable[..., Any], params: dict[str, Any]
) -> None:
    """Resolve what an operation asks, in a thread that may read. Raises as `resolve`."""
    action = getattr(function, _ACTION, None)
    if action is not None:
        identifier = params["modelId"]
        context.resolved[identifier, action] = context.services.remembered.get(
            ("target", context.principal, context.region, identifier, action),
            lambda: resolve(context, identifier, action),
        )


async def target_of(context: RequestContext, identifier: str, action: str) -> Target:
    """Return what an id stands for, as it was found beforehand or is found now.

    Raises as `resolve`.
    """
    found: Target | None = context.resolved.get((identifier, action))
    if found is None:
        found = await anyio.to_thread.run_sync(resolve, context, identifier, action)
    return found
