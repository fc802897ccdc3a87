"""A page's token leads to the next page of its own list, and to nothing else."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop.api.context import RequestContext, Services
from outcrop.api.paging import make_token, page_size, read_token
from outcrop.errors import ValidationException
from outcrop.identity.principals import user_principal


class _Services:
    page_key = b"k" * 32


CONTEXT = RequestContext(
    services=cast(Services, _Services()),
    request_id="r",
    account="123456789012",
    region="us-east-1",
    principal=user_principal("123456789012", "owner"),
    service="bedrock",
    operation="ListCustomModels",
    received_at=datetime(2026, 1, 1, tzinfo=UTC),
)
FILTERS: dict[str, Any] = {"nameContains": "a", "creationTimeAfter": CONTEXT.received_at}


def test_a_token_leads_back_to_its_position() -> None:
    token = make_token(CONTEXT, FILTERS, (123, "abcdefghijkl"))
    assert read_token(CONTEXT, {**FILTERS, "nextToken": token}) == (123, "abcdefghijkl")
    assert read_token(CONTEXT, FILTERS) is None


def test_the_page_size_may_change_from_page_to_page() -> None:
    token = make_token(CONTEXT, {**FILTERS, "maxResults": 1}, (1, "x"))
    assert read_token(CONTEXT, {**FILTERS, "maxResults": 7, "nextToken": token}) == (1, "x")
    assert (page_size({}), page_size({"maxResults": 7})) == (100, 7)


@pytest.mark.parametrize(
    ("context", "filters"),
    [
        (CONTEXT, {**FILTERS, "nameContains": "b"}),
        (CONTEXT, {}),
        (replace(CONTEXT, account="210987654321"), FILTERS),
        (replace(CONTEXT, region="eu-west-1"), FILTERS),
        (replace(CONTEXT, operation="ListModelCustomizationJobs"), FILTERS),
    ],
    ids=["other filter", "no filter", "other account", "other region", "other list"],
)
def test_a_token_of_another_list_is_refused(
    context: RequestContext, filters: dict[str, Any]
) -> None:
    token = make_token(CONTEXT, FILTERS, (1, "x"))
    with pytest.raises(ValidationException, match="nextToken is invalid"):
        read_token(context, {**filters, "nextToken": token})


@given(st.text(max_size=200))
def test_text_that_is_no_token_is_refused_and_never_an_error_of_ours(text: str) -> None:
    with pytest.raises(ValidationException, match="nextToken is invalid"):
        read_token(CONTEXT, {"nextToken": text})


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_a_changed_token_is_refused(place: int, difference: int) -> None:
    token = bytearray(make_token(CONTEXT, {}, (1234, "abcdefghijkl")), "ascii")
    token[place % len(token)] ^= difference
    changed = token.decode("latin-1")
    with pytest.raises(ValidationException, match="nextToken is invalid"):
        read_token(CONTEXT, {"nextToken": changed})


@pytest.mark.parametrize("created", [1, 12, 123])
def test_bits_that_base64_drops_cannot_be_changed_either(created: int) -> None:
    token = make_token(CONTEXT, {}, (created, "abcdefghijkl"))
    plain = token.rstrip("=")
    same = [
        changed
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        if (changed := plain[:-1] + letter + token[len(plain) :]) != token
    ]
    for changed in same:
        with pytest.raises(ValidationException, match="nextToken is invalid"):
            read_token(CONTEXT, {"nextToken": changed})
