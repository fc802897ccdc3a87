"""The bodies of S3 requests: checked against what was signed, and on to the backend as they come.

Turns the body as the client sent it (plain, with a digest, in signed or unsigned chunks) into one
the backend takes. The last piece is held back until the whole body is verified, so a body that
turns out wrong is never complete at the backend and leaves no object. The backend does not compare
`x-amz-content-sha256` with the body, and signed chunks are signed with a key it does not have; so
both are checked here. The checksum in a trailer is re-sent as an unsigned trailer, which the
backend does compare: Python has neither CRC32C nor CRC64NVME at speed.
Source: Amazon S3 API Reference, "Checking object integrity".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

from outcrop.errors import ApiError
from outcrop.wire.chunked import ChunkedDecoder, is_chunked
from outcrop.wire.sigv4 import (
    STREAMING_UNSIGNED_TRAILER,
    UNSIGNED_PAYLOAD,
    SigningKey,
    check_payload_hash,
)

MAX_XML_BYTES = 4 * 1024 * 1024
"""Largest body of a request that is not an upload. DeleteObjects with 1000 keys takes about 1 MB,
CompleteMultipartUpload with 10 000 parts about 2 MB."""
MAX_DELETED_OBJECTS = 1000

_CHUNK_BYTES = 64 * 1024
_CHECKSUM_BYTES = {
    "x-amz-checksum-crc32": 4,
    "x-amz-checksum-crc32c": 4,
    "x-amz-checksum-crc64nvme": 8,
    "x-amz-checksum-sha1": 20,
    "x-amz-checksum-sha256": 32,
}


@dataclass(frozen=True)
class Upload:
    """The body of one upload, ready to be passed on."""

    content: AsyncIterator[bytes]
    """Raises ApiError before its last piece where the body is not what was signed."""
    length: int
    """In bytes, as it is passed on."""
    payload_hash: str
    """The `x-amz-content-sha256` to sign it with."""
    headers: dict[str, str] = field(default_factory=dict)
    """What the backend needs to know about the body."""


@dataclass(frozen=True)
class DeletedObject:
    """One object that a DeleteObjects request names."""

    key: str
    version_id: str


async def open_upload(
    body: AsyncIterator[bytes],
    headers: Mapping[str, str],
    payload_hash: str | None,
    key: SigningKey | None,
) -> Upload:
    """Prepare an upload. Reads no more than its first pieces, and all of it where it is empty.

    Args:
        headers: the client's, by lower-case name.
        payload_hash: the verified request's `x-amz-content-sha256`.
        key: from `sigv4.verify`, for signed chunks.
    Raises:
        ApiError: MissingContentLength 411; NotImplemented 501 for a checksum S3 does not know;
            what the body's checks raise.
    """
    declared = payload_hash or UNSIGNED_PAYLOAD
    if not is_chunked(declared):
        length = _content_length(headers, "content-length")
        pieces = _plain_pieces(body, declared, length)
        return Upload(await _held_back(pieces), length, declared)
    decoded_length = _content_length(headers, "x-amz-decoded-content-length")
    trailers = _trailer_names(headers)
    decoder = ChunkedDecoder(
        declared, decoded_length=decoded_length, signing_key=key, declared_trailers=trailers
    )
    if not trailers:
        pieces = _decoded_pieces(body, decoder, {})
        return Upload(await _held_back(pieces), decoded_length, UNSIGNED_PAYLOAD)
    [trailer] = trailers
    found: dict[str, str] = {}
    pieces = _decoded_pieces(body, decoder, found)
    return Upload(
        await _held_back(_with_trailer(pieces, trailer, found)),
        _length_with_trailer(decoded_length, trailer),
        STREAMING_UNSIGNED_TRAILER,
        {"x-amz-trailer": trailer, "x-amz-decoded-content-length": str(decoded_length)},
    )


async def read_body(
    body: AsyncIterator[bytes],
    headers: Mapping[str, str],
    payload_hash: str | None,
    key: SigningKey | None,
) -> bytes:
    """Return the whole body of a request that is not an upload, verified.

    Raises:
        ApiError: MaxMessageLengthExceeded 400 beyond `MAX_XML_BYTES`; what the body's checks raise.
    """
    declared = payload_hash or UNSIGNED_PAYLOAD
    if is_chunked(declared):
        decoder = ChunkedDecoder(
            declared,
            decoded_length=_content_length(headers, "x-amz-decoded-content-length"),
            signing_key=key,
            declared_trailers=_trailer_names(headers),
        )
        pieces = _decoded_pieces(body, decoder, {})
    else:
        pieces = _plain_pieces(body, declared, None)
    parts: list[bytes] = []
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > MAX_XML_BYTES:
            raise ApiError(
                f"Your request was too big. It may have {MAX_XML_BYTES} bytes.",
                code="MaxMessageLengthExceeded",
                http_status=400,
            )
        parts.append(piece)
    return b"".join(parts)


def read_deleted_objects(body: bytes) -> list[DeletedObject]:
    """Return what a DeleteObjects request names.

    Nothing that two XML readers could read in two ways is let through: what is decided on here must
    be what the backend deletes.

    Raises:
        ApiError: MalformedXML 400.
    """
    root = _read_xml(body)
    if _local(root) != "Delete":
        raise _malformed_xml("its root is not Delete")
    objects = []
    for item in root:
        if _local(item) == "Quiet":
            continue
        fields = [_local(member) for member in item]
        if _local(item) != "Object" or fields.count("Key") != 1 or len(set(fields)) != len(fields):
            raise _malformed_xml("it must hold Object elements with one Key each")
        if any(len(member) for member in item):
            raise _malformed_xml("an element of an Object holds further elements")
        texts = {_local(member): member.text or "" for member in item}
        objects.append(DeletedObject(texts["Key"], texts.get("VersionId", "")))
    if not 1 <= len(objects) <= MAX_DELETED_OBJECTS:
        raise _malformed_xml(f"it names {len(objects)} objects; 1 to {MAX_DELETED_OBJECTS} may be")
    return objects


def check_parts(body: bytes) -> None:
    """Refuse a CompleteMultipartUpload request that names no parts.

    Raises:
        ApiError: MalformedXML 400.
    """
    if not any(_local(element) == "Part" for element in _read_xml(body)):
        raise _malformed_xml("it names no parts")


def read_location(body: bytes) -> str:
    """Return the region that a CreateBucket request asks for, or "".

    Raises:
        ApiError: MalformedXML 400.
    """
    if not body.strip():
        return ""
    for element in _read_xml(body).iter():
        if _local(element) == "LocationConstraint":
            return (element.text or "").strip()
    return ""


async def _plain_pieces(
    body: AsyncIterator[bytes], declared: str, length: int | None
) -> AsyncGenerator[bytes, None]:
    digest = None if declared == UNSIGNED_PAYLOAD else hashlib.sha256()
    received = 0
    async for piece in body:
        received += len(piece)
        if digest is not None:
            digest.update(piece)
        yield piece
    if length is not None and received != length:
        raise ApiError(
            "You did not provide the number of bytes specified by the Content-Length HTTP header",
            code="IncompleteBody",
            http_status=400,
        )
    if digest is not None:
        check_payload_hash(declared, digest.hexdigest())


async def _decoded_pieces(
    body: AsyncIterator[bytes], decoder: ChunkedDecoder, trailers: dict[str, str]
) -> AsyncGenerator[bytes, None]:
    async for piece in body:
        decoded = decoder.feed(piece)
        if decoded:
            yield decoded
    trailers |= decoder.finish()


async def _with_trailer(
    pieces: AsyncIterator[bytes], trailer: str, found: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """Put the pieces into chunks of one size, so that the length is known before they come."""
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        while len(buffer) >= _CHUNK_BYTES:
            chunk = bytes(buffer[:_CHUNK_BYTES])
            del buffer[:_CHUNK_BYTES]
            yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
    if buffer:
        yield b"%x\r\n%b\r\n" % (len(buffer), bytes(buffer))
    value = found[trailer].encode("ascii")
    if len(value) != _base64_length(_CHECKSUM_BYTES[trailer]):
        raise ApiError(
            f"Value for {trailer} trailing header is invalid.",
            code="InvalidRequest",
            http_status=400,
        )
    yield b"0\r\n%b:%b\r\n\r\n" % (trailer.encode("ascii"), value)


def _length_with_trailer(decoded_length: int, trailer: str) -> int:
    whole, rest = divmod(decoded_length, _CHUNK_BYTES)
    length = whole * (_CHUNK_BYTES + len(f"{_CHUNK_BYTES:x}") + 4)
    if rest:
        length += rest + len(f"{rest:x}") + 4
    return length + 3 + len(trailer) + 1 + _base64_length(_CHECKSUM_BYTES[trailer]) + 4


def _base64_length(num_bytes: int) -> int:
    return (num_bytes + 2) // 3 * 4


async def _held_back(pieces: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """Return the pieces, each given out when the next one has come, the last when all is verified.

    The first is read here: a body that is empty is verified before anything is sent. An empty
    piece is not a next one.
    """

    async def next_piece() -> bytes:
        async for piece in pieces:
            if piece:
                return piece
        return b""

    first = await next_piece()

    async def held_back() -> AsyncGenerator[bytes, None]:
        held = first
        while held:
            following = await next_piece()
            yield held
            held = following

    return held_back()


def _content_length(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "")
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ApiError(
            f"You must provide the {name} HTTP header.",
            code="MissingContentLength",
            http_status=411,
        )
    return int(text)


def _trailer_names(headers: Mapping[str, str]) -> list[str]:
    names = [name.strip().lower() for name in headers.get("x-amz-trailer", "").split(",")]
    names = [name for name in names if name]
    if len(names) > 1 or any(name not in _CHECKSUM_BYTES for name in names):
        raise ApiError(
            "The value specified in the x-amz-trailer header is not supported: it must be one of "
            f"{', '.join(_CHECKSUM_BYTES)}.",
            code="InvalidRequest",
            http_status=400,
        )
    return names


def _read_xml(body: bytes) -> ElementTree.Element:
    try:
        text = body.decode("utf-8-sig")
        # No entities, no comments, no instructions: readers differ about those.
        if "<!" in text or "<?" in text.removeprefix("<?xml"):
            raise _malformed_xml("it holds a declaration, a comment or an instruction")
        return ElementTree.fromstring(text)
    except (UnicodeDecodeError, ElementTree.ParseError, ValueError) as error:
        raise _malformed_xml(str(error)) from error


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _malformed_xml(reason: str) -> ApiError:
    return ApiError(
        "The XML you provided was not well-formed or did not validate against our published "
        f"schema: {reason}.",
        code="MalformedXML",
        http_status=400,
    )
