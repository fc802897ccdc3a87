"""Two versions of a file: what was added, removed and changed, by its lines."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.data.diff import Diff, Version, compare
from outcrop.errors import DataError


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def diff(old: bytes, new: bytes) -> Diff:
    def opens(content: bytes) -> Callable[[], AbstractContextManager[BinaryIO]]:
        return lambda: io.BytesIO(content)

    return compare(Version("old", opens(old)), Version("new", opens(new)))


def test_added_removed_and_changed_records_are_named_by_their_lines() -> None:
    old = lines(pair("a", "1"), pair("b", "2"), pair("c", "3"), pair("d", "4"))
    new = lines(pair("d", "4"), pair("a", "9"), pair("e", "5"), pair("b", "2"))
    found = diff(old, new)
    assert (found.added, found.removed, found.changed) == ((3,), (3,), ((1, 2),))
    assert found.num_unchanged == 2
    assert not found.is_same


def test_order_of_lines_and_keys_blank_lines_and_packing_change_no_record() -> None:
    old = lines(pair("a", "1"), pair("b", "2"))
    new = b'\xef\xbb\xbf{"completion": "2", "prompt": "b"}\r\n\n' + lines(pair("a", "1"))
    found = diff(old, gzip.compress(new))
    assert found.is_same
    assert (found.old.num_records, found.new.num_records, found.num_unchanged) == (2, 2, 2)


def test_digests_and_sizes_are_those_of_the_bytes() -> None:
    old, new = lines(pair("a", "1")), lines(pair("a", "1"))[:-1]
    found = diff(old, new)
    assert found.is_same
    for facts, content in ((found.old, old), (found.new, new)):
        assert facts.digest == hashlib.sha256(content).hexdigest()
        assert facts.num_bytes == len(content)
    assert found.old.digest != found.new.digest


def test_a_record_that_stands_twice_counts_twice() -> None:
    once, twice = lines(pair("a", "1")), lines(pair("a", "1"), pair("a", "1"))
    assert len(diff(once, twice).added) == 1
    assert len(diff(twice, once).removed) == 1


def test_conversations_change_by_their_answer_documents_only_come_and_go() -> None:
    def chat(question: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    found = diff(lines(chat("a", "1"), chat("b", "2")), lines(chat("a", "7"), chat("c", "2")))
    assert (found.changed, found.added, found.removed) == (((1, 1),), (2,), (2,))
    found = diff(lines({"input": "one"}), lines({"input": "two"}))
    assert (found.changed, found.added, found.removed) == ((), (1,), (1,))


def test_lines_that_cannot_be_used_are_compared_by_their_bytes() -> None:
    found = diff(b"not json\n" + b"\xff\n", b"not json\n" + b"\xfe\n")
    assert (found.num_unchanged, found.added, found.removed) == (1, (2,), (2,))


def test_a_file_that_cannot_be_unpacked_is_refused() -> None:
    with pytest.raises(DataError, match="gzip"):
        diff(gzip.compress(lines(pair("a", "1")))[:-9], b"")


PAIRS = st.lists(st.builds(pair, st.sampled_from("abc"), st.sampled_from("12")), max_size=8)


@given(PAIRS, PAIRS)
def test_every_record_is_accounted_for_and_backwards_is_the_mirror(
    old: list[dict[str, str]], new: list[dict[str, str]]
) -> None:
    found, back = diff(lines(*old), lines(*new)), diff(lines(*new), lines(*old))
    assert found.num_unchanged + len(found.removed) + len(found.changed) == len(old)
    assert found.num_unchanged + len(found.added) + len(found.changed) == len(new)
    assert len(set(found.added) | {line for _, line in found.changed}) + found.num_unchanged == len(
        new
    )
    assert found.num_unchanged == back.num_unchanged
    assert len(found.changed) == len(back.changed)
    assert (len(found.added), len(found.removed)) == (len(back.removed), len(back.added))
