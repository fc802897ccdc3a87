"""The spool's records come to the bucket once each, whatever is killed, refused or mended."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from tests.unit.jobs.memory_store import BUCKET, MemoryStore
from tests.unit.store.build import ACCOUNT, REGION

from outcrop.api.log_shipping import Shipper
from outcrop.errors import ObjectStoreError
from outcrop.ids import S3Uri
from outcrop.settings import Settings
from outcrop.store import invocation_logging
from outcrop.store.database import connect, migrate, transaction
from outcrop.store.delivery import CountKey
from outcrop.store.spool import SpoolWriter, segments


class Store(MemoryStore):
    """Has no bucket but BUCKET, and says so; counts what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: Counter[str] = Counter()

    def write(self, uri: S3Uri, content: bytes | Path) -> None:
        if uri.bucket != BUCKET:
            raise ObjectStoreError("NoSuchBucket", f"{uri.bucket} does not exist")
        super().write(uri, content)
        self.writes[uri.key] += 1


class Place:
    """A spool, a store and a shipper whose clock stands until a test moves it."""

    def __init__(self, folder: Path, engine: Engine, settings: Settings) -> None:
        self.folder, self.engine, self.settings = folder, engine, settings
        self.objects = Store()
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self.shipper = self.new_shipper()

    def new_shipper(self) -> Shipper:
        """A gateway that was started again has one that knows nothing."""
        return Shipper(
            *(self.settings, self.engine, lambda: self.objects, self.folder, self.count),
            clock=lambda: self.now,
        )

    def count(self, key: CountKey, number: int, detail: str) -> None:
        self.counts[key.outcome] += number

    def spool(self, *names: str, bucket: str = BUCKET, hour: int = 12) -> None:
        writer = SpoolWriter(self.folder, max_bytes=1 << 20, segment_bytes=1 << 20)
        for name in names:
            writer.append(json.dumps(item(name, bucket, hour)).encode())
        writer.close()

    def delivered(self) -> list[str]:
        found = []
        for content in self.objects.content.values():
            lines = gzip.decompress(content).splitlines()
            found += [json.loads(line)["requestId"] for line in lines]
        return sorted(found)


def item(name: str, bucket: str, hour: int) -> dict[str, Any]:
    record = {
        "accountId": ACCOUNT, "region": REGION, "requestId": name, "input": {}, "output": {},
    }  # fmt: skip
    at = f"2026-11-30T{hour:02d}:59:59.123456+00:00"
    return {"bucket": bucket, "prefix": "", "at": at, "raw": {}, "record": record}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    settings = Settings(data_dir=tmp_path)
    engine = connect(settings.effective_database_url)
    migrate(engine)
    yield Place(tmp_path / "spool", engine, settings)
    engine.dispose()


def test_what_was_sent_before_a_kill_is_sent_again_to_the_same_keys_with_the_same_bytes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.spool("a", "b", hour=12)
    before = {path: path.read_bytes() for path in segments(place.folder)}
    place.shipper.ship()
    sent = dict(place.objects.content)
    for path, content in before.items():  # the gateway was killed before it deleted them
        path.write_bytes(content)
    place.new_shipper().ship()
    assert place.objects.content == sent
    assert list(place.objects.writes.values()) == [2]
    assert place.delivered() == ["a", "b"]
    assert not segments(place.folder)


def test_records_of_two_hours_go_to_two_objects(place: Place) -> None:
    root = f"AWSLogs/{ACCOUNT}/BedrockModelInvocationLogs/{REGION}/2026/11/30"
    writer = SpoolWriter(place.folder, max_bytes=1 << 20, segment_bytes=1 << 20)
    for name, hour in (("a", 12), ("b", 13), ("c", 12)):
        writer.append(json.dumps(item(name, BUCKET, hour)).encode())
    writer.close()
    place.shipper.ship()
    keys = sorted(uri.key for uri in place.objects.content)
    assert [key.rpartition("_")[0] for key in keys] == [
        f"{root}/12/20261130T125959123Z",
        f"{root}/13/20261130T135959123Z",
    ]
    assert place.delivered() == ["a", "b", "c"]


def test_a_torn_end_holds_up_no_whole_record(place: Place) -> None:
    place.spool("a", "b")
    (path,) = segments(place.folder)
    path.write_bytes(path.read_bytes()[:-1])
    place.shipper.ship()
    assert place.delivered() == ["a"]
    assert not segments(place.folder)


def test_a_bucket_that_is_gone_is_tried_with_growing_pauses_and_holds_up_no_other(
    place: Place,
) -> None:
    place.spool("lost", bucket="gone")
    place.spool("kept")
    tries = []
    for second in range(8):
        place.now = float(second)
        place.shipper.ship()
        tries.append(place.counts["failing"])
    assert tries == [1, 2, 2, 3, 3, 3, 3, 4], "after 1, 2, 4 seconds"
    assert place.delivered() == ["kept"]
    assert len(segments(place.folder)) == 1
    assert list(place.objects.writes.values()) == [1], "what was sent is not sent again"


def test_logs_of_a_bucket_that_is_gone_go_where_its_owner_sends_them_now(place: Place) -> None:
    place.spool("a", bucket="gone")
    with transaction(place.engine) as connection:
        config = {"s3Config": {"bucketName": BUCKET, "keyPrefix": "new"}}
        invocation_logging.put_config(connection, ACCOUNT, REGION, config)
    place.shipper.ship()
    assert place.delivered() == ["a"]
    assert next(iter(place.objects.content)).key.startswith("new/AWSLogs/")
    assert not segments(place.folder)


def test_what_no_bucket_takes_for_hours_is_given_up_and_counted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.spool("a", "b", bucket="gone")
    place.shipper.ship()
    assert len(segments(place.folder)) == 1
    later = time.time() + 3600 * place.settings.delivery_hours
    monkeypatch.setattr(time, "time", lambda: later)
    place.shipper.ship()
    assert place.counts["undeliverable"] == 2
    assert not segments(place.folder)
