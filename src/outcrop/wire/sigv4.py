"""Signature Version 4: whether what arrived is what its signer signed.

Checks a claimed signature against a secret the caller looked up, and signs requests of our own.
Knows no identity, no framework and no operation. S3 signs the path as it is sent; every other
service signs it encoded once more.
Source: AWS IAM User Guide, "AWS Signature Version 4 for API requests"; Amazon S3 API Reference,
"Authenticating Requests (AWS Signature Version 4)" and "List of error codes".
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote, unquote_to_bytes

from outcrop.errors import ApiError
from outcrop.wire.signature import (
    ALGORITHM,
    TIMESTAMP_FORMAT,
    UNSIGNED_PAYLOAD,
    Signature,
    SignedRequest,
    bad_query,
    denied,
    header_names,
    header_values,
    malformed,
    query_pairs,
    read_signature,
)
from outcrop.wire.sigv2 import verify_v2

__all__ = [
    "EMPTY_SHA256",
    "STREAMING_SIGNED",
    "STREAMING_SIGNED_TRAILER",
    "STREAMING_UNSIGNED_TRAILER",
    "UNSIGNED_PAYLOAD",
    "Signature",
    "SignedRequest",
    "SigningKey",
    "canonical_query",
    "check_payload_hash",
    "read_signature",
    "s3_path",
    "sign_headers",
    "verify",
]

STREAMING_UNSIGNED_TRAILER = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
STREAMING_SIGNED = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
STREAMING_SIGNED_TRAILER = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()

MAX_CLOCK_SKEW = timedelta(minutes=15)
"""How far a request's time may be from ours, either way."""

_PAYLOAD_WORDS = frozenset(
    {UNSIGNED_PAYLOAD, STREAMING_UNSIGNED_TRAILER, STREAMING_SIGNED, STREAMING_SIGNED_TRAILER}
)
_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNRESERVED = "-_.~"
_NEVER_SIGNED = frozenset({"authorization", "connection", "expect", "transfer-encoding"})


@dataclass(frozen=True)
class SigningKey:
    """What signs the chunks of a body whose head is verified (chunked.py)."""

    key: bytes = field(repr=False)
    timestamp: str
    """`x-amz-date` of the request."""
    scope: str
    """`YYYYMMDD/region/service/aws4_request`."""
    signature: str
    """The signature of the request's head, which the first chunk's signature builds on."""


def verify(
    request: SignedRequest,
    signature: Signature,
    secret: str,
    *,
    body_sha256: str | None,
    now: datetime,
) -> SigningKey:
    """Refuse the request unless `secret` signed it, lately, as it arrived.

    Args:
        body_sha256: the digest of the whole body in hexadecimal. None where the body of an S3
            request has not been read: then the declared digest is what is verified, and the caller
            compares it with the body (`check_payload_hash`) or decodes the chunks.
        now: an aware time.
    Returns:
        The key that signs the chunks of a streamed body.
    Raises:
        ApiError: S3: SignatureDoesNotMatch, RequestTimeTooSkewed or AccessDenied 403,
            AuthorizationHeaderMalformed, AuthorizationQueryParametersError, InvalidArgument,
            InvalidRequest or XAmzContentSHA256Mismatch 400. Others: InvalidSignatureException 403.
    """
    if signature.kind == "presigned-v2":
        verify_v2(request, signature, secret, now=now)
        return SigningKey(b"", "", "", signature.signature)
    _check_signed_headers(request, signature)
    _check_time(signature, now)
    payload = _signed_payload(signature, body_sha256)
    timestamp = signature.timestamp.strftime(TIMESTAMP_FORMAT)
    scope = f"{signature.date}/{signature.region}/{signature.service}/aws4_request"
    key = signing_key(secret, signature.date, signature.region, signature.service)
    headers = [
        (name, ",".join(map(_fold, header_values(request, name))))
        for name in signature.signed_headers
    ]
    matched = False
    for path, query in _canonical_targets(request, signature):
        canonical = canonical_request(request.method, path, query, headers, payload)
        wanted = sign(key, ALGORITHM, timestamp, scope, _sha256(canonical))
        matched = matched or hmac.compare_digest(wanted, signature.signature)
    if not matched:
        raise _mismatch(signature.service)
    if signature.service == "s3" and body_sha256 is not None:
        check_payload_hash(signature.payload_hash, body_sha256)
    return SigningKey(key, timestamp, scope, signature.signature)


def check_payload_hash(declared: str | None, body_sha256: str) -> None:
    """Refuse an S3 body that has another digest than its request declared.

    Raises:
        ApiError: XAmzContentSHA256Mismatch 400. Nothing is compared where no digest was declared.
    """
    if declared is None or declared in _PAYLOAD_WORDS:
        return
    if not hmac.compare_digest(declared, body_sha256):
        raise ApiError(
            "The provided 'x-amz-content-sha256' header does not match what was computed.",
            code="XAmzContentSHA256Mismatch",
            http_status=400,
            members={
                "ClientComputedContentSHA256": declared,
                "S3ComputedContentSHA256": body_sha256,
            },
        )


