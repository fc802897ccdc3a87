"""aws-chunked bodies, decoded as they arrive."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import tracemalloc
import zlib
from collections.abc import Sequence

import pytest
from botocore.httpchecksum import AwsChunkedWrapper, Crc32Checksum
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError
from outcrop.wire.chunked import MAX_SIGNED_CHUNK_BYTES, ChunkedDecoder, is_chunked
from outcrop.wire.sigv4 import (
    STREAMING_SIGNED,
    STREAMING_SIGNED_TRAILER,
    STREAMING_UNSIGNED_TRAILER,
    SigningKey,
)

EMPTY = hashlib.sha256(b"").hexdigest()
KEY = SigningKey(b"k" * 32, "20260102T030405Z", "20260102/us-east-1/s3/aws4_request", "f" * 64)
CRC = base64.b64encode(zlib.crc32(b"hello").to_bytes(4, "big")).decode()


def _hmac(*lines: str) -> str:
    return hmac.new(KEY.key, "\n".join(lines).encode(), hashlib.sha256).hexdigest()


def _signed(chunks: Sequence[bytes], trailers: Sequence[str] | None = None) -> bytes:
    """Write a signed body as the S3 API Reference describes it, apart from the decoder's code."""
    body, previous = b"", KEY.signature
    for chunk in [*chunks, b""]:
        previous = _hmac(
            "AWS4-HMAC-SHA256-PAYLOAD", KEY.timestamp, KEY.scope, previous, EMPTY,
            hashlib.sha256(chunk).hexdigest(),
        )  # fmt: skip
        body += f"{len(chunk):x};chunk-signature={previous}\r\n".encode() + chunk
        if chunk or trailers is None:
            body += b"\r\n"
    if trailers is not None:
        text = "".join(f"{trailer}\n" for trailer in trailers)
        digest = hashlib.sha256(text.encode()).hexdigest()
        last = _hmac("AWS4-HMAC-SHA256-TRAILER", KEY.timestamp, KEY.scope, previous, digest)
        body += "".join(f"{line}\r\n" for line in trailers).encode()
        body += f"x-amz-trailer-signature:{last}\r\n\r\n".encode()
    return body


def _unsigned(chunks: Sequence[bytes], trailers: Sequence[str] = ()) -> bytes:
    body = b"".join(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks)
    return body + b"0\r\n" + "".join(f"{line}\r\n" for line in trailers).encode() + b"\r\n"


def _decoder(word: str, length: int | None, declared: Sequence[str] = ()) -> ChunkedDecoder:
    return ChunkedDecoder(word, decoded_length=length, signing_key=KEY, declared_trailers=declared)


def _decode(
    word: str, body: bytes, length: int, *, piece: int = 7, declared: Sequence[str] = ()
) -> tuple[bytes, dict[str, str]]:
    decoder = _decoder(word, length, declared)
    out = b"".join(decoder.feed(body[at : at + piece]) for at in range(0, len(body), piece))
    return out, decoder.finish()


def _code(word: str, body: bytes, length: int, **options: Sequence[str]) -> str:
    with pytest.raises(ApiError) as caught:
        _decode(word, body, length, declared=options.get("declared", ()))
    return f"{caught.value.code} {caught.value.http_status}"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=6),
    st.integers(1, 400),
    st.sampled_from([STREAMING_SIGNED, STREAMING_SIGNED_TRAILER, STREAMING_UNSIGNED_TRAILER]),
)
def test_a_body_comes_back_however_it_is_cut(chunks: list[bytes], piece: int, word: str) -> None:
    data = b"".join(chunks)
    trailers = [] if word == STREAMING_SIGNED else ["x-amz-checksum-crc32:AAAAAA=="]
    if word == STREAMING_UNSIGNED_TRAILER:
        body = _unsigned(chunks, trailers)
    else:
        body = _signed(chunks, trailers if word == STREAMING_SIGNED_TRAILER else None)
    declared = ["X-Amz-Checksum-Crc32"] if trailers else []
    out, found = _decode(word, body, len(data), piece=piece, declared=declared)
    assert out == data
    assert found == ({"x-amz-checksum-crc32": "AAAAAA=="} if trailers else {})


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(1, 700))
def test_what_botocore_uploads_over_tls_is_decoded(data: bytes, piece: int) -> None:
    wrapper = AwsChunkedWrapper(
        io.BytesIO(data),
        checksum_cls=Crc32Checksum,
        checksum_name="x-amz-checksum-crc32",
        chunk_size=1000,
    )
    body = wrapper.read()
    out, trailers = _decode(
        STREAMING_UNSIGNED_TRAILER, body, len(data), piece=piece, declared=["x-amz-checksum-crc32"]
    )
    assert out == data
    checksum = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    assert trailers == {"x-amz-checksum-crc32": checksum}


