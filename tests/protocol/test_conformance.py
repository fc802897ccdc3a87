"""Every operation that is built, held against its service model: what is refused, and how.

The wrong requests are made from the models (variants.py), and the table of operations says which
are built, so an operation that is added is covered by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from botocore.model import OperationModel
from tests.protocol.in_process import Gateway, Refused, gateway_in_process, write_unchecked
from tests.protocol.variants import Variant, valid, variants
from tests.protocol.wires import send

from outcrop.api.operations import OPERATIONS
from outcrop.wire.model import service_model
from outcrop.wire.serialize import HttpReply

BUILT = sorted(OPERATIONS)
WITH_MEMBERS = [
    (service, name)
    for service, name in BUILT
    if (shape := service_model(service).operation_model(name).input_shape) and shape.members
]
COUNT = re.compile(r"\d+ validation errors? detected: ")
LEAST = 3000
"""Variants there must be, so that a fault of the generator cannot pass as success."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_in_process(tmp_path_factory.mktemp("conformance")) as running:
        yield running


@pytest.mark.parametrize(("service", "name"), WITH_MEMBERS)
def test_every_mistake_that_the_model_knows_is_refused_with_its_place(
    gateway: Gateway, service: str, name: str
) -> None:
    operation = service_model(service).operation_model(name)
    wrong = variants(operation)
    requests = [(service, write_unchecked(operation, variant.params)) for variant in wrong]
    replies = gateway.replies(requests)
    failures = [
        f"{variant.what}\n    wanted {variant.code} with {variant.says}\n    {found}"
        for variant, reply in zip(wrong, replies, strict=True)
        if (found := _fault(variant, reply))
    ]
    assert not failures, f"{len(failures)} of {len(wrong)}:\n" + "\n".join(failures[:20])


def _fault(variant: Variant, reply: HttpReply) -> str | None:
    """Return what is wrong with the answer to a wrong request, or None."""
    message = json.loads(reply.body).get("message", "") if reply.body else ""
    form = COUNT.match(message) or variant.code == "SerializationException"
    code = reply.headers.get("x-amzn-errortype")
    if (reply.status, code) == (400, variant.code) and form and variant.says in message:
        return None
    return f"got {reply.status} {code}: {message[:400]}"


def test_there_are_at_least_three_thousand_wrong_requests() -> None:
    counts = {
        f"{service} {name}": len(variants(service_model(service).operation_model(name)))
        for service, name in WITH_MEMBERS
    }
    print(f"{sum(counts.values())} variants of {len(counts)} operations")  # noqa: T201 - it is asked for
    assert sum(counts.values()) >= LEAST, counts
    assert all(counts.values()), "an operation with members has a mistake to make"


@pytest.mark.parametrize(("service", "name"), BUILT)
def test_what_the_model_allows_is_never_refused_for_its_form(
    gateway: Gateway, service: str, name: str
) -> None:
    operation = service_model(service).operation_model(name)
    for seed, optional in enumerate((0.0, 0.3, 0.6, 1.0)):
        params = valid(operation, seed, optional)
        (reply,) = gateway.replies([(service, send(operation, params))])
        refused = _refusal(gateway, operation, reply)
        if refused is not None:
            assert refused.status not in (500, 501), (refused, params)
            assert refused.code != "SerializationException", (refused, params)
            assert not COUNT.match(refused.message), (refused, params)


def _refusal(gateway: Gateway, operation: OperationModel, reply: HttpReply) -> Refused | None:
    """Return the error that an answer is; a success is held against its shape."""
    try:
        gateway.read(operation, reply)
    except Refused as refused:
        return refused
    return None
