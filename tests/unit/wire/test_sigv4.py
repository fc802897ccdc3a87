"""Signatures against botocore's signers."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError
from outcrop.wire import sigv4
from outcrop.wire.sigv4 import Signature, SignedRequest, read_signature, verify

KEY_ID = "AKIAIOSFODNN7EXAMPLE"
SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
SIGNERS = {
    ("s3", "header"): botocore.auth.S3SigV4Auth,
    ("s3", "presigned"): botocore.auth.S3SigV4QueryAuth,
    ("bedrock", "header"): botocore.auth.SigV4Auth,
    ("bedrock", "presigned"): botocore.auth.SigV4QueryAuth,
    ("sts", "header"): botocore.auth.SigV4Auth,
    ("sts", "presigned"): botocore.auth.SigV4QueryAuth,
}


def _now() -> datetime:
    return datetime.now(UTC)


def _signed(
    service: str = "s3",
    kind: str = "header",
    *,
    method: str = "GET",
    path: str = "/bucket/key",
    query: str = "",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
    token: str | None = None,
) -> SignedRequest:
    """Let botocore sign, and return what then arrives."""
    url = f"http://127.0.0.1:7070{path}" + (f"?{query}" if query else "")
    request = AWSRequest(method=method, url=url, headers=headers or {}, data=body)
    signer = SIGNERS[service, kind](Credentials(KEY_ID, SECRET, token), service, "us-east-1")
    signer.add_auth(request)
    parts = urlsplit(request.url)
    received = [("host", "127.0.0.1:7070")]
    received += [(name.lower(), str(value)) for name, value in request.headers.items()]
    return SignedRequest(method, parts.path, parts.query, received)


def _pairs(request: SignedRequest) -> list[tuple[str, str]]:
    assert isinstance(request.headers, list)
    return request.headers


def _verify(request: SignedRequest, *, body: bytes | None = b"", **changes: Any) -> Signature:
    signature = read_signature(request)
    assert signature is not None
    digest = hashlib.sha256(body).hexdigest() if body is not None else None
    options: dict[str, Any] = {"body_sha256": digest, "now": _now()} | changes
    verify(request, signature, options.pop("secret", SECRET), **options)
    return signature


def _code(request: SignedRequest, **changes: Any) -> str:
    with pytest.raises(ApiError) as caught:
        _verify(request, **changes)
    return f"{caught.value.code} {caught.value.http_status}"


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
AWKWARD = st.sampled_from(
    ["a b", "+", "~", "%", "%2F", "//", "..", ".", "é/ü", "*'()!", "=&", "\\"]
)
SEGMENTS = st.lists(st.one_of(TEXT, AWKWARD), max_size=5)
QUERIES = st.lists(st.tuples(st.one_of(TEXT, AWKWARD), st.one_of(TEXT, AWKWARD)), max_size=6)
HEADERS = st.dictionaries(
    st.from_regex(r"x-[a-z]{1,8}", fullmatch=True),
    st.text(alphabet="ab ,;=\t\"'", min_size=1, max_size=12).filter(str.strip),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    which=st.sampled_from(sorted(SIGNERS)),
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE", "HEAD"]),
    segments=SEGMENTS,
    query=QUERIES,
    headers=HEADERS,
    body=st.binary(max_size=50),
    token=st.none() | st.just("to/ken+=="),
    encode=st.sampled_from(["-_.~", "/-_.~"]),
)
def test_what_botocore_signs_is_accepted_and_nothing_else(
    which: tuple[str, str],
    method: str,
    segments: list[str],
    query: list[tuple[str, str]],
    headers: dict[str, str],
    body: bytes,
    token: str | None,
    encode: str,
) -> None:
    service, kind = which
    if kind == "presigned":
        body = b""  # botocore would move a body into the query
    request = _signed(
        service,
        kind,
        method=method,
        path="/" + "/".join(quote(segment, safe=encode) for segment in segments),
        query="&".join(f"{quote(n, safe=encode)}={quote(v, safe=encode)}" for n, v in query),
        headers=headers,
        body=body,
        token=token,
    )
    signature = _verify(request, body=body)
    assert (signature.access_key_id, signature.service) == (KEY_ID, service)
    assert (signature.kind, signature.region) == (kind, "us-east-1")
    assert signature.security_token == token
    mismatch = "SignatureDoesNotMatch 403" if service == "s3" else "InvalidSignatureException 403"
    sent = _pairs(request)
    for changed in (
        SignedRequest("PATCH", request.raw_path, request.raw_query, sent),
        SignedRequest(method, request.raw_path + "x", request.raw_query, sent),
        SignedRequest(method, request.raw_path, request.raw_query + "&z=1", sent),
        SignedRequest(method, request.raw_path, request.raw_query, [("host", "evil"), *sent[1:]]),
    ):
        assert _code(changed, body=body) == mismatch
    assert _code(request, body=body, secret=SECRET + "x") == mismatch


def test_the_headers_values_are_folded_and_joined_as_botocore_does() -> None:
    request = _signed(headers={"x-amz-meta-a": "  two   words \t here "})
    _verify(request)
    sent = [(name, " ".join(value.split())) for name, value in _pairs(request)]
    _verify(SignedRequest("GET", "/bucket/key", "", sent))  # as HTTP servers may pass it on

    twice = AWSRequest(method="GET", url="http://127.0.0.1:7070/", headers={"x-b": "1"})
    twice.headers.add_header("x-b", "2")
    botocore.auth.SigV4Auth(Credentials(KEY_ID, SECRET), "bedrock", "us-east-1").add_auth(twice)
    received = [("host", "127.0.0.1:7070")]
    received += [(name.lower(), str(value)) for name, value in twice.headers.items()]
    _verify(SignedRequest("GET", "/", "", received))
    assert "SignedHeaders" in received[-1][1]
    without = [pair for pair in received if pair != ("x-b", "2")]
    assert _code(SignedRequest("GET", "/", "", without)) == "InvalidSignatureException 403"


def test_headers_may_come_as_a_mapping() -> None:
    request = _signed("bedrock")
    _verify(SignedRequest("GET", request.raw_path, "", dict(request.headers)))


def test_a_path_that_was_written_otherwise_on_the_way_is_still_the_same() -> None:
    signed = _signed(path="/bucket/a%2Bb~c%20d%28e%29", query="prefix=a%20b&x=")
    for path in ("/bucket/a%2Bb%7Ec%20d(e)", "/bucket/a%2bb~c%20d%28e%29"):
        _verify(SignedRequest("GET", path, "x&prefix=a+b", signed.headers))
    other = SignedRequest("GET", "/bucket/a+b~c d", "", signed.headers)
    assert _code(other) == "SignatureDoesNotMatch 403"


def test_a_path_with_dot_segments_is_signed_as_botocore_signs_it() -> None:
    for path in ("/model/../foundation-models", "/../a//b/./c/../d/"):
        _verify(_signed("bedrock", path=path))


def test_unsigned_requests_and_bearer_tokens_are_no_signature() -> None:
    assert read_signature(SignedRequest("GET", "/", "a=b&X-Amz-Meta=1", [])) is None
    assert read_signature(SignedRequest("GET", "/", "", [("authorization", "Bearer abc")])) is None
    assert read_signature(SignedRequest("GET", "/", "", {"authorization": "bearer abc"})) is None


def _with(request: SignedRequest, **headers: str | None) -> SignedRequest:
    """Replace, add or (None) remove headers; underscores stand for dashes."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    kept = [(name, value) for name, value in _pairs(request) if name not in names]
    kept += [(name, value) for name, value in names.items() if value is not None]
    return SignedRequest(request.method, request.raw_path, request.raw_query, kept)


