"""Listings through the gateway over a real object store, against a plain sorted reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.protocol.s3_gateway import Gateway, gateway

PAGE_SIZES = [1, 2, 3, 1000]
# One name often begins another here, with what is below and above a slash after it.
NAMES = st.text("ab-. é0!🙂+", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
KEYS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def s3(place: Gateway) -> Any:
    return place.client()


def filled(place: Gateway, keys: list[str], *, versions_from: int | None = None) -> str:
    """Return a new bucket with these keys, with versions from the given one on."""
    s3, bucket = place.client(), place.bucket()
    for number, key in enumerate(keys):
        if number == versions_from:
            set_versioning(s3, bucket)
        s3.put_object(Bucket=bucket, Key=key, Body=b"")
    return bucket


def set_versioning(s3: Any, bucket: str) -> None:
    s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})


def expected(keys: list[str], prefix: str, delimiter: str, after: str) -> list[str]:
    """What S3 lists, as a sorted list says it: keys, and groups of keys up to a delimiter."""
    found: list[str] = []
    for key in sorted(set(keys), key=str.encode):
        if not key.startswith(prefix) or key <= after:
            continue
        begin, has, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        shown = prefix + begin + has if has else key
        if shown not in found and not (has and shown == after):
            found.append(shown)
    return found


def shown(page: dict[str, Any]) -> list[str]:
    keys = [item["Key"] for item in page.get("Contents", [])]
    groups = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
    return sorted(keys + groups, key=str.encode)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), keys=st.lists(KEYS, min_size=1, max_size=15, unique=True))
def test_any_listing_is_that_of_a_sorted_list(place: Gateway, data: Any, keys: list[str]) -> None:
    s3 = place.client()
    bucket = filled(
        place, keys, versions_from=data.draw(st.sampled_from([None, 0, len(keys) // 2]))
    )
    for _ in range(8):
        base = data.draw(st.sampled_from(keys))
        prefix = base[: data.draw(st.integers(0, len(base)))] if data.draw(st.booleans()) else ""
        delimiter = data.draw(st.sampled_from(["", "/", "-", "a/"]))
        after = data.draw(st.sampled_from(["", base, f"{base}/", base[:2], f"{base}-"]))
        size = data.draw(st.sampled_from(PAGE_SIZES))
        query = {"Bucket": bucket, "Prefix": prefix, "Delimiter": delimiter}
        wanted = expected(keys, prefix, delimiter, after)
        for operation, marker in (("list_objects_v2", "StartAfter"), ("list_objects", "Marker")):
            pages = s3.get_paginator(operation).paginate(
                **query, **({marker: after} if after else {}), PaginationConfig={"PageSize": size}
            )
            found = [shown(page) for page in pages]
            assert [item for page in found for item in page] == wanted
            assert all(len(page) == size for page in found[:-1])


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), keys=st.lists(KEYS, min_size=1, max_size=12))
def test_emptying_a_bucket_page_by_page_leaves_nothing(
    place: Gateway, data: Any, keys: list[str]
) -> None:
    s3, bucket = place.client(), place.bucket()
    begins = data.draw(st.integers(0, len(keys)))
    made = set()
    for number, key in enumerate(keys + keys[::2]):
        if number == begins:
            set_versioning(s3, bucket)
        answer = s3.put_object(Bucket=bucket, Key=key, Body=b"")
        made.add((key, answer.get("VersionId", "null")))
        if number > begins and data.draw(st.booleans()):
            made.add((key, s3.delete_object(Bucket=bucket, Key=key)["VersionId"]))
    for size in PAGE_SIZES:
        found = [item for page in versions(s3, bucket, size) for item in page]
        assert sorted(found) == sorted(made)
    for page in versions(s3, bucket, data.draw(st.sampled_from(PAGE_SIZES))):
        wanted = [{"Key": key, "VersionId": version} for key, version in page]
        assert "Errors" not in s3.delete_objects(Bucket=bucket, Delete={"Objects": wanted})
    s3.delete_bucket(Bucket=bucket)


def versions(s3: Any, bucket: str, size: int) -> Iterator[list[tuple[str, str]]]:
    pages = s3.get_paginator("list_object_versions").paginate(
        Bucket=bucket, PaginationConfig={"PageSize": size}
    )
    for page in pages:
        found = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
        assert len(found) <= size
        yield [(item["Key"], item["VersionId"]) for item in found]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_versions_of_names_that_begin_alike_are_all_listed(
    place: Gateway, s3: Any, size: int
) -> None:
    keys = ["a", "a/1", "a-", *(f"{name}/{n}" for name in ("x", "y", "x-old") for n in range(4))]
    bucket = filled(place, keys)
    found = [key for page in versions(s3, bucket, size) for key, _ in page]
    assert found == sorted(keys)


def test_listing_is_in_the_order_of_bytes(place: Gateway, s3: Any) -> None:
    keys = ["a", "a/1", "a/2", "a/b/3", "a-", "ab"]
    bucket = filled(place, keys)
    found = s3.list_objects_v2(Bucket=bucket, StartAfter="a-")["Contents"]
    assert [item["Key"] for item in found] == ["a/1", "a/2", "a/b/3", "ab"]
    assert shown(s3.list_objects(Bucket=bucket, Marker="a")) == sorted(keys)[1:]


def test_listing_of_more_keys_than_a_page_of_the_store(place: Gateway, s3: Any) -> None:
    keys = [f"d/k{number:04d}" for number in range(1100)] + ["d-", "d", "e/1"]
    bucket = filled(place, keys)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    assert [item["Key"] for page in pages for item in page["Contents"]] == sorted(keys)
    assert [key for page in versions(s3, bucket, 1000) for key, _ in page] == sorted(keys)


def test_empty_folder_is_not_listed(place: Gateway, s3: Any) -> None:
    bucket = filled(place, ["gone/1", "kept/1"])
    s3.delete_object(Bucket=bucket, Key="gone/1")
    assert shown(s3.list_objects_v2(Bucket=bucket, Delimiter="/")) == ["kept/"]


@pytest.mark.parametrize(
    "query",
    [
        {"ContinuationToken": "nonsense"},
        {"ContinuationToken": "YQ=="},
        {"MaxKeys": -1},
    ],
)
def test_bad_parameters_of_a_listing_are_refused(
    place: Gateway, s3: Any, query: dict[str, Any]
) -> None:
    with pytest.raises(s3.exceptions.ClientError, match="InvalidArgument"):
        s3.list_objects_v2(Bucket=place.bucket(), **query)


def test_listing_a_missing_bucket_says_so(s3: Any) -> None:
    for operation in ("list_objects", "list_objects_v2", "list_object_versions"):
        with pytest.raises(s3.exceptions.ClientError, match="NoSuchBucket"):
            getattr(s3, operation)(Bucket="never-made")
