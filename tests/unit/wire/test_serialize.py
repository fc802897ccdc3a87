"""Outputs and errors to replies; what botocore makes of them is in tests/protocol."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from xml.etree import ElementTree

import pytest
from botocore.model import OperationModel, ServiceModel

from outcrop.errors import (
    ApiError,
    ThrottlingException,
    TooManyTagsException,
    ValidationException,
)
from outcrop.wire.model import service_model
from outcrop.wire.serialize import serialize_error, serialize_output

MODEL = ServiceModel(
    {
        "metadata": {
            "protocol": "rest-json",
            "apiVersion": "2020-01-01",
            "xmlNamespace": "https://example.com/doc/",
        },
        "operations": {
            "Everything": {
                "name": "Everything",
                "http": {"method": "POST", "requestUri": "/x", "responseCode": 202},
                "output": {"shape": "Out"},
            },
            "Nothing": {"name": "Nothing", "http": {"method": "POST", "requestUri": "/y"}},
            "Text": {
                "name": "Text",
                "http": {"method": "POST", "requestUri": "/z"},
                "output": {"shape": "TextOut"},
            },
        },
        "shapes": {
            "Out": {
                "type": "structure",
                "members": {
                    "code": {"shape": "Integer", "location": "statusCode"},
                    "count": {
                        "shape": "Integer",
                        "location": "header",
                        "locationName": "X-Count",
                    },
                    "flag": {"shape": "Boolean", "location": "header", "locationName": "X-Flag"},
                    "words": {"shape": "Strings", "location": "header", "locationName": "X-Words"},
                    "day": {"shape": "Time", "location": "header", "locationName": "X-Day"},
                    "json": {"shape": "Json", "location": "header", "locationName": "X-Json"},
                    "meta": {
                        "shape": "StringMap",
                        "location": "headers",
                        "locationName": "X-Meta-",
                    },
                    "number": {"shape": "Double"},
                    "time": {"shape": "Time"},
                    "renamed": {"shape": "String", "locationName": "Renamed"},
                    "on": {"shape": "Boolean"},
                    "map": {"shape": "StringMap"},
                    "flat": {"shape": "FlatMap"},
                    "flatList": {"shape": "FlatStrings"},
                },
            },
            "TextOut": {"type": "structure", "payload": "t", "members": {"t": {"shape": "String"}}},
            "String": {"type": "string"},
            "Json": {"type": "string", "jsonvalue": True},
            "Strings": {"type": "list", "member": {"shape": "String"}},
            "FlatStrings": {"type": "list", "member": {"shape": "String"}, "flattened": True},
            "StringMap": {"type": "map", "key": {"shape": "String"}, "value": {"shape": "String"}},
            "FlatMap": {
                "type": "map",
                "key": {"shape": "String"},
                "value": {"shape": "String"},
                "flattened": True,
            },
            "Integer": {"type": "integer"},
            "Double": {"type": "double"},
            "Boolean": {"type": "boolean"},
            "Time": {"type": "timestamp"},
        },
    },
    service_name="everything",
)
EVERYTHING = MODEL.operation_model("Everything")
MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _get_job() -> OperationModel:
    return service_model("bedrock").operation_model("GetModelCustomizationJob")


def test_members_go_where_the_model_says() -> None:
    reply = serialize_output(
        EVERYTHING,
        {
            "code": 207,
            "count": 3,
            "flag": False,
            "words": ["a", "b"],
            "day": MOMENT,
            "json": {"a": 1},
            "meta": {"color": "red"},
            "number": 0.5,
            "time": MOMENT,
            "renamed": "é",
            "on": True,
            "map": {"a": "b", "c": None},
        },
        "request-1",
    )
    assert reply.status == 207
    assert reply.headers == {
        "x-amzn-RequestId": "request-1",
        "Content-Type": "application/json",
        "X-Count": "3",
        "X-Flag": "false",
        "X-Words": "a,b",
        "X-Day": "Fri, 02 Jan 2026 03:04:05 GMT",
        "X-Json": "eyJhIjoxfQ==",
        "X-Meta-color": "red",
    }
    expected = '{"number":0.5,"time":1767323045,"Renamed":"é","on":true,"map":{"a":"b"}}'
    assert reply.body == expected.encode()


def test_what_is_absent_or_unknown_is_left_out() -> None:
    reply = serialize_output(EVERYTHING, {"renamed": None, "unknown": 1, "Renamed": "x"}, "r")
    assert (reply.status, reply.body) == (202, b"{}")
    assert serialize_output(MODEL.operation_model("Nothing"), {"a": 1}, "r").body == b""
    assert serialize_output(MODEL.operation_model("Text"), {"t": "é"}, "r").body == "é".encode()
    assert serialize_output(MODEL.operation_model("Text"), {}, "r").body == b""


def test_times_are_utc_with_as_many_digits_as_they_have() -> None:
    zone = timezone(timedelta(hours=2))
    for moment, text in (
        (MOMENT, "2026-01-02T03:04:05Z"),
        (MOMENT.replace(microsecond=120_000), "2026-01-02T03:04:05.120000Z"),
        (datetime(2026, 1, 2, 5, 4, 5, tzinfo=zone), "2026-01-02T03:04:05Z"),
        (datetime(999, 1, 2, tzinfo=UTC), "0999-01-02T00:00:00Z"),
    ):
        reply = serialize_output(_get_job(), {"creationTime": moment}, "r")
        assert json.loads(reply.body) == {"creationTime": text}


def test_numbers_that_json_lacks_are_words() -> None:
    for number, text in (("nan", "NaN"), ("inf", "Infinity"), ("-inf", "-Infinity")):
        reply = serialize_output(EVERYTHING, {"number": float(number)}, "r")
        assert json.loads(reply.body) == {"number": text}


@pytest.mark.parametrize(
    "output",
    [
        {"renamed": 5},
        {"on": 1},
        {"count": True},
        {"count": "3"},
        {"time": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"time": "2026-01-01"},
        {"words": ["a\r\nSet-Cookie: x"]},
        {"map": {1: "x"}},
    ],
)
def test_a_value_that_does_not_fit_its_shape_is_our_fault(output: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        serialize_output(EVERYTHING, output, "r")


def test_a_payload_goes_raw_with_its_headers() -> None:
    operation = service_model("bedrock-runtime").operation_model("InvokeModel")
    reply = serialize_output(
        operation,
        {"body": b'{"a": 1}', "contentType": "application/json"},
        "r",
        extra_headers={"X-Amzn-Bedrock-Input-Token-Count": "5"},
    )
    assert reply.body == b'{"a": 1}'
    assert reply.headers == {
        "x-amzn-RequestId": "r",
        "Content-Type": "application/json",
        "X-Amzn-Bedrock-Input-Token-Count": "5",
    }
    plain = serialize_output(operation, {"body": b"x"}, "r")
    assert plain.headers["Content-Type"] == "application/octet-stream"


def test_extra_headers_replace_and_are_checked() -> None:
    reply = serialize_output(_get_job(), {}, "r", extra_headers={"content-type": "text/plain"})
    assert reply.headers == {"x-amzn-RequestId": "r", "content-type": "text/plain"}
    with pytest.raises(ValueError, match="X-Bad"):
        serialize_output(_get_job(), {}, "r", extra_headers={"X-Bad": "a\nb"})


def test_a_stream_has_a_head_and_no_body() -> None:
    operation = service_model("bedrock-runtime").operation_model("InvokeModelWithResponseStream")
    reply = serialize_output(operation, {"contentType": "application/json"}, "r")
    assert reply.body == b""
    assert reply.headers["Content-Type"] == "application/vnd.amazon.eventstream"
    assert reply.headers["X-Amzn-Bedrock-Content-Type"] == "application/json"


def test_json_errors_have_their_code_in_a_header() -> None:
    reply = serialize_error("bedrock", ValidationException("Wrong.\nVery."), "r")
    assert reply.status == 400
    assert reply.headers == {
        "x-amzn-RequestId": "r",
        "x-amzn-ErrorType": "ValidationException",
        "Content-Type": "application/json",
    }
    assert json.loads(reply.body) == {"message": "Wrong.\nVery."}


def test_an_error_carries_the_members_its_model_names() -> None:
    error = TooManyTagsException("Too many.", members={"resourceName": "arn", "secret": "x"})
    reply = serialize_error("bedrock", error, "r")
    assert json.loads(reply.body) == {"message": "Too many.", "resourceName": "arn"}
    assert json.loads(serialize_error("kms", error, "r").body) == {"message": "Too many."}


def test_an_error_that_knows_when_to_ask_again_says_so_in_headers() -> None:
    error = ThrottlingException("Too many tokens.", members={"retryAfterSeconds": 1.2345})
    headers = serialize_error("bedrock", error, "r").headers
    assert (headers["x-amz-retry-after"], headers["Retry-After"]) == ("1235", "2")
    assert "Retry-After" not in serialize_error("bedrock", ThrottlingException("x"), "r").headers


def test_sts_answers_in_xml() -> None:
    operation = service_model("sts").operation_model("GetCallerIdentity")
    output = {"UserId": "AIDA", "Account": "123456789012", "Arn": "arn:aws:iam::1:user/<a>&b"}
    reply = serialize_output(operation, output, "r", extra_headers={"X-More": "1"})
    root = ElementTree.fromstring(reply.body)
    space = "{https://sts.amazonaws.com/doc/2011-06-15/}"
    assert root.tag == f"{space}GetCallerIdentityResponse"
    assert root.findtext(f"{space}GetCallerIdentityResult/{space}Arn") == output["Arn"]
    assert root.findtext(f"{space}ResponseMetadata/{space}RequestId") == "r"
    assert reply.headers["Content-Type"] == "text/xml"
    assert reply.headers["X-More"] == "1"


@pytest.mark.parametrize(
    ("code", "theirs"),
    [
        ("InvalidSignatureException", "SignatureDoesNotMatch"),
        ("UnrecognizedClientException", "InvalidClientTokenId"),
        ("IncompleteSignatureException", "IncompleteSignature"),
        ("AccessDeniedException", "AccessDenied"),
        ("InvalidAction", "InvalidAction"),
    ],
)
def test_sts_errors_have_the_codes_of_the_query_services(code: str, theirs: str) -> None:
    reply = serialize_error("sts", ApiError("a <b> \x00", code=code, http_status=403), "r")
    root = ElementTree.fromstring(reply.body)
    space = "{https://sts.amazonaws.com/doc/2011-06-15/}"
    assert root.findtext(f"{space}Error/{space}Code") == theirs
    assert root.findtext(f"{space}Error/{space}Type") == "Sender"
    assert root.findtext(f"{space}Error/{space}Message") == "a <b> \ufffd"
    assert root.findtext(f"{space}RequestId") == "r"
    assert reply.status == 403


def test_s3_errors_have_the_form_of_s3() -> None:
    error = ApiError(
        "No <key>.", code="NoSuchKey", http_status=404, members={"Resource": "/b/k\r", "Key": "k"}
    )
    reply = serialize_error("s3", error, "r")
    root = ElementTree.fromstring(reply.body)
    assert root.tag == "Error"
    assert {child.tag: child.text for child in root} == {
        "Code": "NoSuchKey",
        "Message": "No <key>.",
        "Resource": "/b/k\r",
        "Key": "k",
        "RequestId": "r",
    }
    assert reply.headers == {"x-amz-request-id": "r", "Content-Type": "application/xml"}
    ours = serialize_error("s3", ApiError("x", code="UnrecognizedClientException"), "r")
    assert b"<Code>InvalidAccessKeyId</Code>" in ours.body
    assert b"<Resource></Resource>" in ours.body


def test_xml_writes_every_kind_of_member() -> None:
    query = ServiceModel(
        {
            **MODEL._service_description,
            "metadata": {**MODEL.metadata, "protocol": "query"},
        },
        service_name="everything",
    )
    output = {
        "count": 3,
        "flag": True,
        "words": ["a", "b"],
        "flatList": ["c", "d"],
        "map": {"k": "v"},
        "flat": {"m": "n"},
        "time": MOMENT,
    }
    reply = serialize_output(query.operation_model("Everything"), output, "r")
    text = reply.body.decode()
    for part in (
        "<X-Count>3</X-Count>",
        "<X-Flag>true</X-Flag>",
        "<X-Words><member>a</member><member>b</member></X-Words>",
        "<flatList>c</flatList><flatList>d</flatList>",
        "<map><entry><key>k</key><value>v</value></entry></map>",
        "<flat><key>m</key><value>n</value></flat>",
        "<time>2026-01-02T03:04:05Z</time>",
    ):
        assert part in text
    empty = serialize_output(query.operation_model("Nothing"), {}, "r")
    assert b"<NothingResponse" in empty.body