def test_the_published_example_of_aws() -> None:
    # Amazon S3 API Reference, "Transferring Payload in Multiple Chunks", example.
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    key = ("AWS4" + secret).encode()
    for part in ("20130524", "us-east-1", "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    signing = SigningKey(
        key,
        "20130524T000000Z",
        "20130524/us-east-1/s3/aws4_request",
        "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9",
    )
    parts = (
        (65536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
        (1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
        (0, "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
    )
    body = b"".join(
        f"{size:x};chunk-signature={signature}\r\n".encode() + b"a" * size + b"\r\n"
        for size, signature in parts
    )
    decoder = ChunkedDecoder(STREAMING_SIGNED, decoded_length=66560, signing_key=signing)
    assert decoder.feed(body) == b"a" * 66560
    assert decoder.finish() == {}


def test_which_words_mean_chunks() -> None:
    assert is_chunked(STREAMING_SIGNED)
    assert not is_chunked("UNSIGNED-PAYLOAD")
    assert not is_chunked(None)


def test_nothing_of_a_signed_chunk_is_released_before_it_is_verified() -> None:
    body = _signed([b"good", b"evil data"]).replace(b"evil", b"EVIL")
    decoder = _decoder(STREAMING_SIGNED, 13)
    end = body.index(b"EVIL") + len(b"EVIL data")
    assert decoder.feed(body[: end - 1]) == b"good"
    with pytest.raises(ApiError) as caught:
        decoder.feed(body[end - 1 :])
    assert (caught.value.code, caught.value.http_status) == ("SignatureDoesNotMatch", 403)


def test_signed_chunks_cannot_be_swapped_dropped_or_changed() -> None:
    body = _signed([b"a" * 10, b"b" * 10])
    first, second = body.index(b"a;"), body.index(b"a;", 20)
    last = body.index(b"0;chunk", second)
    swapped = body[second:last] + body[first:second] + body[last:]
    assert _code(STREAMING_SIGNED, swapped, 20) == "SignatureDoesNotMatch 403"
    dropped = body[:second] + body[last:]
    assert _code(STREAMING_SIGNED, dropped, 10) == "SignatureDoesNotMatch 403"
    assert _code(STREAMING_SIGNED, _unsigned([b"a"]), 1) == "InvalidRequest 400"


def test_signed_trailers_cannot_be_changed_or_left_out() -> None:
    trailer = f"x-amz-checksum-crc32:{CRC}"
    body = _signed([b"hello"], [trailer])
    declared = ["x-amz-checksum-crc32"]
    assert _decode(STREAMING_SIGNED_TRAILER, body, 5, declared=declared)[1] == {
        "x-amz-checksum-crc32": CRC
    }
    changed = body.replace(CRC.encode(), b"AAAAAA==")
    code = "SignatureDoesNotMatch 403"
    assert _code(STREAMING_SIGNED_TRAILER, changed, 5, declared=declared) == code
    unsigned = body[: body.index(b"x-amz-trailer-signature")] + b"\r\n"
    assert _code(STREAMING_SIGNED_TRAILER, unsigned, 5, declared=declared) == code
    end = len(body) - 2
    added = body[:end] + b"x-amz-checksum-sha1:x\r\n" + body[end:]
    assert (
        _code(STREAMING_SIGNED_TRAILER, added, 5, declared=[*declared, "x-amz-checksum-sha1"])
        == "MalformedTrailerError 400"
    )


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_body_that_ends_early_is_incomplete(cut: int) -> None:
    body = _unsigned([b"hello"], [f"x-amz-checksum-crc32:{CRC}"])
    declared = ["x-amz-checksum-crc32"]
    code = _code(STREAMING_UNSIGNED_TRAILER, body[:-cut], 5, declared=declared)
    assert code == "IncompleteBody 400"
    signed = _signed([b"hello"])
    assert _code(STREAMING_SIGNED, signed[:-cut], 5) == "IncompleteBody 400"


def test_the_declared_length_holds() -> None:
    body = _unsigned([b"hello"])
    for length in (4, 6):
        assert _code(STREAMING_UNSIGNED_TRAILER, body, length) == "IncompleteBody 400"
    for missing in (None, -1):
        with pytest.raises(ApiError) as caught:
            _decoder(STREAMING_SIGNED, missing)
        assert (caught.value.code, caught.value.http_status) == ("MissingContentLength", 411)


@pytest.mark.parametrize(
    "body",
    [
        b"xyz\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n0\r\n\r\n",
        b"\r\n",
        b"5\nhello\n0\n\n" + b" " * 2000,
        b"4\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5\r\nhello\r\n0\r\n\r\nmore",
        b"5" * 2000,
        b"11111111111111111\r\n",
    ],
)
def test_a_body_of_another_form_is_refused(body: bytes) -> None:
    assert _code(STREAMING_UNSIGNED_TRAILER, body, 5) == "InvalidRequest 400"


@pytest.mark.parametrize(
    "trailers",
    [
        ["x-amz-checksum-crc32"],
        ["x-amz-checksum-crc32:a", "x-amz-checksum-crc32:b"],
        ["x-amz-checksum-sha1:a"],
        ["x-amz-trailer-signature:a"],
        ["bad name:x"],
        ["x-amz-checksum-crc32:é"],
        [],
        [f"x-amz-checksum-crc32:{'a' * 16_300}", f"x-amz-checksum-sha256:{'b' * 16_300}"],
    ],
)
def test_trailers_that_are_malformed_undeclared_or_missing_are_refused(trailers: list[str]) -> None:
    declared = ["x-amz-checksum-crc32", "x-amz-checksum-sha256"]
    body = _unsigned([b"hello"], trailers)
    code = _code(STREAMING_UNSIGNED_TRAILER, body, 5, declared=declared)
    assert code == "MalformedTrailerError 400"


def test_a_signed_chunk_has_a_largest_size() -> None:
    head = f"{MAX_SIGNED_CHUNK_BYTES + 1:x};chunk-signature={'0' * 64}\r\n".encode()
    assert _code(STREAMING_SIGNED, head, 1 << 40) == "InvalidChunkSizeError 400"


def test_memory_stays_bounded_for_a_chunk_of_any_size() -> None:
    total, piece = 64 * 1024 * 1024, bytes(64 * 1024)
    decoder = _decoder(STREAMING_UNSIGNED_TRAILER, total)
    tracemalloc.start()
    received = len(decoder.feed(f"{total:x}\r\n".encode()))
    for _ in range(total // len(piece)):
        received += len(decoder.feed(piece))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    decoder.feed(b"\r\n0\r\n\r\n")
    assert decoder.finish() == {}
    assert received == total
    assert peak < 2 * 1024 * 1024


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(),
        st.lists(
            st.sampled_from(
                [b"5", b"\r\n", b"hello", b"0", b";chunk-signature=", b"a:b", b"0" * 64]
            )
        ).map(b"".join),
    ),
    st.sampled_from([STREAMING_SIGNED, STREAMING_SIGNED_TRAILER, STREAMING_UNSIGNED_TRAILER]),
    st.integers(1, 20),
)
def test_no_body_raises_anything_but_an_api_error(body: bytes, word: str, piece: int) -> None:
    out = b""
    try:
        out, _ = _decode(word, body, 5, piece=piece, declared=["a"])
    except ApiError:
        return
    assert out == b"hello"
