"""Signature Version 2, for presigned S3 URLs only.

boto3 still makes these by default where no signature version is configured and the region is an
old one, us-east-1 among them; so a program that presigns needs them. Knows no identity. Nothing
else accepts version 2, and it leaves most of a query unsigned; so a query parameter that is neither
signed nor plainly harmless is refused.
Source: Amazon S3 Developer Guide, "Signing and authenticating REST requests", query string request
authentication alternative.
"""

from __future__ import annotations

import base64
import hmac
from datetime import UTC, datetime

from outcrop.errors import ApiError
from outcrop.wire.signature import (
    Signature,
    SignedRequest,
    denied,
    header_names,
    header_values,
    query_pairs,
)

_SIGNED_PARAMETERS = frozenset(
    [
        "accelerate",
        "acl",
        "analytics",
        "cors",
        "defaultObjectAcl",
        "delete",
        "inventory",
        "lifecycle",
        "location",
        "logging",
        "metrics",
        "notification",
        "object-lock",
        "partNumber",
        "policy",
        "replication",
        "requestPayment",
        "response-cache-control",
        "response-content-disposition",
        "response-content-encoding",
        "response-content-language",
        "response-content-type",
        "response-expires",
        "restore",
        "select",
        "select-type",
        "storageClass",
        "tagging",
        "torrent",
        "uploadId",
        "uploads",
        "versionId",
        "versioning",
        "versions",
        "website",
    ]
)
"""Query parameters that version 2 signs, because they say what is asked for."""

_UNSIGNED_PARAMETERS = frozenset(
    [
        "AWSAccessKeyId",
        "Signature",
        "Expires",
        "content-type",
        "content-md5",
        "continuation-token",
        "delimiter",
        "encoding-type",
        "fetch-owner",
        "key-marker",
        "list-type",
        "marker",
        "max-keys",
        "max-parts",
        "max-uploads",
        "part-number-marker",
        "prefix",
        "start-after",
        "upload-id-marker",
        "version-id-marker",
        "x-id",
    ]
)
"""Query parameters that may come unsigned: of the signature itself, and those of listings."""


def verify_v2(request: SignedRequest, signature: Signature, secret: str, *, now: datetime) -> None:
    """Refuse a version 2 presigned request unless `secret` signed it and it has not expired.

    Raises:
        ApiError: AccessDenied or SignatureDoesNotMatch 403.
    """
    pairs = query_pairs(request.raw_query)
    for name, _ in pairs:
        if name not in _SIGNED_PARAMETERS | _UNSIGNED_PARAMETERS and not name.startswith("x-amz-"):
            raise denied(
                f"The query parameter {name[:100]} is not covered by a version 2 signature. "
                "Presign with signature_version='s3v4'."
            )
    if now > signature.timestamp:
        raise ApiError(
            "Request has expired",
            code="AccessDenied",
            http_status=403,
            members={
                "Expires": signature.timestamp.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "ServerTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            },
        )
    # boto3 signs a bucket's path with a slash that it does not send.
    paths = [request.raw_path]
    if "/" not in request.raw_path[1:]:
        paths.append(request.raw_path + "/")
    claimed = signature.signature.encode("utf-8", "surrogateescape")
    matched = False
    for path in paths:
        text = _string_to_sign(request, path, pairs).encode("utf-8", "surrogateescape")
        wanted = base64.b64encode(hmac.digest(secret.encode("utf-8"), text, "sha1"))
        matched = matched or hmac.compare_digest(wanted, claimed)
    if not matched:
        raise ApiError(
            "The request signature we calculated does not match the signature you provided. Check "
            "your key and signing method.",
            code="SignatureDoesNotMatch",
            http_status=403,
        )


def _string_to_sign(request: SignedRequest, path: str, pairs: list[tuple[str, str]]) -> str:
    query = dict(pairs)

    def standard(name: str) -> str:
        values = header_values(request, name)
        return values[0].strip() if values else query.get(name, "")

    # What boto3 signs as a header it sends in the query, where a browser can repeat it.
    amz = {name: value for name, value in pairs if name.startswith("x-amz-")}
    for name in header_names(request):
        if name.startswith("x-amz-"):
            amz[name] = ",".join(value.strip() for value in header_values(request, name))
    lines = [request.method, standard("content-md5"), standard("content-type"), query["Expires"]]
    lines += [f"{name}:{amz[name]}" for name in sorted(amz)]
    return "\n".join([*lines, path + _signed_query(request.raw_query)])


def _signed_query(raw_query: str) -> str:
    parts: list[tuple[str, str]] = []
    for part in raw_query.split("&"):
        for name, value in query_pairs(part):
            if name in _SIGNED_PARAMETERS:
                parts.append((name, f"{name}={value}" if "=" in part else name))
    if not parts:
        return ""
    return "?" + "&".join(text for _, text in sorted(parts, key=lambda item: item[0]))
