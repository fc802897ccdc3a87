"""Data is what it was when the job first checked it."""

from __future__ import annotations

import hashlib

import pytest
from tests.unit.jobs.memory_store import BUCKET, MemoryStore

from outcrop.errors import TrainingError
from outcrop.ids import S3Uri
from outcrop.jobs.digests import DataDigests

URI = S3Uri(BUCKET, "train.jsonl")
CONTENT = b"".join(b"line %d\n" % number for number in range(200_000))


def read(objects: MemoryStore, digests: DataDigests) -> bytes:
    with digests.reading(objects, URI) as stream:
        return b"".join(iter(lambda: stream.readline(100), b""))


def test_what_is_read_is_what_the_digest_is_of() -> None:
    digests = DataDigests()
    assert read(MemoryStore(**{URI.key: CONTENT}), digests) == CONTENT
    assert digests.found == {str(URI): hashlib.sha256(CONTENT).hexdigest()}


def test_content_that_changed_is_refused_with_both_digests() -> None:
    first, second = DataDigests(), DataDigests()
    read(MemoryStore(**{URI.key: CONTENT}), first)
    read(MemoryStore(**{URI.key: CONTENT[:-1]}), second)
    first.check(first.found)
    second.check({})
    with pytest.raises(TrainingError) as caught:
        second.check(first.found)
    for text in (str(URI), *first.found.values(), *second.found.values(), "nothing was published"):
        assert text in str(caught.value)


def test_an_object_that_changes_between_two_reads_of_one_attempt_is_refused() -> None:
    digests, objects = DataDigests(), MemoryStore(**{URI.key: CONTENT})
    read(objects, digests)
    objects.write(URI, b"other\n")
    with pytest.raises(TrainingError, match="changed while the job ran"):
        read(objects, digests)
