"""The exception tree."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from outcrop import errors
from outcrop.wire.model import SERVICES, service_model


def _subclasses(cls: type[BaseException]) -> list[type[Any]]:
    found: list[type[Any]] = []
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            found += [child, *_subclasses(child)]
    return found


API_ERRORS = _subclasses(errors.ApiError)


@pytest.mark.parametrize("cls", API_ERRORS)
def test_an_api_error_has_the_code_and_status_of_botocores_models(cls: type[Any]) -> None:
    statuses = {
        shape.metadata["error"]["httpStatusCode"]
        for service in SERVICES
        for shape in service_model(service).error_shapes
        if shape.error_code == cls.code
    }
    assert cls.code == cls.__name__
    assert statuses == {cls.http_status}


def test_our_own_operations_list_errors_that_exist() -> None:
    known = {cls.code for cls in API_ERRORS}
    assert {shape.error_code for shape in service_model("outcrop").error_shapes} <= known


def _instances() -> list[BaseException]:
    made: list[BaseException] = [cls("message") for cls in API_ERRORS]
    made += [
        errors.ApiError("m", code="C", http_status=418, members={"resourceName": "r"}),
        errors.ObjectStoreError("NoSuchKey", "There is none."),
        errors.DataError("No completion.", code="missing", file="s3://b/t.jsonl", line=3),
        errors.DataError("Empty.", code="empty", file="t.jsonl"),
    ]
    have = {type(error) for error in made}
    every = [*_subclasses(errors.OutcropError), *_subclasses(errors.JobSignal), errors.JobSignal]
    made += [cls("message") for cls in [*every, errors.OutcropError] if cls not in have]
    return made


@pytest.mark.parametrize("error", _instances(), ids=lambda error: type(error).__name__)
def test_every_exception_crosses_processes_unchanged(error: BaseException) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    # A code that is the class's own may become the instance's: what is read is the same.
    assert {name: getattr(error, name) for name in vars(copy)} == vars(copy)
    assert vars(error).items() <= vars(copy).items()
    assert copy.args == error.args


def test_signals_are_no_ordinary_exceptions() -> None:
    assert not issubclass(errors.StopRequested, Exception)
    assert not issubclass(errors.LeaseLost, Exception)


def test_errors_say_what_they_are() -> None:
    assert str(errors.ObjectStoreError("NoSuchKey", "None.")) == "NoSuchKey: None."
    error = errors.ValidationException("Wrong.", members={"a": 1})
    assert (str(error), error.message, error.members) == ("Wrong.", "Wrong.", {"a": 1})
