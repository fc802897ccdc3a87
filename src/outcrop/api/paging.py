"""Tokens of paged lists: opaque, bound to their list, and proof against tampering.

A token carries where the next page begins, and a keyed digest over it, the caller's account and
region, the operation and every filter of the request. A token that was changed, or comes from
another list, is refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from outcrop.api.context import RequestContext
from outcrop.errors import ValidationException

DEFAULT_PAGE_SIZE = 100
_DIGEST_BYTES = 16

Position = tuple[int, str]
"""Creation instant in microseconds and id of the last resource of a page."""


def page_size(params: Mapping[str, Any]) -> int:
    """Return `maxResults`, or the default of 100."""
    return int(params.get("maxResults", DEFAULT_PAGE_SIZE))


def make_token(context: RequestContext, params: Mapping[str, Any], position: Position) -> str:
    """Return the token with which the page after `position` is asked for."""
    payload = json.dumps(position, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_digest(context, params, payload) + payload).decode()


def read_token(context: RequestContext, params: Mapping[str, Any]) -> Position | None:
    """Return where the asked page begins, or None for the first page.

    Raises:
        ValidationException: `nextToken` was not made by this service for this very list.
    """
    token = params.get("nextToken")
    if token is None:
        return None
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        digest, payload = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
        if hmac.compare_digest(digest, _digest(context, params, payload)):
            created, identifier = json.loads(payload)
            position = int(created), str(identifier)
            # The last character can hold bits that decoding drops; one changed is a changed token.
            if make_token(context, params, position) == token:
                return position
    except ValueError:
        pass
    raise ValidationException(
        "The provided nextToken is invalid. Use the token of the preceding page, with the same "
        "filters."
    )


def _digest(context: RequestContext, params: Mapping[str, Any], payload: bytes) -> bytes:
    filters = {
        name: str(value)
        for name, value in params.items()
        if name not in ("nextToken", "maxResults")
    }
    scope = [context.account, context.region, context.operation, filters]
    message = json.dumps(scope, sort_keys=True).encode() + b"\0" + payload
    return hmac.new(context.services.page_key, message, hashlib.sha256).digest()[:_DIGEST_BYTES]
