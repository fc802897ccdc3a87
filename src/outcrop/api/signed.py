"""An HTTP request as its signature sees it, for every protocol of the gateway."""

from __future__ import annotations

from starlette.requests import Request

from outcrop.wire.signature import SignedRequest


def signed_request(request: Request) -> SignedRequest:
    """Take from a request what its signature covers, exactly as it was sent."""
    raw_path = request.scope.get("raw_path") or request.scope["path"].encode()
    return SignedRequest(
        method=request.method,
        raw_path=raw_path.split(b"?")[0].decode("latin-1"),
        raw_query=request.scope["query_string"].decode("latin-1"),
        headers=[
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw
        ],
    )
