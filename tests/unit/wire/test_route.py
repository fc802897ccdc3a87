"""Raw paths to operations."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outcrop.errors import ApiError
from outcrop.wire import route
from outcrop.wire.model import REST_SERVICES, service_model
from outcrop.wire.route import match

ALL = [
    (service, name) for service in REST_SERVICES for name in service_model(service).operation_names
]


def test_every_operation_is_reached_by_its_own_path_and_no_two_collide() -> None:
    assert len(ALL) >= 121
    for service, name in ALL:
        operation = service_model(service).operation_model(name)
        path = operation.http["requestUri"].replace("{", "value-of-").replace("}", "")
        route = match(operation.http["method"], path)
        assert (route.service, route.operation.name) == (service, name)
        assert all(value == f"value-of-{label}" for label, value in route.path_params.items())


def test_an_encoded_arn_is_one_label() -> None:
    arn = "arn:aws:bedrock:us-east-1:123456789012:model-customization-job/a.b:c:1k/abcabcabcabc"
    for method, path, name in (
        ("GET", f"/model-customization-jobs/{quote(arn, safe='')}", "GetModelCustomizationJob"),
        (
            "POST",
            f"/model-customization-jobs/{quote(arn, safe='')}/stop",
            "StopModelCustomizationJob",
        ),
        ("GET", f"/outcrop/v1/jobs/{quote(arn, safe='')}/progress", "GetJobProgress"),
        ("GET", f"/outcrop/v1/jobs/{quote(arn, safe='')}/metrics", "GetJobMetrics"),
    ):
        route = match(method, path)
        assert route.operation.name == name
        assert route.path_params == {"jobIdentifier": arn}


def test_characters_that_need_no_encoding_may_come_plain() -> None:
    route = match("POST", "/model/amazon.titan-text-express-v1:0:8k/invoke")
    assert route.path_params == {"modelId": "amazon.titan-text-express-v1:0:8k"}
    assert match("GET", "/custom-models/a+b%2Bc").path_params == {"modelIdentifier": "a+b+c"}


def test_one_trailing_slash_is_ignored() -> None:
    assert match("GET", "/foundation-models/").operation.name == "ListFoundationModels"
    assert match("GET", "/custom-models/x/").operation.name == "GetCustomModel"
    with pytest.raises(ApiError):
        match("GET", "/foundation-models//")


def test_a_literal_wins_over_a_label_unless_its_method_does_not_fit() -> None:
    path = "/custom-models/create-custom-model"
    assert match("POST", path).operation.name == "CreateCustomModel"
    assert match("GET", path).path_params == {"modelIdentifier": "create-custom-model"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/foundation-models"),
        ("get", "/foundation-models"),
        ("GET", "/no-such-thing"),
        ("GET", "/"),
        ("GET", ""),
        ("GET", "foundation-models"),
        ("GET", "/custom-models/a/b"),
        ("GET", "/custom-models//"),
        ("GET", "/custom-models/.."),
        ("GET", "/custom-models/."),
        ("GET", "//foundation-models"),
        ("GET", "/foundation-models/../custom-models"),
        ("GET", "/custom-models/\u00e9"),
        ("GET", "/custom-models/" + "a" * 20_000),
    ],
)
def test_what_no_operation_answers_is_an_unknown_operation(method: str, path: str) -> None:
    with pytest.raises(ApiError) as caught:
        match(method, path)
    assert (caught.value.code, caught.value.http_status) == ("UnknownOperationException", 404)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("label", ["%ff", "%C3", "a%00b", "%ed%a0%80"])
def test_a_label_that_is_no_text_is_refused_by_name(label: str) -> None:
    with pytest.raises(ApiError) as caught:
        match("GET", f"/custom-models/{label}")
    assert caught.value.code == "SerializationException"
    assert "modelIdentifier" in caught.value.message


@settings(deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "x"]),
    path=st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(["", ".", "..", "model", "custom-models", "invoke", "%2F", "%", "%zz"])
        ).map(lambda parts: "/" + "/".join(parts)),
        st.binary().map(lambda raw: "/" + raw.decode("latin-1")),
    ),
)
def test_no_path_raises_anything_but_an_api_error(method: str, path: str) -> None:
    try:
        route = match(method, path)
    except ApiError:
        return
    assert route.operation.http["method"] == method


@settings(deadline=None)
@given(st.text(min_size=1).filter(lambda text: text not in (".", "..") and "\0" not in text))
def test_a_label_comes_back_as_it_was_encoded(label: str) -> None:
    try:
        encoded = quote(label, safe="~")
    except UnicodeEncodeError:
        return  # half a surrogate pair is no text
    assert match("GET", f"/custom-models/{encoded}").path_params == {"modelIdentifier": label}


def test_the_models_can_be_loaded_before_the_first_request() -> None:
    route._tree.cache_clear()
    route.load()
    assert route._tree.cache_info().currsize == 1
