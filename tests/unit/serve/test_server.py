"""A model server in its own process, spoken to over its real socket."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from tests.unit.serve.tiny_chat import write_random_adapter, write_tiny_chat

from outcrop.data.records import Message
from outcrop.errors import (
    ModelErrorException,
    ModelTimeoutException,
    ServingError,
    SettingsError,
    ValidationException,
)
from outcrop.models.describe import add_model
from outcrop.serve.client import ModelClient
from outcrop.serve.request import Generation, GenerationRequest, SamplingParams, TokenEvent
from outcrop.serve.server import default_threads, run_model_server
from outcrop.settings import Settings

T = TypeVar("T")
SECONDS = 60.0
CONTEXT = 131_072
HELLO = (Message("user", "Hello there"),)
SHORT = GenerationRequest(HELLO, SamplingParams(temperature=0, max_tokens=20))
LONG = GenerationRequest(HELLO, SamplingParams(temperature=0, max_tokens=CONTEXT - 100))
PROGRAM = """
import sys
from pathlib import Path
from outcrop.serve.server import run_model_server
from outcrop.settings import Settings
settings = Settings(data_dir=Path(sys.argv[1]), serve_threads=1)
run_model_server(settings, sys.argv[2], sys.argv[3], ready=lambda: print("ready", flush=True))
"""


@dataclass
class Running:
    """A model server that is up."""

    process: subprocess.Popen[str]
    socket: Path
    folder: Path

    @property
    def client(self) -> ModelClient:
        return ModelClient(self.socket)

    async def stats(self) -> dict[str, Any]:
        return await self.client.stats()


@dataclass
class Place:
    """A data directory with a tiny model."""

    data_dir: Path
    folder: Path
    weights: str

    @contextmanager
    def running(self, socket: Path) -> Iterator[Running]:
        command = [sys.executable, "-c", PROGRAM, str(self.data_dir), self.weights, str(socket)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                yield Running(process, socket, self.folder)
            finally:
                process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("place")
    folder = write_tiny_chat(root / "model", ends=False, max_position_embeddings=CONTEXT)
    settings = Settings(data_dir=root / "data")
    base = add_model(settings, folder, "tiny.chat-v1", license="none", family="llama")
    return Place(root / "data", folder, base.weights)


@pytest.fixture(scope="module")
def server(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with place.running(tmp_path_factory.mktemp("socket") / "own" / "s.sock") as found:
        yield found


@pytest.fixture
def mortal(place: Place, tmp_path: Path) -> Iterator[Running]:
    """A server that the test may end."""
    with place.running(tmp_path / "s.sock") as found:
        yield found


def run(answer: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(SECONDS):
            return await answer

    return asyncio.run(bounded())


async def wait_for(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 -- the other process sets no event of ours
        await asyncio.sleep(0.01)


async def first_event(stream: AsyncIterator[TokenEvent | Generation]) -> TokenEvent:
    event = await anext(stream)
    assert isinstance(event, TokenEvent)
    return event


def test_an_answer_and_its_stream_are_the_same(server: Running) -> None:
    async def both() -> tuple[Generation, list[TokenEvent | Generation]]:
        events = [event async for event in server.client.stream(SHORT)]
        return await server.client.generate(SHORT), events

    whole, (*pieces, last) = run(both())
    assert whole == last
    assert whole.finish_reason == "length"
    told = "".join(piece.text for piece in pieces)
    assert whole.text.startswith(told)
    assert len(pieces) > 3


def test_counting_is_what_generating_counts(server: Running) -> None:
    assert run(server.client.count(HELLO)) == run(server.client.generate(SHORT)).input_tokens


def test_an_adapter_changes_the_answer_and_the_base_stays(server: Running, tmp_path: Path) -> None:
    artifact = str(write_random_adapter(server.folder, tmp_path / "adapter"))
    before = run(server.client.generate(SHORT))
    custom = GenerationRequest(SHORT.messages, SHORT.sampling, artifact)
    assert run(server.client.generate(custom)).text != before.text
    assert run(server.client.generate(SHORT)) == before
    assert run(server.stats())["num_adapters"] == 1


def test_errors_come_out_as_the_exceptions_they_were(server: Running, tmp_path: Path) -> None:
    too_long = GenerationRequest(HELLO, SamplingParams(max_tokens=CONTEXT))
    with pytest.raises(ValidationException, match=str(CONTEXT)):
        run(server.client.generate(too_long))
    absent = GenerationRequest(HELLO, SHORT.sampling, str(tmp_path / "absent"))
    with pytest.raises(ModelErrorException, match="cannot be used"):
        run(server.client.generate(absent))
    with pytest.raises(ValidationException):
        run(server.client.count(()))
    late = GenerationRequest(HELLO, LONG.sampling, timeout_seconds=0.05)
    with pytest.raises(ModelTimeoutException, match=r"0\.05 s"):
        run(server.client.generate(late))


def exchange(socket_path: Path, data: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(socket_path))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("verb", [b"generate", b"stream", b"count"])
@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"messages": 3, "sampling": {}}'])
def test_a_body_of_another_form_is_refused(server: Running, verb: bytes, body: bytes) -> None:
    answer = exchange(server.socket, b"%s %d\n" % (verb, len(body)) + body)
    assert json.loads(answer)["code"] == "ValidationException"


@pytest.mark.parametrize("head", [b"dance 3\nabc", b"stats\n", b"count -1\n", b"x" * 20_000])
def test_what_is_no_request_is_refused_and_ends_its_connection(
    server: Running, head: bytes
) -> None:
    answer = exchange(server.socket, head)
    assert json.loads(answer)["code"] == "ValidationException"
    assert b"stream, generate, count and stats" in answer


def test_the_owner_reads_the_figures_over_http(server: Running) -> None:
    transport = httpx.HTTPTransport(uds=str(server.socket))
    with httpx.Client(transport=transport, base_url="http://model-server") as client:
        assert client.get("/stats").json()["pid"] == server.process.pid
        assert client.get("/other").status_code == 404


def test_requests_follow_each_other_on_one_connection(server: Running) -> None:
    async def ask() -> None:
        client = ModelClient(server.socket, keeps=1)
        whole = await client.generate(SHORT)
        with pytest.raises(ValidationException):
            await client.count(())
        events = [event async for event in client.stream(SHORT)]
        assert events[-1] == whole
        assert client.is_connected
        client.close()

    run(ask())


def test_a_whole_answer_is_told_in_few_pieces_and_a_stream_in_many(server: Running) -> None:
    async def both() -> list[int]:
        told = []
        for pieces in (True, False):
            events = [event async for event in server.client.stream(SHORT, pieces=pieces)]
            told.append(len(events))
        return told

    many, few = run(both())
    assert few < many / 2


def test_only_the_owner_can_reach_the_socket(server: Running) -> None:
    assert server.socket.stat().st_mode & 0o777 == 0o600
    assert server.socket.parent.stat().st_mode & 0o777 == 0o700


def test_the_figures_say_who_serves_what_and_since_when_it_is_idle(server: Running) -> None:
    run(server.client.generate(SHORT))
    stats = run(server.stats())
    assert stats["pid"] == server.process.pid
    assert stats["weights"].startswith("folder-")
    assert stats["output_tokens"] >= 20
    assert 0 <= stats["idle_seconds"] < SECONDS
    assert stats["max_memory_bytes"] > 50_000_000


def test_a_client_that_goes_away_ends_its_request(server: Running) -> None:
    async def leave() -> None:
        before = (await server.stats())["num_requests"]
        async with aclosing(server.client.stream(LONG)) as stream:
            await first_event(stream)
            assert (await server.stats())["num_active"] == 1

        async def ended() -> bool:
            stats = await server.stats()
            return bool(stats["num_requests"] == before + 1 and stats["num_active"] == 0)

        await wait_for(ended)

    run(leave())


def test_a_call_that_is_cancelled_ends_its_request(server: Running) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(server.client.generate(LONG))

        async def active() -> bool:
            return bool((await server.stats())["num_active"])

        async def idle() -> bool:
            return not await active()

        await wait_for(active)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await wait_for(idle)

    run(cancel())


def test_the_server_answers_while_the_model_computes(server: Running) -> None:
    async def ask() -> float:
        async with aclosing(server.client.stream(LONG)) as stream:
            await first_event(stream)
            started = time.perf_counter()
            for _ in range(10):
                assert (await server.stats())["num_active"] == 1
            return time.perf_counter() - started

    assert run(ask()) < 5.0


def test_many_at_once_are_all_answered_alike(server: Running) -> None:
    async def many() -> list[Generation]:
        return await asyncio.gather(*[server.client.generate(SHORT) for _ in range(20)])

    assert len(set(run(many()))) == 1


def test_a_killed_server_ends_its_streams_with_an_error(mortal: Running) -> None:
    async def kill() -> None:
        stream = mortal.client.stream(LONG)
        await first_event(stream)
        mortal.process.send_signal(signal.SIGKILL)
        with pytest.raises(ModelErrorException, match="ended before"):
            async for _ in stream:
                pass

    run(kill())
    mortal.process.wait(SECONDS)
    with pytest.raises(ServingError):
        run(mortal.client.generate(SHORT))


def test_sigterm_ends_a_busy_server_soon_and_leaves_no_socket(mortal: Running) -> None:
    async def end() -> None:
        stream = mortal.client.stream(LONG)
        await first_event(stream)
        mortal.process.send_signal(signal.SIGTERM)
        with pytest.raises(ModelErrorException):
            async for _ in stream:
                pass

    started = time.monotonic()
    run(end())
    assert mortal.process.wait(SECONDS) == 0
    assert time.monotonic() - started < 10
    assert not mortal.socket.exists()


def test_a_new_server_takes_over_the_socket_of_a_killed_one(place: Place, tmp_path: Path) -> None:
    socket = tmp_path / "s.sock"
    with place.running(socket) as first:
        first.process.kill()
    assert socket.exists()
    with place.running(socket) as second:
        assert run(second.client.generate(SHORT)).output_tokens == 20


def test_a_path_too_long_for_a_socket_is_refused(place: Place, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="too long"):
        run_model_server(Settings(data_dir=place.data_dir), place.weights, tmp_path / ("x" * 120))


def test_threads_are_bounded_by_the_machine() -> None:
    assert 1 <= default_threads() <= 8
