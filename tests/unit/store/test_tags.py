"""Tags of a request: by key, none reserved, none twice, fifty at most."""

from __future__ import annotations

import pytest

from outcrop.errors import TooManyTagsException, ValidationException
from outcrop.store.tags import MAX_TAGS, checked_tags


def tag(key: str, value: str = "") -> dict[str, str]:
    return {"key": key, "value": value}


def test_tags_are_read_by_key_whose_case_counts() -> None:
    assert checked_tags("r", [tag("a", "1"), tag("A")]) == {"a": "1", "A": ""}
    assert checked_tags("r", []) == {}


@pytest.mark.parametrize("key", ["aws:team", "AWS:x", "aWs:"])
def test_reserved_keys_are_refused(key: str) -> None:
    with pytest.raises(ValidationException, match=f"The tag key {key} is reserved"):
        checked_tags("r", [tag("a"), tag(key)])


def test_a_key_stands_once() -> None:
    with pytest.raises(ValidationException, match="The tag key a stands twice"):
        checked_tags("r", [tag("a", "1"), tag("a", "2")])


def test_fifty_are_taken_and_one_more_is_refused_with_the_resource() -> None:
    many = [tag(f"k{number}") for number in range(MAX_TAGS + 1)]
    assert len(checked_tags("r", many[1:])) == MAX_TAGS
    with pytest.raises(TooManyTagsException, match="51 tags; 50 are allowed") as refused:
        checked_tags("r", many)
    assert refused.value.members == {"resourceName": "r"}
