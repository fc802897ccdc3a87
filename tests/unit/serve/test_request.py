"""Requests and events cross the socket unchanged."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcrop import errors
from outcrop.data.records import Message, Tool, ToolCall
from outcrop.errors import ApiError
from outcrop.serve.request import (
    Event,
    Generation,
    GenerationRequest,
    Owner,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    event_from_json,
    event_to_json,
    messages_from_json,
    messages_to_json,
    request_from_json,
    request_to_json,
)

GIVEN = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=3)
CALLS = st.lists(st.builds(ToolCall, st.text(), st.text(), GIVEN), max_size=2).map(tuple)
TOOLS = st.lists(st.builds(Tool, st.text(), st.text(), GIVEN), max_size=2).map(tuple)
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGES = st.lists(
    st.builds(Message, ROLES, st.text(), CALLS, st.none() | st.text()), min_size=1
).map(tuple)
NUMBERS = st.floats(0, 5, allow_nan=False)
SAMPLING = st.builds(
    SamplingParams,
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=st.none() | st.integers(1),
    max_tokens=st.none() | st.integers(1),
    stop=st.lists(st.text(min_size=1)).map(tuple),
    seed=st.none() | st.integers(),
    logprobs=st.booleans(),
    prompt_logprobs=st.booleans(),
    top_logprobs=st.integers(0, 5),
    truncate=st.sampled_from(["none", "start", "end"]),
)
REQUESTS = st.builds(
    GenerationRequest,
    messages=MESSAGES,
    sampling=SAMPLING,
    adapter=st.none() | st.text(),
    adapter_digest=st.none() | st.text(),
    timeout_seconds=st.none() | NUMBERS,
    prompt=st.none() | st.text() | st.lists(st.integers(0)).map(tuple),
    owner=st.builds(Owner, st.text(), st.text(), st.none() | st.text(), st.integers(0)),
    tools=TOOLS,
    start=st.text(),
    shown=st.lists(st.text()).map(tuple),
)
TOP = st.lists(st.tuples(st.text(), st.floats(-20, 0)), max_size=3).map(tuple)
LOGPROBS = st.lists(
    st.builds(TokenLogprob, st.text(), st.none() | st.floats(-20, 0), TOP), max_size=5
).map(tuple)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(TokenEvent, st.text(), st.integers(0), st.integers(0)),
    st.builds(
        Generation,
        st.text(),
        st.integers(0),
        st.integers(0),
        st.sampled_from(["stop", "length", "stop_sequence"]),
        st.none() | st.text(),
        st.none() | LOGPROBS,
        st.none() | LOGPROBS,
    ),
)


@given(REQUESTS)
def test_a_request_crosses_unchanged(request: GenerationRequest) -> None:
    assert request_from_json(request_to_json(request)) == request


@given(MESSAGES, TOOLS)
def test_messages_and_tools_cross_unchanged(
    messages: tuple[Message, ...], tools: tuple[Tool, ...]
) -> None:
    assert messages_from_json(messages_to_json(messages, tools)) == (messages, tools)


@given(EVENTS)
def test_an_event_crosses_unchanged_on_one_line(event: Event) -> None:
    line = event_to_json(event)
    assert line.count(b"\n") == 1
    assert event_from_json(line) == event


@pytest.mark.parametrize(
    "cls",
    [
        found
        for _, found in inspect.getmembers(errors, inspect.isclass)
        if issubclass(found, ApiError) and found is not ApiError
    ],
)
def test_an_error_comes_out_as_its_own_class(cls: type[ApiError]) -> None:
    found = event_from_json(event_to_json(cls("No.", members={"resourceName": "x"})))
    assert type(found) is cls
    assert (found.message, found.http_status, found.members) == (
        "No.",
        cls.http_status,
        {"resourceName": "x"},
    )


def test_an_error_keeps_a_code_of_its_own() -> None:
    error = ApiError("No.", code="SomethingElse", http_status=418)
    found = event_from_json(event_to_json(error))
    assert isinstance(found, ApiError)
    assert (found.code, found.http_status) == ("SomethingElse", 418)


@pytest.mark.parametrize("code", ["annotations", "OutcropError", "ValueError", ""])
def test_a_code_that_names_no_api_error_stays_one(code: str) -> None:
    found = event_from_json(event_to_json(ApiError("No.", code=code)))
    assert type(found) is ApiError


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b'{"event":"other"}', b'{"event":"tok'])
def test_a_line_that_is_no_event_is_refused(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        event_from_json(line)