def sign_headers(
    method: str,
    raw_path: str,
    raw_query: str,
    headers: Mapping[str, str],
    *,
    access_key_id: str,
    secret_access_key: str,
    region: str,
    service: str,
    payload_hash: str,
    now: datetime,
) -> dict[str, str]:
    """Return the headers to add to a request of our own so that it is signed.

    Args:
        raw_path, raw_query: percent-encoded. For S3 both are signed re-encoded, as S3 does it.
        headers: everything that is signed, among them `host`; names in lower case.
        payload_hash: the body's digest, or UNSIGNED_PAYLOAD for S3.
    Returns:
        `x-amz-date`, `authorization` and, for S3, `x-amz-content-sha256`.
    """
    timestamp = now.astimezone(UTC).strftime(TIMESTAMP_FORMAT)
    added = {"x-amz-date": timestamp}
    if service == "s3":
        added["x-amz-content-sha256"] = payload_hash
        path, query = s3_path(raw_path), canonical_query(query_pairs(raw_query))
    else:
        path, query = _double_encoded(raw_path), canonical_query(query_pairs(raw_query))
    signed = sorted(
        (name, _fold(value))
        for name, value in ({**headers, **added}).items()
        if name not in _NEVER_SIGNED
    )
    date = timestamp[:8]
    scope = f"{date}/{region}/{service}/aws4_request"
    canonical = canonical_request(method, path, query, signed, payload_hash)
    key = signing_key(secret_access_key, date, region, service)
    signature = sign(key, ALGORITHM, timestamp, scope, _sha256(canonical))
    names = ";".join(name for name, _ in signed)
    added["authorization"] = (
        f"{ALGORITHM} Credential={access_key_id}/{scope}, SignedHeaders={names}, "
        f"Signature={signature}"
    )
    return added


# --- the algorithm -------------------------------------------------------------------------------


def canonical_request(
    method: str, path: str, query: str, headers: Sequence[tuple[str, str]], payload_hash: str
) -> str:
    """Return the text whose digest is signed; every part is canonical already."""
    lines = "".join(f"{name}:{value}\n" for name, value in headers)
    names = ";".join(name for name, _ in headers)
    return "\n".join((method, path, query, lines, names, payload_hash))


def canonical_query(pairs: Iterable[tuple[str, str]]) -> str:
    """Return decoded name-value pairs encoded and sorted as SigV4 wants them."""
    encoded = sorted((_encode(name), _encode(value)) for name, value in pairs)
    return "&".join(f"{name}={value}" for name, value in encoded)


def _encode(text: str) -> str:
    return quote(text, safe=_UNRESERVED, errors="surrogateescape")


def s3_path(raw_path: str) -> str:
    """Return a path as S3 signs it: decoded, then encoded once, slashes kept."""
    return quote(unquote_to_bytes(raw_path), safe="/" + _UNRESERVED) or "/"


def signing_key(secret: str, date: str, region: str, service: str) -> bytes:
    """Derive the key for one day, region and service from a secret access key."""
    key = ("AWS4" + secret).encode("utf-8")
    for part in (date, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode("utf-8"), "sha256")
    return key


def sign(key: bytes, *lines: str) -> str:
    """Return the signature of a string to sign, given as its lines."""
    return hmac.digest(key, "\n".join(lines).encode("utf-8"), "sha256").hex()


def _sha256(text: str) -> str:
    # Header values hold the bytes that were sent, one character a byte; the rest is ASCII.
    return hashlib.sha256(text.encode("latin-1")).hexdigest()


def _canonical_targets(request: SignedRequest, signature: Signature) -> Iterable[tuple[str, str]]:
    """Yield the forms of path and query that the client may have signed.

    First as they were sent, which is what SDKs sign; then re-encoded, which is what AWS computes,
    for clients between which something re-wrote `%7E` to `~` and the like. Both name the same
    resource, so accepting either gives nothing away.
    """
    drop = {"X-Amz-Signature"} if signature.kind == "presigned" else set()
    sent = sorted(
        pair.partition("=")[::2]
        for pair in request.raw_query.split("&")
        if pair and unquote(pair.partition("=")[0]) not in drop
    )
    raw_query = "&".join(f"{name}={value}" for name, value in sent)
    pairs = [pair for pair in query_pairs(request.raw_query) if pair[0] not in drop]
    encoded_query = canonical_query(pairs)
    if signature.service == "s3":
        raw_path, encoded_path = request.raw_path or "/", s3_path(request.raw_path)
    else:
        raw_path = encoded_path = _double_encoded(request.raw_path)
    yield raw_path, raw_query
    if (raw_path, raw_query) != (encoded_path, encoded_query):
        yield encoded_path, encoded_query


