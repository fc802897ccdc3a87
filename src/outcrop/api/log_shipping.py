"""From the spool to the owner's bucket: whole objects, under keys that follow from the segment.

A segment that was sent is deleted; a gateway that is killed between the two sends it again, to the
same keys and with the same bytes. So every record is in the bucket exactly once.

Source: user guide, "Monitor model invocation": the root of the keys, and bodies beyond 100 KB in
objects of their own; names as they are seen in buckets of the live service.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.objects.client import IS_AWAY, ObjectStore
from outcrop.settings import Settings
from outcrop.store import invocation_logging
from outcrop.store.delivery import DELIVERED, FAILING, CountKey
from outcrop.store.spool import Segment, remove, segments, taken

logger = logging.getLogger("outcrop.gateway")

CHANNEL = "invocation-logs"
LARGE_BYTES = 100_000
"""A body beyond this has an object of its own. Source: user guide, 100 KB."""
UNDELIVERABLE = "undeliverable"
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
"""Between two tries at a bucket that refuses: doubled from try to try."""

Count = Callable[[CountKey, int, str], None]


class Place(NamedTuple):
    """Where records of one hour go."""

    account: str
    region: str
    bucket: str
    prefix: str
    hour: str
    """`YYYY/MM/DD/HH`."""

    def folder(self) -> S3Uri:
        """Return the prefix of the hour's objects."""
        return log_root(S3Uri(self.bucket, self.prefix), self.account).join(
            f"{self.region}/{self.hour}"
        )


def log_root(place: S3Uri, account: str) -> S3Uri:
    """Return the prefix of all logs of an account below the configured one."""
    return place.join(f"AWSLogs/{account}/BedrockModelInvocationLogs")


@dataclass
class _Pause:
    """When a bucket is tried again."""

    until: float
    seconds: float


class Shipper:
    """Sends closed segments; for one thread."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        objects: Callable[[], ObjectStore],
        folder: Path,
        count: Count,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            count: is told what became of records.
            clock: seconds that never jump; tests have one of their own.
        """
        self._settings, self._engine, self._objects = settings, engine, objects
        self._folder, self._count, self._clock = folder, count, clock
        self._pauses: dict[str, _Pause] = {}
        self._sent: defaultdict[str, set[Place]] = defaultdict(set)
        """By segment: what of it is in its bucket already, where not all of it could be sent."""

    def ship(self) -> None:
        """Send what waits, but to buckets that refused a moment ago."""
        for path in segments(self._folder):
            with taken(path) as segment:
                if segment is not None:
                    self._ship_segment(segment)

    def _ship_segment(self, segment: Segment) -> None:
        groups: defaultdict[Place, list[dict[str, Any]]] = defaultdict(list)
        for content in segment.records:
            item = json.loads(content)
            record = item["record"]
            hour = datetime.fromisoformat(item["at"]).strftime("%Y/%m/%d/%H")
            scope = (record["accountId"], record["region"])
            groups[Place(*scope, item["bucket"], item["prefix"], hour)].append(item)
        sent = self._sent[segment.name]
        for place, items in groups.items():
            if place not in sent and self._send(segment, place, items):
                sent.add(place)
                self._tell(place, DELIVERED, len(items), "")
        left = groups.keys() - sent
        if left and segment.age_seconds < 3600 * self._settings.delivery_hours:
            return
        for place in left:
            reason = f"{place.bucket} took no logs for {self._settings.delivery_hours} hours"
            logger.warning(
                "%d record(s) of invocations are given up: %s", len(groups[place]), reason
            )
            self._tell(place, UNDELIVERABLE, len(groups[place]), reason)
        remove(segment)
        del self._sent[segment.name]

    def _tell(self, place: Place, outcome: str, number: int, detail: str) -> None:
        self._count(CountKey(place.account, place.region, CHANNEL, outcome), number, detail)

    def _send(self, segment: Segment, place: Place, items: list[dict[str, Any]]) -> bool:
        """Send the records of one place; False where that has to be tried again."""
        pause = self._pauses.get(place.bucket)
        if pause is not None and self._clock() < pause.until:
            return False
        try:
            self._upload(segment, place, items)
        except ObjectStoreError as error:
            other = None if error.code == IS_AWAY else self._place_now(place)
            if other is not None and other.bucket != place.bucket:
                return self._send(segment, other, items)
            seconds = (
                min(2 * pause.seconds, LONGEST_PAUSE_SECONDS) if pause else FIRST_PAUSE_SECONDS
            )
            self._pauses[place.bucket] = _Pause(self._clock() + seconds, seconds)
            logger.warning("invocation logs cannot be written to %s: %s", place.bucket, error)
            self._tell(place, FAILING, 1, str(error))
            return False
        self._pauses.pop(place.bucket, None)
        return True

    def _place_now(self, place: Place) -> Place | None:
        """Return where the account's logs go by now: its owner may have mended what was wrong."""
        try:
            with self._engine.connect() as connection:
                config = invocation_logging.get_config(connection, place.account, place.region)
        except SQLAlchemyError:
            return None
        if config is None:
            return None
        now = config["s3Config"]
        return place._replace(bucket=now["bucketName"], prefix=now.get("keyPrefix", ""))

    def _upload(self, segment: Segment, place: Place, items: list[dict[str, Any]]) -> None:
        objects, folder = self._objects(), place.folder()
        lines = []
        for item in items:
            record = item["record"]
            for side in ("input", "output"):
                record = self._moved(objects, folder, record, side, item["raw"].get(side))
            lines.append(_dump(record))
        # What follows from the segment alone: sent again, it has the same key and the same bytes.
        name = hashlib.sha256(f"{segment.name}/{place.hour}".encode()).hexdigest()[:16]
        first = datetime.fromisoformat(items[0]["at"])
        stamp = f"{first:%Y%m%dT%H%M%S}{first.microsecond // 1000:03d}Z"
        objects.write(folder.join(f"{stamp}_{name}.json.gz"), _pack(b"\n".join(lines) + b"\n"))

    def _moved(
        self,
        objects: ObjectStore,
        folder: S3Uri,
        record: Mapping[str, Any],
        side: str,
        raw: str | None,
    ) -> dict[str, Any]:
        """Return a record whose large or binary body of one side has an object of its own."""
        held = dict(record[side])
        if raw is not None:
            content, ending = base64.b64decode(raw), "bin.gz"
        elif f"{side}BodyJson" in held:
            content, ending = _dump(held[f"{side}BodyJson"]), "json.gz"
            if len(content) <= LARGE_BYTES:
                return dict(record)
        else:
            return dict(record)
        uri = folder.join(f"data/{record['requestId']}_{side}.{ending}")
        objects.write(uri, _pack(content))
        held.pop(f"{side}BodyJson", None)
        return {**record, side: {**held, f"{side}BodyS3Path": str(uri)}}


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def _pack(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)