def _authorization(request: SignedRequest, old: str, new: str) -> SignedRequest:
    value = dict(request.headers)["authorization"]
    assert old in value
    return _with(request, authorization=value.replace(old, new))


@pytest.mark.parametrize("service", ["s3", "bedrock"])
def test_a_malformed_header_has_its_code_and_reason(service: str) -> None:
    good = _signed(service, path="/")
    code = (
        "AuthorizationHeaderMalformed 400"
        if service == "s3"
        else "IncompleteSignatureException 400"
    )
    day = _now().strftime("%Y%m%d")
    for old, new in (
        ("Credential=", "credential="),
        ("Signature=", "Sig="),
        ("SignedHeaders=", "SignedHeaders=a,SignedHeaders="),
        (f"/{day}/", "/2026/"),
        ("us-east-1", ""),
        (", Signature", ", ,Signature"),
    ):
        assert _code(_authorization(good, old, new)) == code
    signature = dict(good.headers)["authorization"][-64:]
    assert _code(_authorization(good, signature, signature.upper() + "0")) == code
    for changes in (
        {"x_amz_date": None},
        {"x_amz_date": "2026-01-01T00:00:00Z"},
        {"x_amz_date": "20261301T000000Z"},
        {"x_amz_date": None, "date": "Blursday, 99 Foo"},
    ):
        assert _code(_with(good, **changes)) == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Basic abc",
        "AWS AKIA:sig",
        "AWS4-HMAC-SHA256",
        "AWS4-ECDSA-P256-SHA256 Credential=a",
        "é",
    ],
)
def test_another_mechanism_is_refused(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_signature(SignedRequest("GET", "/", "", {"authorization": text}))
    assert (caught.value.code, caught.value.http_status) == ("IncompleteSignatureException", 400)


def test_two_signatures_in_one_request_are_refused() -> None:
    request = _signed("s3", "presigned")
    both = _with(request, authorization="AWS4-HMAC-SHA256 Credential=x")
    with pytest.raises(ApiError, match="Only one way"):
        read_signature(both)
    twice = [("authorization", "AWS4-HMAC-SHA256 a"), ("authorization", "AWS4-HMAC-SHA256 b")]
    with pytest.raises(ApiError, match="Only one way"):
        read_signature(SignedRequest("GET", "/", "", twice))


def test_the_terminator_and_the_day_of_the_scope_are_checked() -> None:
    for service, code in (
        ("s3", "AuthorizationHeaderMalformed 400"),
        ("bedrock", "IncompleteSignatureException 400"),
    ):
        good = _signed(service, path="/")
        assert _code(_authorization(good, "aws4_request", "aws4_other")) == code
    day = _now().strftime("%Y%m%d")
    assert (
        _code(_authorization(_signed("s3"), f"/{day}/", "/20200101/"))
        == "AuthorizationHeaderMalformed 400"
    )
    with pytest.raises(ApiError, match="Date in Credential scope does not match") as caught:
        _verify(_authorization(_signed("bedrock"), f"/{day}/", "/20200101/"))
    assert caught.value.code == "InvalidSignatureException"
    presigned = _signed("s3", "presigned")
    changed = SignedRequest(
        "GET", "/bucket/key", presigned.raw_query.replace(f"%2F{day}%2F", "%2F20200101%2F"),
        presigned.headers,
    )  # fmt: skip
    assert _code(changed) == "AuthorizationQueryParametersError 400"


def test_a_clock_may_be_fifteen_minutes_off_and_no_more() -> None:
    for service, code in (
        ("s3", "RequestTimeTooSkewed 403"),
        ("sts", "InvalidSignatureException 403"),
    ):
        request = _signed(service, path="/")
        for minutes in (-14.9, 14.9):
            _verify(request, now=_now() + timedelta(minutes=minutes))
        for minutes in (-15.1, 15.1, 60 * 24 * 365):
            assert _code(request, now=_now() + timedelta(minutes=minutes)) == code
    request = _signed("bedrock")
    late = _now().replace(microsecond=0) + timedelta(minutes=16)
    with pytest.raises(ApiError) as caught:
        _verify(request, now=late)
    stamp = dict(request.headers)["x-amz-date"]
    earliest = (late - timedelta(minutes=15)).strftime("%Y%m%dT%H%M%SZ")
    assert caught.value.message == (
        f"Signature expired: {stamp} is now earlier than {earliest} "
        f"({late.strftime('%Y%m%dT%H%M%SZ')} - 15 min.)"
    )
    with pytest.raises(ApiError, match=r"Signature not yet current: .* is still later than"):
        _verify(request, now=_now() - timedelta(minutes=16))


def test_the_date_header_does_where_x_amz_date_is_absent() -> None:
    # botocore's signer cannot be told to leave x-amz-date out, so this is written out.
    date, stamp = "Fri, 02 Jan 2026 03:04:05 GMT", "20260102T030405Z"
    key = sigv4.signing_key(SECRET, stamp[:8], "us-east-1", "bedrock")
    canonical = f"GET\n/\n\ndate:{date}\nhost:h\n\ndate;host\n{sigv4.EMPTY_SHA256}"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    scope = f"{stamp[:8]}/us-east-1/bedrock/aws4_request"
    signed = sigv4.sign(key, "AWS4-HMAC-SHA256", stamp, scope, digest)
    text = (
        f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{scope},SignedHeaders=host;date,Signature={signed}"
    )
    request = SignedRequest(
        "GET", "/", "", [("host", "h"), ("date", date), ("authorization", text)]
    )
    _verify(request, now=datetime(2026, 1, 2, 3, 5, tzinfo=UTC))
    assert _code(request) == "InvalidSignatureException 403"  # long ago


def _requery(request: SignedRequest, **changes: str | None) -> SignedRequest:
    pairs = [(name, changes.get(name[6:], value)) for name, value in parse_qsl(request.raw_query)]
    query = urlencode([(name, value) for name, value in pairs if value is not None])
    return SignedRequest(request.method, request.raw_path, query, request.headers)


def test_a_presigned_url_lives_as_long_as_it_says() -> None:
    request = _signed("s3", "presigned")  # botocore's default is an hour
    _verify(request, now=_now() + timedelta(minutes=59))
    late = _now() + timedelta(minutes=61)
    assert _code(request, now=late) == "AccessDenied 403"
    with pytest.raises(ApiError, match="Request has expired"):
        _verify(request, now=late)
    with pytest.raises(ApiError, match="not yet valid"):
        _verify(request, now=_now() - timedelta(minutes=20))
    sts = _signed("sts", "presigned", path="/", query="Action=GetCallerIdentity")
    _verify(sts, now=_now() + timedelta(minutes=59))
    assert _code(sts, now=late) == "InvalidSignatureException 403"
    assert _code(sts, now=_now() - timedelta(minutes=20)) == "InvalidSignatureException 403"


@pytest.mark.parametrize(
    "changes",
    [
        {"Expires": "0"},
        {"Expires": "-1"},
        {"Expires": "604801"},
        {"Expires": "soon"},
        {"Expires": "9" * 30},
        {"Expires": None},
        {"Algorithm": "AWS4-ECDSA-P256-SHA256"},
        {"Algorithm": None},
        {"Credential": "AKIA/us-east-1/s3/aws4_request"},
        {"Credential": None},
        {"Date": "2026-01-01T00:00:00Z"},
        {"Date": "Fri, 02 Jan 2026 03:04:05 GMT"},
        {"SignedHeaders": None},
        {"Signature": "xyz"},
    ],
)
def test_a_malformed_presigned_query_has_s3s_code(changes: dict[str, str | None]) -> None:
    request = _requery(_signed("s3", "presigned"), **changes)
    assert _code(request) == "AuthorizationQueryParametersError 400"


def test_a_presigned_parameter_may_not_occur_twice() -> None:
    request = _signed("s3", "presigned")
    twice = SignedRequest(
        "GET", request.raw_path, request.raw_query + "&X-Amz-Expires=604800", request.headers
    )
    assert _code(twice) == "AuthorizationQueryParametersError 400"


def test_the_longest_life_is_a_week_and_other_services_may_leave_it_out() -> None:
    request = AWSRequest(method="GET", url="http://127.0.0.1:7070/b/k")
    signer = botocore.auth.S3SigV4QueryAuth(
        Credentials(KEY_ID, SECRET), "s3", "us-east-1", expires=604800
    )
    signer.add_auth(request)
    parts = urlsplit(request.url)
    arrived = SignedRequest("GET", parts.path, parts.query, {"host": "127.0.0.1:7070"})
    assert _verify(arrived, now=_now() + timedelta(days=6)).expires == 604800
    sts = _requery(_signed("sts", "presigned", path="/"), Expires=None)
    signature = read_signature(sts)
    assert signature is not None
    assert signature.expires is None
    assert _code(_requery(sts, Date="x")) == "IncompleteSignatureException 400"


def test_s3_demands_that_host_and_every_amz_header_are_signed() -> None:
    request = _with(_signed(), x_amz_acl="public-read")
    with pytest.raises(ApiError) as caught:
        _verify(request)
    assert (caught.value.code, caught.value.http_status) == ("AccessDenied", 403)
    assert caught.value.members == {"HeadersNotSigned": "x-amz-acl"}
    unsigned_host = _authorization(_signed(), "SignedHeaders=host;", "SignedHeaders=")
    assert _code(unsigned_host) == "AccessDenied 403"
    presigned = _with(_signed("s3", "presigned"), x_amz_acl="public-read")
    assert _code(presigned) == "AccessDenied 403"


def test_other_services_demand_the_host_and_let_other_headers_be() -> None:
    request = _signed("bedrock")
    _verify(_with(request, x_amz_user_agent="sdk/1", x_forwarded_for="127.0.0.1"))
    unsigned_host = _authorization(request, "SignedHeaders=host;", "SignedHeaders=")
    with pytest.raises(ApiError, match="'Host' or ':authority' must be"):
        _verify(unsigned_host)


def test_the_body_is_what_was_signed() -> None:
    body = b'{"jobName": "a"}'
    for service in ("bedrock", "sts"):
        request = _signed(service, method="POST", path="/", body=body)
        _verify(request, body=body)
        assert _code(request, body=body + b" ") == "InvalidSignatureException 403"
        # A declared digest counts for nothing: ours is computed.
        declared = _with(request, x_amz_content_sha256=hashlib.sha256(b"evil").hexdigest())
        _verify(declared, body=body)
    upload = _signed("s3", method="PUT", body=body)
    _verify(upload, body=body)
    signature = _verify(upload, body=None)  # not read yet: the declared digest is verified
    assert signature.payload_hash == hashlib.sha256(body).hexdigest()
    with pytest.raises(ApiError) as caught:
        _verify(upload, body=b"other")
    assert (caught.value.code, caught.value.http_status) == ("XAmzContentSHA256Mismatch", 400)
    assert caught.value.members["S3ComputedContentSHA256"] == hashlib.sha256(b"other").hexdigest()


def test_s3_knows_the_words_for_bodies_without_a_digest() -> None:
    options = {"access_key_id": KEY_ID, "secret_access_key": SECRET, "region": "us-east-1"}
    for word, accepted in (
        ("UNSIGNED-PAYLOAD", True),
        ("STREAMING-UNSIGNED-PAYLOAD-TRAILER", True),
        ("STREAMING-AWS4-HMAC-SHA256-PAYLOAD", True),
        ("STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER", True),
        ("STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD", False),
        ("A" * 64, False),
        ("", False),
    ):
        headers = {"host": "h"}
        added = sigv4.sign_headers(
            "PUT", "/b/k", "", headers, service="s3", payload_hash=word, now=_now(), **options
        )
        request = SignedRequest("PUT", "/b/k", "", headers | added)
        if accepted:
            assert _verify(request, body=b"anything").payload_hash == word
        else:
            assert _code(request, body=b"anything") == "InvalidArgument 400"
    missing = _with(_signed(), x_amz_content_sha256=None)
    assert _code(_authorization(missing, "x-amz-content-sha256;", "")) == "InvalidRequest 400"


def test_a_presigned_upload_may_bind_its_body() -> None:
    digest = hashlib.sha256(b"data").hexdigest()
    request = _signed("s3", "presigned", method="PUT")
    assert _verify(request, body=b"anything").payload_hash == "UNSIGNED-PAYLOAD"
    signature = read_signature(_requery(request, SignedHeaders="host;x-amz-content-sha256"))
    assert signature is not None
    bound = SignedRequest(
        "PUT", request.raw_path,
        _requery(request, SignedHeaders="host;x-amz-content-sha256").raw_query,
        [*request.headers, ("x-amz-content-sha256", digest)],
    )  # fmt: skip
    signature = read_signature(bound)
    assert signature is not None
    assert signature.payload_hash == digest
    assert _code(bound, body=b"data") == "SignatureDoesNotMatch 403"


def test_the_published_example_of_aws() -> None:
    # Amazon S3 API Reference, "Signature Calculations ... Examples", GET object.
    now = datetime(2013, 5, 24, tzinfo=UTC)
    added = sigv4.sign_headers(
        "GET",
        "/test.txt",
        "",
        {"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"},
        access_key_id=KEY_ID,
        secret_access_key=SECRET,
        region="us-east-1",
        service="s3",
        payload_hash=sigv4.EMPTY_SHA256,
        now=now,
    )
    assert added["authorization"].endswith(
        "Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    )


@settings(max_examples=80, deadline=None)
@given(segments=SEGMENTS, query=QUERIES, service=st.sampled_from(["s3", "bedrock"]))
def test_what_we_sign_is_what_botocore_signs(
    segments: list[str], query: list[tuple[str, str]], service: str
) -> None:
    path = "/" + "/".join(quote(segment, safe="-_.~") for segment in segments)
    path = path.replace("%2F", "/") if service == "s3" else path
    raw_query = "&".join(f"{quote(n, safe='-_.~')}={quote(v, safe='-_.~')}" for n, v in query if n)
    theirs = dict(_signed(service, path=path, query=raw_query).headers)
    now = datetime.strptime(theirs["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    ours = sigv4.sign_headers(
        "GET", path, raw_query, {"host": "127.0.0.1:7070"}, access_key_id=KEY_ID,
        secret_access_key=SECRET, region="us-east-1", service=service,
        payload_hash=sigv4.EMPTY_SHA256, now=now,
    )  # fmt: skip
    assert ours["authorization"] == theirs["authorization"]


PIECES = st.one_of(
    st.sampled_from(
        [
            "Credential=a/20260101/r/s3/aws4_request",
            "Credential=a/99991231/r/sts/aws4_request",
            "Credential=a/b/c/d/aws4_request",
            "SignedHeaders=host",
            f"Signature={'0' * 64}",
        ]
    ),
    st.text(alphabet="=,/ a"),
)
ENCODED = st.binary(max_size=6).map(quote)
PARAMETERS = {
    "Algorithm": st.sampled_from(["AWS4-HMAC-SHA256", "x"]),
    "Credential": st.builds(
        "{}/{}/{}/{}/aws4_request".format,
        st.just("a") | ENCODED,
        st.sampled_from(["20260101", "99991231", "x"]),
        st.just("us-east-1") | ENCODED,
        st.sampled_from(["s3", "sts"]) | ENCODED,
    ).map(lambda text: quote(text, safe="%")),
    "Date": st.sampled_from(["20260101T000000Z", "99991231T235959Z", "00010101T000000Z"]),
    "Expires": st.sampled_from(["1", "604800", "x"]),
    "SignedHeaders": st.sampled_from(["host", "host%3Bx-%FF"]) | ENCODED,
    "Signature": st.just("0" * 64) | ENCODED,
}


@settings(max_examples=300, deadline=None)
@given(
    authorization=st.none()
    | st.text()
    | st.lists(PIECES).map(lambda parts: "AWS4-HMAC-SHA256 " + ",".join(parts)),
    query=st.one_of(
        st.text(),
        st.builds(
            lambda known, other: "&".join(
                [*(f"X-Amz-{name}={value}" for name, value in known.items()), other]
            ),
            st.fixed_dictionaries(PARAMETERS),
            ENCODED,
        ),
        ENCODED.map(lambda text: f"AWSAccessKeyId={text}&Signature={text}&Expires=9999999999"),
    ),
    path=st.text(st.characters(max_codepoint=255)),
    date=st.text() | st.sampled_from(["20260101T000000Z", "99991231T235959Z"]),
    now=st.sampled_from([datetime(2026, 1, 1, tzinfo=UTC), datetime(9999, 12, 1, tzinfo=UTC)]),
)
def test_no_claim_raises_anything_but_an_api_error(
    authorization: str | None, query: str, path: str, date: str, now: datetime
) -> None:
    headers = [("host", "h"), ("x-amz-date", date)]
    if authorization is not None:
        headers.append(("authorization", authorization))
    request = SignedRequest("GET", path, query, headers)
    accepted = False
    try:
        signature = read_signature(request)
        if signature is not None:
            assert signature.access_key_id.isascii()  # it is looked up in a database
            verify(request, signature, SECRET, body_sha256=None, now=now)
            accepted = True
    except ApiError:
        pass
    assert not accepted


def test_header_values_are_signed_as_the_bytes_that_were_sent() -> None:
    value = "größe"  # a client that sends UTF-8 signs UTF-8; a server sees latin-1
    theirs = value.encode("utf-8").decode("latin-1")
    added = sigv4.sign_headers(
        "GET", "/b/k", "", {"host": "h", "x-amz-meta-a": theirs}, access_key_id=KEY_ID,
        secret_access_key=SECRET, region="us-east-1", service="s3",
        payload_hash=sigv4.UNSIGNED_PAYLOAD, now=_now(),
    )  # fmt: skip
    request = _signed(headers={"x-amz-meta-a": value})
    _verify(_with(request, x_amz_meta_a=theirs))
    _verify(SignedRequest("GET", "/b/k", "", {"host": "h", "x-amz-meta-a": theirs} | added))


def test_keys_are_not_shown() -> None:
    request = _signed(token="session-secret")
    signature = read_signature(request)
    assert signature is not None
    key = verify(request, signature, SECRET, body_sha256=sigv4.EMPTY_SHA256, now=_now())
    assert repr(key.key) not in repr(key)
    assert "session-secret" not in repr(signature)