def _double_encoded(raw_path: str) -> str:
    """Return a path without dot segments and doubled slashes, encoded once more."""
    segments: list[str] = []
    for segment in raw_path.split("/"):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment)
    tail = "/" if segments and raw_path.endswith("/") else ""
    return quote("/" + "/".join(segments) + tail, safe="/" + _UNRESERVED)


def _fold(value: str) -> str:
    return " ".join(value.split())


# --- checks on the claim ----------------------------------------------------------------------


def _check_signed_headers(request: SignedRequest, signature: Signature) -> None:
    signed = set(signature.signed_headers)
    if signature.service != "s3":
        if "host" not in signed:
            raise _invalid(
                "'Host' or ':authority' must be a 'SignedHeader' in the AWS Authorization."
            )
        return
    present = {name for name in header_names(request) if name.startswith("x-amz-")}
    unsigned = sorted((present | {"host"}) - signed)
    if unsigned:
        raise ApiError(
            "There were headers present in the request which were not signed",
            code="AccessDenied",
            http_status=403,
            members={"HeadersNotSigned": ", ".join(unsigned)},
        )


def _check_time(signature: Signature, now: datetime) -> None:
    stamp = signature.timestamp.strftime(TIMESTAMP_FORMAT)
    is_s3 = signature.service == "s3"
    if signature.date != stamp[:8]:
        message = (
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from "
            f"HTTP: '{signature.date}' != '{stamp[:8]}', from '{stamp}'."
        )
        if not is_s3:
            raise _invalid(message)
        kind = signature.kind
        raise malformed("s3", message) if kind == "header" else bad_query("s3", message)
    now = now.astimezone(UTC)
    server_time = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    skewed = ApiError(
        "The difference between the request time and the current time is too large.",
        code="RequestTimeTooSkewed",
        http_status=403,
        members={
            "RequestTime": stamp,
            "ServerTime": server_time,
            "MaxAllowedSkewMilliseconds": int(MAX_CLOCK_SKEW.total_seconds() * 1000),
        },
    )
    if signature.timestamp > now + MAX_CLOCK_SKEW:
        if not is_s3:
            latest = (now + MAX_CLOCK_SKEW).strftime(TIMESTAMP_FORMAT)
            raise _invalid(
                f"Signature not yet current: {stamp} is still later than {latest} "
                f"({now.strftime(TIMESTAMP_FORMAT)} + 15 min.)"
            )
        raise skewed if signature.kind == "header" else denied("Request is not yet valid")
    life = timedelta(seconds=signature.expires) if signature.expires else MAX_CLOCK_SKEW
    if now <= signature.timestamp + life:
        return
    if not is_s3:
        raise _invalid(_expired(stamp, now, life))
    if signature.expires is None:
        raise skewed
    raise ApiError(
        "Request has expired",
        code="AccessDenied",
        http_status=403,
        members={
            "X-Amz-Expires": signature.expires,
            "Expires": (signature.timestamp + life).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "ServerTime": server_time,
        },
    )


def _expired(stamp: str, now: datetime, life: timedelta) -> str:
    earliest = (now - life).strftime(TIMESTAMP_FORMAT)
    minutes = f"{life.total_seconds() / 60:g}"
    return (
        f"Signature expired: {stamp} is now earlier than {earliest} "
        f"({now.strftime(TIMESTAMP_FORMAT)} - {minutes} min.)"
    )


def _signed_payload(signature: Signature, body_sha256: str | None) -> str:
    """Return the payload line of the canonical request."""
    declared = signature.payload_hash
    if signature.service != "s3":
        return body_sha256 or EMPTY_SHA256  # what was declared counts for nothing
    if declared is None:
        raise ApiError(
            "Missing required header for this request: x-amz-content-sha256",
            code="InvalidRequest",
            http_status=400,
        )
    if declared not in _PAYLOAD_WORDS and not _HEX_SHA256.fullmatch(declared):
        raise ApiError(
            f"x-amz-content-sha256 must be {', '.join(sorted(_PAYLOAD_WORDS))}, or a valid "
            "sha256 value.",
            code="InvalidArgument",
            http_status=400,
            members={"ArgumentName": "x-amz-content-sha256", "ArgumentValue": declared[:100]},
        )
    return declared


def _invalid(message: str) -> ApiError:
    return ApiError(message, code="InvalidSignatureException", http_status=403)


def _mismatch(service: str) -> ApiError:
    if service == "s3":
        return ApiError(
            "The request signature we calculated does not match the signature you provided. Check "
            "your key and signing method.",
            code="SignatureDoesNotMatch",
            http_status=403,
        )
    return _invalid(
        "The request signature we calculated does not match the signature you provided. Check your "
        "AWS Secret Access Key and signing method. Consult the service documentation for details."
    )
