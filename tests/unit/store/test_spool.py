"""What was appended is read again after every kind of end; what was half-written is not."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.store.spool import (
    Segment,
    SpoolFullError,
    SpoolWriter,
    folder_bytes,
    frame,
    read_frames,
    remove,
    segments,
    taken,
)

RECORDS = st.lists(st.binary(min_size=1, max_size=40), max_size=6)
WRITER = """
import sys
from pathlib import Path
from outcrop.store.spool import SpoolWriter
writer = SpoolWriter(Path(sys.argv[1]), max_bytes=1 << 30, segment_bytes=1 << 12)
for number in range(10 ** 9):
    writer.append(b"%d " % number * 50)
    print(number, flush=True)
"""


def writer(folder: Path, max_bytes: int = 1 << 20, segment_bytes: int = 1 << 16) -> SpoolWriter:
    return SpoolWriter(folder, max_bytes=max_bytes, segment_bytes=segment_bytes)


def read(folder: Path) -> list[bytes]:
    """Return the records of all segments that can be taken."""
    found: list[bytes] = []
    for path in segments(folder):
        with taken(path) as segment:
            found += segment.records if segment else ()
    return found


@given(records=RECORDS, data=st.data())
def test_a_segment_cut_at_any_byte_gives_exactly_its_whole_records(
    records: list[bytes], data: st.DataObject
) -> None:
    content = b"".join(map(frame, records))
    cut = data.draw(st.integers(0, len(content)))
    ends = [sum(len(frame(each)) for each in records[:n]) for n in range(len(records) + 1)]
    whole = sum(end <= cut for end in ends) - 1
    found, is_torn = read_frames(content[:cut])
    assert found == tuple(records[:whole])
    assert is_torn is (cut not in ends)


@given(records=RECORDS, junk=st.binary(min_size=1, max_size=30))
def test_what_stands_behind_a_torn_record_is_no_record(records: list[bytes], junk: bytes) -> None:
    content = b"".join(map(frame, records)) + frame(b"torn")[:-1] + junk
    found, is_torn = read_frames(content)
    assert is_torn
    assert found[: len(records)] == tuple(records)
    assert len(found) <= len(records) + (junk[:1] == b"n")


def test_zeros_that_a_power_cut_leaves_are_no_records() -> None:
    assert read_frames(frame(b"a") + bytes(64)) == ((b"a",), True)


def test_a_writer_that_is_killed_loses_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(200)][-1]
    process.send_signal(signal.SIGKILL)
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split("\n")[:-1])])
    process.stdout.close()
    process.wait()
    numbers = [int(record.split()[0]) for record in read(tmp_path)]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > acknowledged
    assert len(segments(tmp_path)) > 1, "segments were closed on the way"


def test_a_segment_that_is_written_is_not_taken_and_a_closed_one_is(tmp_path: Path) -> None:
    open_one = writer(tmp_path)
    open_one.append(b"first")
    assert read(tmp_path) == []
    open_one.close()
    assert read(tmp_path) == [b"first"]
    open_one.append(b"second")
    open_one.close()
    with taken(segments(tmp_path)[0]) as held:
        assert held is not None
        with taken(held.path) as again:
            assert again is None, "one reader at a time"
        remove(held)
    with taken(held.path) as gone:
        assert gone is None
    assert read(tmp_path) == [b"second"]


def test_a_full_folder_refuses_whole_records_until_there_is_room(tmp_path: Path) -> None:
    small = writer(tmp_path, max_bytes=3 * len(frame(b"x" * 10)), segment_bytes=10)
    for _ in range(3):
        small.append(b"x" * 10)
    with pytest.raises(SpoolFullError):
        small.append(b"x" * 10)
    assert folder_bytes(tmp_path) == 3 * len(frame(b"x" * 10))
    with taken(segments(tmp_path)[0]) as segment:
        assert isinstance(segment, Segment)
        remove(segment)
    small.append(b"y" * 10)
    assert read(tmp_path) == [b"x" * 10, b"x" * 10, b"y" * 10]


def test_a_disk_that_takes_a_part_of_a_record_hides_no_later_one(tmp_path: Path) -> None:
    filling = writer(tmp_path)
    filling.append(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(frame(b"before")) + 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            filling.append(b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    filling.append(b"after")
    filling.close()
    assert read(tmp_path) == [b"before", b"after"]


def test_a_record_behind_one_that_cannot_be_taken_back_has_a_segment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = writer(tmp_path)
    failing.append(b"before")
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", _refuse)
        broken.setattr(os, "ftruncate", _refuse)
        with pytest.raises(OSError, match="broken"):
            failing.append(b"lost")
    failing.append(b"after")
    failing.close()
    assert read(tmp_path) == [b"before", b"after"]
    assert len(segments(tmp_path)) == 2


def _refuse(*arguments: object) -> int:
    raise OSError("the disk is broken")


def test_a_segment_that_a_reader_took_before_its_writer_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.flock, []

    def slower(file: int, operation: int) -> None:
        calls.append(file)
        if len(calls) == 1:
            raise BlockingIOError
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slower)
    late = writer(tmp_path)
    late.append(b"record")
    late.close()
    assert read(tmp_path) == [b"record"]
    assert [path.stat().st_size > 0 for path in segments(tmp_path)] == [False, True]


def test_a_segment_that_was_sent_on_while_it_was_opened_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = writer(tmp_path)
    sent.append(b"record")
    sent.close()
    (path,) = segments(tmp_path)
    lock = fcntl.flock

    def overtaken(file: int, operation: int) -> None:
        path.unlink()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    with taken(path) as segment:
        assert segment is None


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert segments(tmp_path / "none") == []
    assert folder_bytes(tmp_path / "none") == 0


def test_segments_are_for_their_owner_only(tmp_path: Path) -> None:
    one = writer(tmp_path / "spool")
    one.append(b"secret")
    one.sync()
    assert [path.stat().st_mode & 0o777 for path in segments(tmp_path / "spool")] == [0o600]
    assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
    assert one.age_seconds is not None
    one.close()
    assert one.age_seconds is None


def test_a_segment_tells_its_name_and_age_and_a_sync_brings_it_to_the_disk(tmp_path: Path) -> None:
    spool = writer(tmp_path)
    spool.append(b"one")
    began = time.time()
    for _ in range(2):
        spool.sync()
    for _ in range(2):
        spool.close()
    (path,) = segments(tmp_path)
    with taken(path) as segment:
        assert segment is not None
        assert segment.records == (b"one",)
        assert path.name.startswith(segment.name)
        assert abs(segment.age_seconds - (time.time() - began)) < 60
