"""Tags of every taggable kind, and the rules of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection
from tests.unit.api.conftest import Context
from tests.unit.store.build import (
    new_deployment,
    new_job,
    new_model,
    new_profile,
    new_throughput,
)

from outcrop.api import tags
from outcrop.api.context import RequestContext, Services
from outcrop.errors import (
    AccessDeniedException,
    ResourceNotFoundException,
    TooManyTagsException,
    ValidationException,
)
from outcrop.store import deployments, jobs, models, profiles, throughputs
from outcrop.store.database import transaction
from outcrop.wire.model import service_model
from outcrop.wire.validate import validate


def _model(connection: Connection) -> str:
    new = new_model("mine")
    models.insert_model(connection, new)
    return new.arn


def _throughput(connection: Connection) -> str:
    return throughputs.create_throughput(
        *(connection, new_throughput("pt")),
        max_throughputs=1,
        max_model_units=1,
        machine_model_units=1,
    ).arn


MAKE: dict[str, Callable[[Connection], str]] = {
    "model-customization-job": lambda connection: jobs.create_job(connection, new_job("j")).arn,
    "custom-model": _model,
    "provisioned-model": _throughput,
    "custom-model-deployment": lambda connection: (
        deployments.create_deployment(
            connection, new_deployment("d", "arn:model"), max_deployments=1
        ).arn
    ),
    "application-inference-profile": lambda connection: (
        profiles.create_profile(connection, new_profile("p"), max_profiles=1).arn
    ),
}
"""A way to make one of a kind."""


def tag(key: str, value: str = "") -> dict[str, str]:
    return {"key": key, "value": value}


def put(caller: RequestContext, arn: str, *new: dict[str, str]) -> list[dict[str, str]]:
    tags.tag_resource(caller, {"resourceARN": arn, "tags": list(new)})
    return list(tags.list_tags_for_resource(caller, {"resourceARN": arn})["tags"])


def made(services: Services, kind: str) -> str:
    with transaction(services.engine) as connection:
        return MAKE[kind](connection)


@pytest.mark.parametrize("kind", sorted(MAKE))
def test_a_resource_of_every_kind_is_tagged_listed_and_untagged(
    services: Services, context: Context, kind: str
) -> None:
    arn, caller = made(services, kind), context("TagResource")
    validate(
        service_model("bedrock").operation_model("TagResource").input_shape,
        {"resourceARN": arn, "tags": [tag("a")]},
    )
    assert put(caller, arn, tag("b", "2"), tag("a")) == [tag("a"), tag("b", "2")]
    tags.untag_resource(caller, {"resourceARN": arn, "tagKeys": ["a", "unknown"]})
    assert put(caller, arn) == [tag("b", "2")]
    user = context("TagResource", allowed=("bedrock:TagResource", f"{arn[:-12]}nobody"))
    with pytest.raises(AccessDeniedException):
        put(user, arn, tag("c"))
    with pytest.raises(ResourceNotFoundException, match="does not name a"):
        put(caller, arn[:-12] + "abcdefghijkl", tag("a"))


@pytest.mark.parametrize("kind", ["data-task", "model-copy-job", "foundation-model"])
def test_what_has_no_tags_is_not_there_for_them(context: Context, kind: str) -> None:
    arn = f"arn:aws:bedrock:us-east-1:123456789012:{kind}/abcdefghijkl"
    with pytest.raises(ResourceNotFoundException, match=r"does not exist\.$"):
        put(context("TagResource"), arn, tag("a"))


@pytest.mark.parametrize("key", ["aws:team", "AWS:x", "aWs:"])
def test_reserved_keys_are_refused_and_nothing_is_kept(
    services: Services, context: Context, key: str
) -> None:
    arn, caller = made(services, "custom-model"), context("TagResource")
    with pytest.raises(ValidationException, match=f"The tag key {key} is reserved"):
        put(caller, arn, tag("a"), tag(key))
    assert put(caller, arn, tag("awsteam"), tag("my:aws:x")) == [tag("awsteam"), tag("my:aws:x")]


def test_a_key_stands_once_in_a_request(context: Context, services: Services) -> None:
    arn = made(services, "custom-model")
    with pytest.raises(ValidationException, match="The tag key a stands twice"):
        put(context("TagResource"), arn, tag("a", "1"), tag("a", "2"))


def test_fifty_tags_counting_those_that_are_there_and_the_error_names_the_resource(
    services: Services, context: Context
) -> None:
    arn, caller = made(services, "custom-model-deployment"), context("TagResource")
    assert len(put(caller, arn, *(tag(f"k{number}") for number in range(50)))) == 50
    with pytest.raises(TooManyTagsException, match="51 tags; 50 are allowed") as refused:
        put(caller, arn, tag("one-more"))
    assert refused.value.members == {"resourceName": arn}
    assert len(put(caller, arn, tag("k0", "replaced"))) == 50


@pytest.mark.parametrize(
    ("bad", "allowed"),
    [
        (tag("k" * 129), tag("k" * 128)),
        (tag(""), tag("k")),
        (tag("k", "v" * 257), tag("k", "v" * 256)),
        (tag("k!"), tag("a Z9._:/=+@-")),
        (tag("k", "v;"), tag("k", "a Z9._:/=+@-")),
    ],
)
def test_lengths_and_characters_are_the_service_models(
    bad: dict[str, str], allowed: dict[str, str]
) -> None:
    shape = service_model("bedrock").operation_model("TagResource").input_shape
    arn = "arn:aws:bedrock:us-east-1:123456789012:provisioned-model/abcdefghijkl"

    def check(*new: dict[str, str]) -> None:
        params: dict[str, Any] = {"resourceARN": arn, "tags": list(new)}
        validate(shape, params)

    check(allowed)
    with pytest.raises(ValidationException, match="1 validation error"):
        check(bad)
