"""Bodies in `aws-chunked` form, decoded as they arrive.

Turns the chunks of an S3 upload into the object's bytes, a piece at a time and in bounded memory.
A signed chunk is released only after its signature is verified; trailers are returned at the end.
Knows no HTTP framework; HTTP's own chunked transfer coding is another layer, below.
Source: Amazon S3 API Reference, "Signature calculations: transferring payload in multiple chunks",
"... with trailing headers", and "Checking object integrity" for unsigned trailers.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

from outcrop.errors import ApiError
from outcrop.wire.sigv4 import (
    EMPTY_SHA256,
    STREAMING_SIGNED,
    STREAMING_SIGNED_TRAILER,
    STREAMING_UNSIGNED_TRAILER,
    SigningKey,
    sign,
)

MAX_SIGNED_CHUNK_BYTES = 16 * 1024 * 1024
"""The largest signed chunk, because one is held in memory until its signature is verified."""

MAX_TRAILER_BYTES = 16 * 1024
"""The most that trailers may take."""

_MAX_HEAD_BYTES = 1024  # a chunk's first line: its size in hexadecimal, and extensions
_HEAD = re.compile(rb"([0-9a-fA-F]{1,16})((?:;[^;\r\n]*)*)")
_CHUNK_SIGNATURE = re.compile(rb";chunk-signature=([0-9a-f]{64})")
_TRAILER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
_TRAILER_SIGNATURE = "x-amz-trailer-signature"


def is_chunked(payload_hash: str | None) -> bool:
    """Say whether a declared `x-amz-content-sha256` means that the body is aws-chunked."""
    return payload_hash in (STREAMING_SIGNED, STREAMING_SIGNED_TRAILER, STREAMING_UNSIGNED_TRAILER)


class ChunkedDecoder:
    """Decodes one body: `feed` what arrives and pass on what it returns, then `finish`."""

    def __init__(
        self,
        payload_hash: str,
        *,
        decoded_length: int | None,
        signing_key: SigningKey | None = None,
        declared_trailers: Iterable[str] = (),
    ) -> None:
        """Prepare for a body.

        Args:
            payload_hash: the request's `x-amz-content-sha256`, one that is_chunked() accepts.
            decoded_length: `x-amz-decoded-content-length`, in bytes. S3 demands it.
            signing_key: from sigv4.verify(); needed where the chunks are signed.
            declared_trailers: the names in `x-amz-trailer`.
        Raises:
            ApiError: MissingContentLength 411, where decoded_length is None.
        """
        if decoded_length is None or decoded_length < 0:
            raise ApiError(
                "You must provide the x-amz-decoded-content-length HTTP header.",
                code="MissingContentLength",
                http_status=411,
            )
        assert is_chunked(payload_hash), payload_hash
        self._signed = payload_hash != STREAMING_UNSIGNED_TRAILER
        self._may_have_trailers = payload_hash != STREAMING_SIGNED
        assert signing_key is not None or not self._signed, "signed chunks need the key"
        self._key = signing_key
        self._previous = signing_key.signature if signing_key else ""
        self._declared = {name.strip().lower() for name in declared_trailers if name.strip()}
        self._length = decoded_length
        self._decoded = 0
        self._buffer = bytearray()
        self._state = "head"  # then "data", "data end", and "trailer" or "last end", and "done"
        self._remaining = 0
        self._chunk_signature = ""
        self._trailers: dict[str, str] = {}
        self._trailer_signature: str | None = None
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the body and return those of the object that are ready.

        Raises:
            ApiError: SignatureDoesNotMatch 403; InvalidRequest, InvalidChunkSizeError,
                IncompleteBody or MalformedTrailerError 400.
        """
        self._buffer += data
        ready: list[bytes] = []
        while self._step(ready):
            pass
        return b"".join(ready)

    def finish(self) -> dict[str, str]:
        """Say that the body has ended, and return its trailers by lower-case name.

        Raises:
            ApiError: IncompleteBody 400, where the body ended early or has another length than
                declared; MalformedTrailerError 400, where a declared trailer is missing.
        """
        if self._state != "done":
            raise _incomplete("The request body terminated unexpectedly.")
        if self._decoded != self._length:
            raise _incomplete(
                f"You did not provide the number of bytes specified by the "
                f"x-amz-decoded-content-length HTTP header: {self._decoded} instead of "
                f"{self._length}."
            )
        missing = sorted(self._declared - self._trailers.keys())
        if missing:
            raise _bad_trailer(f"The trailer {missing[0]} was declared but not sent.")
        return dict(self._trailers)

    def _step(self, ready: list[bytes]) -> bool:
        """Take one thing off the buffer; False where more bytes are needed first."""
        if self._state == "head":
            return self._read_head()
        if self._state == "data":
            return self._read_data(ready)
        if self._state in ("data end", "last end"):
            return self._read_line_end()
        if self._state == "trailer":
            return self._read_trailer()
        if self._buffer:
            raise _malformed("there are bytes after its end")
        return False

    def _read_head(self) -> bool:
        line = self._take_line(_MAX_HEAD_BYTES)
        if line is None:
            return False
        found = _HEAD.fullmatch(line)
        if found is None:
            raise _malformed(f"a chunk starts with {line[:50]!r}, not with its size")
        size = int(found[1], 16)
        if self._signed:
            extension = _CHUNK_SIGNATURE.fullmatch(found[2])
            if extension is None:
                raise _malformed("a chunk has no chunk-signature")
            self._chunk_signature = extension[1].decode("ascii")
            if size > MAX_SIGNED_CHUNK_BYTES:
                raise ApiError(
                    f"A signed chunk of {size} bytes is larger than {MAX_SIGNED_CHUNK_BYTES}, "
                    "the most that is allowed.",
                    code="InvalidChunkSizeError",
                    http_status=400,
                )
        if self._decoded + size > self._length:
            raise _incomplete(
                "The body holds more bytes than the x-amz-decoded-content-length HTTP header says: "
                f"{self._length}."
            )
        self._remaining = size
        if size:
            self._state = "data"
            return True
        if self._signed:
            self._check_chunk(b"")
        self._state = "trailer" if self._may_have_trailers else "last end"
        return True

    def _read_data(self, ready: list[bytes]) -> bool:
        if self._signed and len(self._buffer) < self._remaining:
            return False
        part = bytes(self._buffer[: self._remaining])
        if not part:
            return False
        del self._buffer[: len(part)]
        if self._signed:
            self._check_chunk(part)
        ready.append(part)
        self._decoded += len(part)
        self._remaining -= len(part)
        if not self._remaining:
            self._state = "data end"
        return True

    def _read_line_end(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._buffer[:2] != b"\r\n":
            raise _malformed("a chunk is longer than its size says")
        del self._buffer[:2]
        self._state = "done" if self._state == "last end" else "head"
        return True

    def _read_trailer(self) -> bool:
        line = self._take_line(MAX_TRAILER_BYTES)
        if line is None:
            return False
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_TRAILER_BYTES:
            raise _bad_trailer(f"The trailers are longer than {MAX_TRAILER_BYTES} bytes.")
        if not line:
            self._check_trailers()
            self._state = "done"
            return True
        try:
            text = line.decode("ascii")
        except UnicodeDecodeError:
            raise _bad_trailer("A trailer is not ASCII.") from None
        name, colon, value = text.partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon or not _TRAILER_NAME.fullmatch(name) or name in self._trailers:
            raise _bad_trailer(f"{text[:50]!r} is not a trailer, or is one for the second time.")
        if name == _TRAILER_SIGNATURE and self._signed and self._trailer_signature is None:
            self._trailer_signature = value
        elif name in self._declared and self._trailer_signature is None:
            self._trailers[name] = value
        else:
            raise _bad_trailer(f"The trailer {name} is not declared in x-amz-trailer.")
        return True

    def _take_line(self, limit: int) -> bytes | None:
        end = self._buffer.find(b"\r\n", 0, limit + 2)
        if end < 0:
            if len(self._buffer) > limit + 1:
                raise _malformed(f"a line is longer than {limit} bytes")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _check_chunk(self, data: bytes) -> None:
        assert self._key is not None
        digest = hashlib.sha256(data).hexdigest()
        wanted = self._sign("AWS4-HMAC-SHA256-PAYLOAD", EMPTY_SHA256, digest)
        if not hmac.compare_digest(wanted, self._chunk_signature):
            raise _mismatch("a chunk")
        self._previous = wanted

    def _check_trailers(self) -> None:
        if not self._signed:
            return
        lines = "".join(f"{name}:{value}\n" for name, value in self._trailers.items())
        digest = hashlib.sha256(lines.encode("ascii")).hexdigest()
        wanted = self._sign("AWS4-HMAC-SHA256-TRAILER", digest)
        if not hmac.compare_digest(wanted, self._trailer_signature or ""):
            raise _mismatch("the trailers")

    def _sign(self, algorithm: str, *digests: str) -> str:
        assert self._key is not None
        key = self._key
        return sign(key.key, algorithm, key.timestamp, key.scope, self._previous, *digests)


def _mismatch(what: str) -> ApiError:
    return ApiError(
        "The request signature we calculated does not match the signature you provided, for "
        f"{what} of the body. Check your key and signing method.",
        code="SignatureDoesNotMatch",
        http_status=403,
    )


def _malformed(what: str) -> ApiError:
    return ApiError(
        f"The body is not in the aws-chunked form: {what}.", code="InvalidRequest", http_status=400
    )


def _incomplete(message: str) -> ApiError:
    return ApiError(message, code="IncompleteBody", http_status=400)


def _bad_trailer(message: str) -> ApiError:
    return ApiError(
        "The request contained trailing data that was not well-formed or did not conform to our "
        f"published schema. {message}",
        code="MalformedTrailerError",
        http_status=400,
    )
