"""What a request claims about who signed it: read, not verified.

Turns the Authorization header, or the query of a presigned URL, into a Signature. Knows no secret
(sigv4.py and sigv2.py verify), no framework and no operation.
Source: AWS IAM User Guide, "AWS Signature Version 4 for API requests"; Amazon S3 API Reference,
"Authenticating Requests (AWS Signature Version 4)" and "List of error codes".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote

from outcrop.errors import ApiError

ALGORITHM = "AWS4-HMAC-SHA256"
UNSIGNED_PAYLOAD = "UNSIGNED-PAYLOAD"
TIMESTAMP_FORMAT = "%Y%m%dT%H%M%SZ"

MAX_PRESIGNED_SECONDS = 604_800
"""The longest life of a presigned URL: 7 days."""

_HEX_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMESTAMP = re.compile(r"[0-9]{8}T[0-9]{6}Z")


@dataclass(frozen=True)
class SignedRequest:
    """What a signature may cover, exactly as it was sent."""

    method: str
    raw_path: str
    """Still percent-encoded, without the query."""
    raw_query: str
    """Without the question mark."""
    headers: Sequence[tuple[str, str]] | Mapping[str, str]
    """Names in lower case, in the order they were sent; a name may occur more than once. Values
    hold the bytes that were sent, as latin-1 (ASGI's way)."""


@dataclass(frozen=True)
class Signature:
    """What a request claims about its signature. Nothing in it is verified."""

    access_key_id: str
    date: str
    """YYYYMMDD of the credential scope."""
    region: str
    service: str
    signed_headers: tuple[str, ...]
    """Lower case, sorted, each once."""
    signature: str
    """64 hexadecimal digits; for version 2, base64."""
    timestamp: datetime
    """When it was signed, UTC; for version 2, when it expires."""
    kind: str
    """`header` or `presigned`; `presigned-v2` for version 2, which names no region."""
    payload_hash: str | None
    """`x-amz-content-sha256` as declared: a digest, UNSIGNED-PAYLOAD or a STREAMING-... word."""
    expires: int | None
    """Seconds that a presigned request is good for."""
    security_token: str | None = field(default=None, repr=False)


def read_signature(request: SignedRequest) -> Signature | None:
    """Return the signature a request claims to have, or None where it is not signed.

    A bearer token is not a signature.
    Raises:
        ApiError: the signature is malformed. S3: AuthorizationHeaderMalformed or
            AuthorizationQueryParametersError 400; others: IncompleteSignatureException 400.
    """
    authorizations = header_values(request, "authorization")
    query = query_pairs(request.raw_query)
    presigned = [(name, value) for name, value in query if name.startswith("X-Amz-")]
    has_query = any(name in ("X-Amz-Algorithm", "X-Amz-Signature") for name, _ in presigned)
    if not authorizations and has_query:
        return _read_presigned(request, presigned)
    if not authorizations:
        return _read_presigned_v2(query)
    if has_query or len(authorizations) > 1:
        raise malformed("", "Only one way to sign a request is allowed in one request.")
    if authorizations[0].lower().startswith("bearer "):
        return None
    return _read_authorization(request, authorizations[0])


def header_values(request: SignedRequest, name: str) -> list[str]:
    """Return the values of a header, in the order they were sent."""
    if isinstance(request.headers, Mapping):
        value = request.headers.get(name)
        return [] if value is None else [value]
    return [value for key, value in request.headers if key == name]


def header_names(request: SignedRequest) -> set[str]:
    """Return the names of all headers."""
    return {key if isinstance(key, str) else key[0] for key in request.headers}


def query_pairs(raw_query: str) -> list[tuple[str, str]]:
    """Split a query; a plus is a space, as every server reads it. Bytes beyond UTF-8 survive."""
    pairs: list[tuple[str, str]] = []
    for part in raw_query.split("&"):
        if part:
            name, _, value = part.replace("+", " ").partition("=")
            pairs.append(
                (unquote(name, errors="surrogateescape"), unquote(value, errors="surrogateescape"))
            )
    return pairs


def _read_authorization(request: SignedRequest, text: str) -> Signature:
    algorithm, _, rest = text.strip().partition(" ")
    scope = re.search(r"/([^/,\s]+)/aws4_", rest)  # errors differ by service, so that first
    service = scope[1] if scope else ""
    if algorithm != ALGORITHM:
        raise malformed(
            service,
            f"The authorization mechanism is not supported. Please use {ALGORITHM}.",
        )
    parts: dict[str, str] = {}
    for item in rest.split(","):
        name, equals, value = item.strip().partition("=")
        if not equals or name in parts:
            raise malformed(service, f"'{item.strip()[:100]}' is not a valid key=value pair.")
        parts[name] = value.strip()
    missing = [name for name in ("Credential", "SignedHeaders", "Signature") if not parts.get(name)]
    if missing:
        needs = " ".join(f"Authorization header requires '{name}' parameter." for name in missing)
        raise malformed(service, needs)
    access_key_id, date, region, service = _credential(parts["Credential"], service, "header")
    stamps = header_values(request, "x-amz-date") or header_values(request, "date")
    if len(stamps) != 1:
        raise malformed(
            service,
            "Authorization header requires existence of either a 'X-Amz-Date' or a 'Date' header, "
            f"once; there are {len(stamps)}.",
        )
    declared = header_values(request, "x-amz-content-sha256")
    return Signature(
        access_key_id=access_key_id,
        date=date,
        region=region,
        service=service,
        signed_headers=_signed_names(parts["SignedHeaders"]),
        signature=_hex_signature(parts["Signature"], service, "header"),
        timestamp=_timestamp(stamps[0], service, "header"),
        kind="header",
        payload_hash=declared[0] if declared else None,
        expires=None,
        security_token=next(iter(header_values(request, "x-amz-security-token")), None),
    )


def _read_presigned(request: SignedRequest, pairs: list[tuple[str, str]]) -> Signature:
    query = dict(pairs)
    fields = query.get("X-Amz-Credential", "").rsplit("/", 4)
    service = fields[3] if len(fields) == 5 else ""
    if len(query) != len(pairs):
        raise bad_query(service, "An X-Amz-... parameter occurs more than once.")
    required = ["X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Signature"]
    required += ["X-Amz-Date", "X-Amz-SignedHeaders", "X-Amz-Expires"]
    if service not in ("", "s3"):
        required.remove("X-Amz-Expires")  # other services take the clock skew for it
    if any(not query.get(name) for name in required):
        raise bad_query(
            service,
            "Query-string authentication version 4 requires the X-Amz-Algorithm, "
            "X-Amz-Credential, X-Amz-Signature, X-Amz-Date, X-Amz-SignedHeaders, and X-Amz-Expires "
            "parameters.",
        )
    if query["X-Amz-Algorithm"] != ALGORITHM:
        raise bad_query(service, f'X-Amz-Algorithm only supports "{ALGORITHM}"')
    access_key_id, date, region, service = _credential(
        query["X-Amz-Credential"], service, "presigned"
    )
    names = _signed_names(query["X-Amz-SignedHeaders"])
    declared = header_values(request, "x-amz-content-sha256")
    if "x-amz-content-sha256" not in names or not declared:
        declared = [query.get("X-Amz-Content-Sha256", UNSIGNED_PAYLOAD)]
    return Signature(
        access_key_id=access_key_id,
        date=date,
        region=region,
        service=service,
        signed_headers=names,
        signature=_hex_signature(query["X-Amz-Signature"], service, "presigned"),
        timestamp=_timestamp(query["X-Amz-Date"], service, "presigned"),
        kind="presigned",
        payload_hash=declared[0],
        expires=_expires(query.get("X-Amz-Expires"), service),
        security_token=query.get("X-Amz-Security-Token"),
    )


def _read_presigned_v2(pairs: list[tuple[str, str]]) -> Signature | None:
    """Read what a version 2 presigned URL claims; it names neither region nor date."""
    query = dict(pairs)
    names = [name for name, _ in pairs]
    if not {"AWSAccessKeyId", "Signature", "Expires"} <= query.keys():
        return None
    for name in ("AWSAccessKeyId", "Signature", "Expires"):
        if names.count(name) != 1:
            raise denied(f"The query parameter {name} occurs more than once.")
    if not re.fullmatch(r"[!-~]+", query["AWSAccessKeyId"]):
        raise denied("The AWSAccessKeyId is mal-formed.")
    try:
        expires_at = datetime.fromtimestamp(int(query["Expires"]), UTC)
    except (ValueError, OverflowError, OSError):
        raise denied(
            f"Invalid date (should be seconds since epoch): {query['Expires'][:50]}"
        ) from None
    return Signature(
        access_key_id=query["AWSAccessKeyId"],
        date="",
        region="",
        service="s3",
        signed_headers=(),
        signature=query["Signature"],
        timestamp=expires_at,
        kind="presigned-v2",
        payload_hash=UNSIGNED_PAYLOAD,
        expires=0,
        security_token=query.get("x-amz-security-token"),
    )


def _credential(text: str, service: str, kind: str) -> tuple[str, str, str, str]:
    fields = text.rsplit("/", 4)
    plain = all(re.fullmatch(r"[!-~]+", item) for item in fields)
    if len(fields) != 5 or not plain or not re.fullmatch(r"[0-9]{8}", fields[1]):
        message = (
            "The Credential is mal-formed; expecting "
            '"<YOUR-AKID>/YYYYMMDD/REGION/SERVICE/aws4_request".'
        )
        raise malformed(service, message) if kind == "header" else bad_query(service, message)
    access_key_id, date, region, service, terminator = fields
    if terminator != "aws4_request":
        message = (
            "Credential should be scoped with a valid terminator: 'aws4_request', "
            f"not '{terminator[:50]}'."
        )
        raise malformed(service, message) if kind == "header" else bad_query(service, message)
    return access_key_id, date, region, service


def _signed_names(text: str) -> tuple[str, ...]:
    return tuple(sorted({name.strip().lower() for name in text.split(";") if name.strip()}))


def _hex_signature(text: str, service: str, kind: str) -> str:
    if not _HEX_SHA256.fullmatch(text):
        message = "The signature must be 64 lower-case hexadecimal digits."
        raise malformed(service, message) if kind == "header" else bad_query(service, message)
    return text


def _timestamp(text: str, service: str, kind: str) -> datetime:
    try:
        if _TIMESTAMP.fullmatch(text):
            return datetime.strptime(text, TIMESTAMP_FORMAT).replace(tzinfo=UTC)
        if kind == "header" and text[:1].isalpha():
            found = parsedate_to_datetime(text)
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        pass
    message = f"Date must be in ISO-8601 'basic format'. Got '{text[:50]}'."
    if kind == "header":
        raise malformed(service, message)
    raise bad_query(
        service,
        "X-Amz-Date must be in the ISO8601 Long Format \"yyyyMMdd'T'HHmmss'Z'\""
        if service == "s3"
        else message,
    )


def _expires(text: str | None, service: str) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise bad_query(service, "X-Amz-Expires should be a number")
    if int(text) > MAX_PRESIGNED_SECONDS:
        raise bad_query(
            service,
            "X-Amz-Expires must be less than a week (in seconds); that is, the given "
            "X-Amz-Expires must be less than 604800 seconds",
        )
    if int(text) < 1:
        raise bad_query(service, "X-Amz-Expires must be a positive number of seconds")
    return int(text)


def malformed(service: str, message: str) -> ApiError:
    """Return the error for an Authorization header that cannot be read."""
    if service == "s3":
        message = f"The authorization header is malformed; {message}"
        return ApiError(message, code="AuthorizationHeaderMalformed", http_status=400)
    return ApiError(message, code="IncompleteSignatureException", http_status=400)


def bad_query(service: str, message: str) -> ApiError:
    """Return the error for a presigned query that cannot be read."""
    if service in ("", "s3"):
        return ApiError(message, code="AuthorizationQueryParametersError", http_status=400)
    return ApiError(message, code="IncompleteSignatureException", http_status=400)


def denied(message: str) -> ApiError:
    """Return S3's error for a signature that is refused whatever the secret."""
    return ApiError(message, code="AccessDenied", http_status=403)
