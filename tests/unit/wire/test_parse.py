"""Requests to inputs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from botocore.model import ServiceModel
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError
from outcrop.wire.model import REST_SERVICES, service_model
from outcrop.wire.parse import convert, parse_query_request, parse_request
from outcrop.wire.route import Route
from outcrop.wire.validate import validate

# What the bundled models do not use, but the protocol has.
MODEL = ServiceModel(
    {
        "metadata": {"protocol": "rest-json", "apiVersion": "2020-01-01"},
        "operations": {
            "Everything": {
                "name": "Everything",
                "http": {"method": "POST", "requestUri": "/x/{id}"},
                "input": {"shape": "In"},
            },
            "Text": {
                "name": "Text",
                "http": {"method": "POST", "requestUri": "/text"},
                "input": {"shape": "TextIn"},
            },
            "Form": {"name": "Form", "http": {"method": "POST"}, "input": {"shape": "FormIn"}},
        },
        "shapes": {
            "In": {
                "type": "structure",
                "members": {
                    "id": {"shape": "Integer", "location": "uri", "locationName": "id"},
                    "names": {
                        "shape": "Strings",
                        "location": "querystring",
                        "locationName": "name",
                    },
                    "numbers": {
                        "shape": "Integers",
                        "location": "querystring",
                        "locationName": "n",
                    },
                    "rest": {"shape": "StringMap", "location": "querystring"},
                    "lists": {"shape": "ListMap", "location": "querystring"},
                    "flag": {"shape": "Boolean", "location": "header", "locationName": "X-Flag"},
                    "ratio": {"shape": "Double", "location": "header", "locationName": "X-Ratio"},
                    "when": {"shape": "Time", "location": "header", "locationName": "X-When"},
                    "days": {"shape": "Times", "location": "header", "locationName": "X-Days"},
                    "words": {"shape": "Strings", "location": "header", "locationName": "X-Words"},
                    "json": {
                        "shape": "Json",
                        "location": "header",
                        "locationName": "X-Json",
                        "jsonvalue": True,
                    },
                    "meta": {
                        "shape": "StringMap",
                        "location": "headers",
                        "locationName": "X-Meta-",
                    },
                    "body": {"shape": "Integer", "locationName": "Body"},
                    "time": {"shape": "Time"},
                },
            },
            "TextIn": {"type": "structure", "members": {"t": {"shape": "String"}}, "payload": "t"},
            "FormIn": {
                "type": "structure",
                "members": {
                    "Name": {"shape": "String"},
                    "Tags": {"shape": "Tags"},
                    "Flat": {"shape": "FlatStrings", "locationName": "F"},
                    "Map": {"shape": "StringMap"},
                    "Tree": {"shape": "Tree"},
                },
            },
            "Tree": {
                "type": "structure",
                "members": {"Value": {"shape": "Integer"}, "Tree": {"shape": "Tree"}},
            },
            "Tags": {"type": "list", "member": {"shape": "Tag"}},
            "Tag": {
                "type": "structure",
                "members": {"Key": {"shape": "String"}, "On": {"shape": "Boolean"}},
            },
            "FlatStrings": {"type": "list", "member": {"shape": "String"}, "flattened": True},
            "String": {"type": "string"},
            "Json": {"type": "string", "jsonvalue": True},
            "Strings": {"type": "list", "member": {"shape": "String"}},
            "Integers": {"type": "list", "member": {"shape": "Integer"}},
            "StringMap": {
                "type": "map",
                "key": {"shape": "String"},
                "value": {"shape": "String"},
            },
            "ListMap": {"type": "map", "key": {"shape": "String"}, "value": {"shape": "Strings"}},
            "Integer": {"type": "integer"},
            "Boolean": {"type": "boolean"},
            "Double": {"type": "double"},
            "Time": {"type": "timestamp"},
            "Times": {"type": "list", "member": {"shape": "Time"}},
        },
    },
    service_name="everything",
)


def _everything(
    query: str = "", headers: dict[str, str] | None = None, body: bytes = b"", id: str = "7"
) -> dict[str, Any]:
    route = Route("everything", MODEL.operation_model("Everything"), {"id": id})
    return parse_request(route, query=query, headers=headers or {}, body=body)


def test_members_are_taken_from_where_the_model_says() -> None:
    parsed = _everything(
        query="name=a%20b&n=1&other=x%2By&name=c+d&n=-2&flag=q",
        headers={
            "x-flag": "true",
            "x-ratio": "-1.5e3",
            "x-when": "Fri, 02 Jan 2026 03:04:05 GMT",
            "x-days": "Fri, 02 Jan 2026 03:04:05 GMT, Sat, 03 Jan 2026 03:04:05 GMT",
            "x-words": "a, b,c",
            "x-json": "eyJhIjogWzFdfQ==",
            "x-meta-color": "red",
            "x-unknown": "1",
        },
        body=b'{"Body": 3, "time": 1767323045.5, "body": 9}',
    )
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert parsed == {
        "id": 7,
        "names": ["a b", "c d"],
        "numbers": [1, -2],
        "rest": {"other": "x+y", "flag": "q"},
        "lists": {"other": ["x+y"], "flag": ["q"]},
        "flag": True,
        "ratio": -1500.0,
        "when": moment,
        "days": [moment, moment.replace(day=3)],
        "words": ["a", "b", "c"],
        "json": {"a": [1]},
        "meta": {"color": "red"},
        "body": 3,
        "time": moment.replace(microsecond=500000),
    }


def test_what_was_not_sent_is_left_out() -> None:
    assert _everything() == {"id": 7}
    assert _everything(body=b'{"Body": null}') == {"id": 7}


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-02T03:04:05Z",
        "2026-01-02T03:04:05.000Z",
        "2026-01-02T04:04:05+01:00",
        "2026-01-02T03:04:05",
        "1767323045",
        "1767323045.0",
        "Fri, 02 Jan 2026 03:04:05 GMT",
    ],
)
def test_a_time_is_read_in_every_form(text: str) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert _everything(headers={"x-when": text})["when"] == moment
    assert _everything(body=json.dumps({"time": text}).encode())["time"] == moment


@pytest.mark.parametrize(
    ("given", "member"),
    [
        ({"id": "seven"}, "id"),
        ({"id": "7.0"}, "id"),
        ({"id": "9" * 30}, "id"),
        ({"id": "2147483648"}, "id"),
        ({"query": "n=x"}, "numbers.1.member"),
        ({"query": "n="}, "numbers.1.member"),
        ({"headers": {"x-flag": "True"}}, "flag"),
        ({"headers": {"x-ratio": "nan"}}, "ratio"),
        ({"headers": {"x-ratio": "1e999"}}, "ratio"),
        ({"headers": {"x-when": "yesterday"}}, "when"),
        ({"headers": {"x-when": "2026-13-02T03:04:05Z"}}, "when"),
        ({"headers": {"x-when": "9" * 300}}, "when"),
        ({"headers": {"x-json": "{}"}}, "json"),
        ({"body": b'{"Body": "3"}'}, "body"),
        ({"body": b'{"Body": true}'}, "body"),
        ({"body": b'{"Body": 1.5}'}, "body"),
        ({"body": b'{"Body": 99999999999}'}, "body"),
        ({"body": b'{"time": {}}'}, "time"),
        ({"body": b'{"time": 1e300}'}, "time"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(given: dict[str, Any], member: str) -> None:
    with pytest.raises(ApiError) as caught:
        _everything(**given)
    assert (caught.value.code, caught.value.http_status) == ("SerializationException", 400)
    assert f"'{member}'" in caught.value.message


@pytest.mark.parametrize(
    ("shape", "value", "where"),
    [
        ("CreateModelCustomizationJobRequest", {"jobName": 5}, "jobName"),
        ("CreateModelCustomizationJobRequest", {"trainingDataConfig": []}, "trainingDataConfig"),
        ("CreateModelCustomizationJobRequest", {"hyperParameters": {"a": 1}}, "hyperParameters.a"),
        ("CreateModelCustomizationJobRequest", {"hyperParameters": "a"}, "hyperParameters"),
        ("CreateModelCustomizationJobRequest", {"jobTags": {}}, "jobTags"),
        ("CreateModelCustomizationJobRequest", {"jobTags": [1]}, "jobTags.1.member"),
        (
            "CreateModelCustomizationJobRequest",
            {"jobTags": [{"key": "a", "value": False}]},
            "jobTags.1.member.value",
        ),
        ("CreateProvisionedModelThroughputRequest", {"modelUnits": "1"}, "modelUnits"),
    ],
)
def test_a_json_value_of_the_wrong_type_is_refused_by_its_path(
    shape: str, value: Any, where: str
) -> None:
    with pytest.raises(ApiError) as caught:
        convert(service_model("bedrock").shape_for(shape), value, "")
    assert caught.value.code == "SerializationException"
    assert f"'{where}'" in caught.value.message


def test_a_number_is_read_strictly() -> None:
    shape = service_model("bedrock-runtime").shape_for("InferenceConfiguration")
    shape = shape.members["temperature"]
    assert convert(shape, 1, "temperature") == 1.0
    for wrong in ("1", True, 10**400):
        with pytest.raises(ApiError, match="'temperature'"):
            convert(shape, wrong, "temperature")


def test_base64_is_read_strictly() -> None:
    shape = service_model("bedrock-runtime").shape_for("ImageSource").members["bytes"]
    assert convert(shape, "aGk=", "bytes") == b"hi"
    for broken in ("aGk", "aG k=", "äöü=", "aGk=%", 5):
        with pytest.raises(ApiError, match="'bytes'"):
            convert(shape, broken, "bytes")


@pytest.mark.parametrize("query", ["a=%ff", "a=%00", "name=\u00e9", "&".join(["a=1"] * 1001)])
def test_a_query_that_is_no_text_or_too_long_is_refused(query: str) -> None:
    with pytest.raises(ApiError) as caught:
        _everything(query=query)
    assert caught.value.code == "SerializationException"


def test_a_text_payload_is_the_body() -> None:
    route = Route("everything", MODEL.operation_model("Text"), {})
    parsed = parse_request(route, query="", headers={}, body="ünïcode".encode())
    assert parsed == {"t": "ünïcode"}
    with pytest.raises(ApiError):
        parse_request(route, query="", headers={}, body=b"\xff")


def test_nulls_within_lists_stay_for_validation_to_name() -> None:
    shape = service_model("bedrock").shape_for("CreateModelCustomizationJobRequest")
    assert convert(shape, {"jobTags": [None], "jobName": None}, "") == {"jobTags": [None]}


FORM = ServiceModel(
    {
        **MODEL._service_description,
        "metadata": {"protocol": "query", "apiVersion": "2020-01-01"},
    },
    service_name="form",
)


def test_a_form_is_read_with_its_lists_maps_and_structures() -> None:
    body = (
        b"Action=Form&Version=2020-01-01&Name=a+b&Tags.member.1.Key=k&Tags.member.1.On=true"
        b"&Tags.member.2.Key=l&F.1=x&F.2=y&Map.entry.1.key=m&Map.entry.1.value=n"
        b"&Tree.Tree.Value=5"
    )
    operation, params = parse_query_request(FORM, body)
    assert operation.name == "Form"
    assert params == {
        "Name": "a b",
        "Tags": [{"Key": "k", "On": True}, {"Key": "l"}],
        "Flat": ["x", "y"],
        "Map": {"m": "n"},
        "Tree": {"Tree": {"Value": 5}},
    }
    assert parse_query_request(FORM, b"", query="Action=Form&Name=z")[1] == {"Name": "z"}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "MissingAction"),
        (b"Version=2011-06-15", "MissingAction"),
        (b"Action=NoSuchThing&Version=2011-06-15", "InvalidAction"),
        (b"Action=GetCallerIdentity&Version=2010-01-01", "InvalidAction"),
        (b"Action=\xff", "SerializationException"),
        (b"Action=%ff", "SerializationException"),
    ],
)
def test_a_form_without_a_known_action_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_query_request(service_model("sts"), body)
    assert (caught.value.code, caught.value.http_status) == (code, 400)


ROUTES = [
    Route(service, operation, dict.fromkeys(operation.http["requestUri"].split("{")[1:], "x"))
    for service in REST_SERVICES
    for operation in (
        service_model(service).operation_model(name)
        for name in service_model(service).operation_names
    )
]
WIRE_NAMES = sorted(
    {
        name
        for route in ROUTES
        if route.operation.input_shape is not None
        for name in route.operation.input_shape.members
    }
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
BODIES = st.one_of(
    st.binary(),
    st.dictionaries(
        st.sampled_from(WIRE_NAMES),
        st.recursive(
            LEAVES,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["key", "value", "s3Uri", "text", "content", "role"]), inner
                )
            ),
            max_leaves=6,
        ),
        max_size=12,
    ).map(lambda value: json.dumps(value).encode("utf-8", "surrogatepass")),
)


@settings(max_examples=400, deadline=None)
@given(
    route=st.sampled_from(ROUTES),
    label=st.text(),
    query=st.one_of(
        st.text(),
        st.lists(
            st.tuples(st.sampled_from([*WIRE_NAMES, "type"]), st.text(alphabet="a1%+=;Z-:.T"))
        ).map(lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)),
    ),
    headers=st.dictionaries(
        st.sampled_from(["content-type", "accept", "x-amzn-bedrock-trace", "x-amz-client-token"]),
        st.text(),
    ),
    body=BODIES,
)
def test_no_request_raises_anything_but_an_api_error(
    route: Route, label: str, query: str, headers: dict[str, str], body: bytes
) -> None:
    route = Route(route.service, route.operation, dict.fromkeys(route.path_params, label))
    refused: ApiError | None = None
    try:
        params = parse_request(route, query=query, headers=headers, body=body)
        if route.operation.input_shape is not None:
            validate(route.operation.input_shape, params)
    except ApiError as error:
        refused = error
    assert refused is None or (refused.http_status == 400 and len(refused.message) < 20_000)


@settings(deadline=None)
@given(st.binary())
def test_no_form_raises_anything_but_an_api_error(body: bytes) -> None:
    for form in (body, b"Action=Form&" + body):
        refused: ApiError | None = None
        try:
            parse_query_request(FORM, form)
        except ApiError as error:
            refused = error
        assert refused is None or refused.http_status == 400


def test_a_structure_that_is_the_whole_body_is_absent_where_the_body_is_empty() -> None:
    operation = service_model("bedrock").operation_model(
        "StartAutomatedReasoningPolicyBuildWorkflow"
    )
    payload = operation.input_shape.serialization["payload"]
    labels = {"policyArn": "arn", "buildWorkflowType": "INGEST_CONTENT"}
    route = Route("bedrock", operation, labels)
    for body in (b"", b" \n"):
        assert payload not in parse_request(route, query="", headers={}, body=body)
    assert payload in parse_request(route, query="", headers={}, body=b"{}")
