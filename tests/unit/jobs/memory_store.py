"""An object store in memory that can be away, and can refuse."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.objects.client import IS_AWAY, Backend, ObjectInfo, ObjectStore

BUCKET = "bucket"


class MemoryStore(ObjectStore):
    """Has one bucket."""

    def __init__(self, **content: bytes) -> None:
        super().__init__(Backend("http://memory", "", "", ""))
        self.content = {S3Uri(BUCKET, key): value for key, value in content.items()}
        self.refusal: str | None = None
        """The code of the error that every call raises."""

    def go_away(self) -> None:
        self.refusal = IS_AWAY

    def head(self, uri: S3Uri) -> ObjectInfo | None:
        self._answer()
        return self._info(uri) if uri in self.content else None

    def open(self, uri: S3Uri) -> BinaryIO:
        self._answer()
        return io.BytesIO(self.content[uri])

    def write(self, uri: S3Uri, content: bytes | Path) -> None:
        self._answer()
        self.content[uri] = content.read_bytes() if isinstance(content, Path) else content

    def list(self, bucket: str, prefix: str = "") -> Iterator[ObjectInfo]:
        self._answer()
        for uri in sorted(self.content, key=str):
            if uri.bucket == bucket and uri.key.startswith(prefix):
                yield self._info(uri)

    def bucket_exists(self, bucket: str) -> bool:
        self._answer()
        return bucket == BUCKET

    def _info(self, uri: S3Uri) -> ObjectInfo:
        return ObjectInfo(uri, len(self.content[uri]), "etag", datetime.now(UTC))

    def _answer(self) -> None:
        if self.refusal is not None:
            raise ObjectStoreError(self.refusal, "the store says so")
