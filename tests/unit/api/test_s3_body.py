"""Bodies of uploads: what is passed on, and that nothing is complete before it is verified."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import zlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.api.s3_body import (
    MAX_XML_BYTES,
    DeletedObject,
    open_upload,
    read_body,
    read_deleted_objects,
    read_location,
)
from outcrop.errors import ApiError
from outcrop.wire.chunked import ChunkedDecoder
from outcrop.wire.sigv4 import STREAMING_UNSIGNED_TRAILER, UNSIGNED_PAYLOAD


async def pieces_of(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def pass_on(
    pieces: list[bytes], headers: dict[str, str], payload_hash: str
) -> tuple[bytes, int, str, ApiError | None]:
    """Return what the backend gets, what it was told to expect, and how it ended."""

    async def run() -> tuple[bytes, int, str, ApiError | None]:
        got = b""
        try:
            upload = await open_upload(pieces_of(pieces), headers, payload_hash, None)
        except ApiError as error:
            return b"", -1, "", error
        try:
            async for piece in upload.content:
                got += piece
        except ApiError as error:
            return got, upload.length, upload.payload_hash, error
        return got, upload.length, upload.payload_hash, None

    return asyncio.run(run())


PIECES = st.lists(st.binary(max_size=5), max_size=6)


@given(PIECES, st.booleans())
def test_body_with_a_digest_is_complete_only_if_it_is_right(
    pieces: list[bytes], right: bool
) -> None:
    data = b"".join(pieces)
    declared = hashlib.sha256(data if right else data + b"x").hexdigest()
    headers = {"content-length": str(len(data))}
    got, length, payload_hash, error = pass_on(pieces, headers, declared)
    if right:
        assert (got, length, payload_hash, error) == (data, len(data), declared, None)
    else:
        assert error is not None
        assert error.code == "XAmzContentSHA256Mismatch"
        # An empty body is refused before anything is sent; any other is not sent to its end.
        assert len(got) < length if data else length == -1


@given(PIECES, st.integers(0, 3))
def test_body_that_ends_early_is_not_completed(pieces: list[bytes], missing: int) -> None:
    data = b"".join(pieces)
    headers = {"content-length": str(len(data) + missing)}
    got, length, _, error = pass_on(pieces, headers, UNSIGNED_PAYLOAD)
    if missing:
        assert error is not None
        assert error.code == "IncompleteBody"
        assert len(got) < length or length == -1
    else:
        assert (got, error) == (data, None)


@given(st.binary(max_size=50) | st.integers(0, 200_000).map(bytes), st.integers(100, 70_000))
def test_chunks_are_passed_on_with_their_trailer(data: bytes, size: int) -> None:
    checksum = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    body = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
    body += b"0\r\nx-amz-checksum-crc32:%b\r\n\r\n" % checksum.encode()
    headers = {
        "x-amz-decoded-content-length": str(len(data)),
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    got, length, payload_hash, error = pass_on(pieces, headers, STREAMING_UNSIGNED_TRAILER)
    assert error is None
    assert len(got) == length
    decoder = ChunkedDecoder(
        payload_hash, decoded_length=len(data), declared_trailers=["x-amz-checksum-crc32"]
    )
    assert decoder.feed(got) == data
    assert decoder.finish() == {"x-amz-checksum-crc32": checksum}


@pytest.mark.parametrize(
    ("headers", "payload_hash", "code"),
    [
        ({}, UNSIGNED_PAYLOAD, "MissingContentLength"),
        ({"content-length": "-1"}, UNSIGNED_PAYLOAD, "MissingContentLength"),
        ({"content-length": "5"}, STREAMING_UNSIGNED_TRAILER, "MissingContentLength"),
        (
            {"x-amz-decoded-content-length": "0", "x-amz-trailer": "x-amz-checksum-md5"},
            STREAMING_UNSIGNED_TRAILER,
            "InvalidRequest",
        ),
        (
            {"x-amz-decoded-content-length": "0", "x-amz-trailer": "x-amz-checksum-sha1"},
            STREAMING_UNSIGNED_TRAILER,
            "IncompleteBody",
        ),
    ],
)
def test_upload_that_says_too_little_is_refused(
    headers: dict[str, str], payload_hash: str, code: str
) -> None:
    _, _, _, error = pass_on([], headers, payload_hash)
    assert error is not None
    assert error.code == code


def test_trailer_of_a_wrong_length_is_refused() -> None:
    headers = {
        "x-amz-decoded-content-length": "0",
        "x-amz-trailer": "x-amz-checksum-crc32",
    }
    body = [b"0\r\nx-amz-checksum-crc32:AAAA\r\n\r\n"]
    _, _, _, error = pass_on(body, headers, STREAMING_UNSIGNED_TRAILER)
    assert error is not None
    assert error.code == "InvalidRequest"


def test_small_bodies_are_read_whole_and_verified() -> None:
    digest = hashlib.sha256(b"<a/>").hexdigest()

    def read(pieces: list[bytes], payload_hash: str | None) -> bytes:
        return asyncio.run(read_body(pieces_of(pieces), {}, payload_hash, None))

    assert read([b"<a", b"", b"/>"], digest) == b"<a/>"
    assert read([b"<b/>"], None) == b"<b/>"
    with pytest.raises(ApiError) as error:
        read([b"<b/>"], digest)
    assert error.value.code == "XAmzContentSHA256Mismatch"
    with pytest.raises(ApiError) as error:
        read([bytes(MAX_XML_BYTES), b"x"], None)
    assert error.value.code == "MaxMessageLengthExceeded"


NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


def test_objects_to_delete_are_read() -> None:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Delete xmlns="{NAMESPACE}"><Quiet>true</Quiet>'
        "<Object><Key>a &amp; ü </Key></Object>"
        "<Object><Key>b</Key><VersionId>7</VersionId></Object></Delete>"
    ).encode()
    assert read_deleted_objects(body) == [DeletedObject("a & ü ", ""), DeletedObject("b", "7")]


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "<Object/>",
        "<Object><Key>a</Key><Key>b</Key></Object>",
        "<Object><Key>a<Key>b</Key></Key></Object>",
        "<Object><Key>a</Key><VersionId>1</VersionId><VersionId>2</VersionId></Object>",
        '<Object><Key>a</Key><x:Key xmlns:x="y">b</x:Key></Object>',
        "<Object><Key>a<!-- -->b</Key></Object>",
        "<Object><Key><![CDATA[a]]></Key></Object>",
        "<Object><Key>a<?b c?></Key></Object>",
        "<Other><Key>a</Key></Other>",
        "<Object><Key>a</Key></Object>" * 1001,
        "<Object>",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(inner: str) -> None:
    with pytest.raises(ApiError) as error:
        read_deleted_objects(f"<Delete>{inner}</Delete>".encode())
    assert error.value.code == "MalformedXML"


def test_entities_are_not_expanded() -> None:
    body = b'<!DOCTYPE d [<!ENTITY a "b">]><Delete><Object><Key>&a;</Key></Object></Delete>'
    for text in (body, body.decode().encode("utf-16")):
        with pytest.raises(ApiError) as error:
            read_deleted_objects(text)
        assert error.value.code == "MalformedXML"


def test_location_is_read() -> None:
    inner = "<LocationConstraint>eu-west-1</LocationConstraint>"
    outer = f'<CreateBucketConfiguration xmlns="{NAMESPACE}">{inner}</CreateBucketConfiguration>'
    assert read_location(outer.encode()) == "eu-west-1"
    assert read_location(b"") == read_location(b"<CreateBucketConfiguration/>") == ""
