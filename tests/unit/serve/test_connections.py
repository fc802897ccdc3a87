"""The connections of a model server, in front of an engine that answers as a test says."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from outcrop.data.records import Message, Tool
from outcrop.errors import ModelErrorException, ServingError
from outcrop.serve.client import ModelClient
from outcrop.serve.connections import SHORT_BYTES, Connections
from outcrop.serve.interface import Deliver, EngineStats
from outcrop.serve.request import Generation, GenerationRequest, TokenEvent

REQUEST = GenerationRequest((Message("user", "Hello"),))
DONE = Generation("Hello", 3, 2, "stop")
Ask = Callable[[ModelClient, "Connections"], Awaitable[None]]


class Engine:
    """Takes requests, and answers them as `answer` does, in a thread."""

    def __init__(self, answer: Callable[[Deliver], None]) -> None:
        self.answer = answer
        self.taken: list[GenerationRequest] = []
        self.threads: list[threading.Thread] = []
        self.cancelled: list[int] = []

    def submit(self, request: GenerationRequest, deliver: Deliver) -> int:
        self.taken.append(request)
        self.threads.append(threading.current_thread())
        threading.Thread(target=self.answer, args=(deliver,)).start()
        return len(self.taken)

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def count_tokens(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        raise RuntimeError("a fault of ours")

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def serve(socket_path: Path, engine: Engine, ask: Ask, *, keeps: int = 1) -> None:
    """Run `ask` against the engine's connections."""

    async def bounded() -> None:
        def stats() -> dict[str, Any]:
            return {"pid": 7}

        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(socket_path))
            connections = Connections(engine, listener, stats, timeout_seconds=9.0)
            client = ModelClient(socket_path, keeps=keeps)
            async with asyncio.timeout(30):
                await ask(client, connections)
                client.close()
                await connections.end(0.0)

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- a thread sets no event of the loop
        await asyncio.sleep(0)


def finish(deliver: Deliver) -> None:
    deliver(DONE)


def test_a_kept_connection_serves_the_next_request(tmp_path: Path) -> None:
    async def ask(client: ModelClient, connections: Connections) -> None:
        for _ in range(3):
            assert await client.generate(REQUEST) == DONE
            assert len(connections.open) == 1
            assert await client.stats() == {"pid": 7}

    engine = Engine(finish)
    serve(tmp_path / "s.sock", engine, ask)
    assert len(engine.taken) == 3
    assert not engine.cancelled
    assert engine.taken[0].timeout_seconds == 9.0


def test_what_a_slow_reader_does_not_take_waits_for_it_in_order(tmp_path: Path) -> None:
    count = 3000
    all_given = threading.Event()

    def answer(deliver: Deliver) -> None:
        for number in range(count):
            deliver(TokenEvent("x" * 500, 3, number))
        deliver(DONE)
        all_given.set()

    async def ask(client: ModelClient, connections: Connections) -> None:
        async with aclosing(client.stream(REQUEST)) as events:
            first = await anext(events)
            # The engine's thread never waits for a reader, whoever that is.
            await asyncio.to_thread(all_given.wait, 20)
            assert all_given.is_set()
            found = [first, *[event async for event in events]]
        assert found[-1] == DONE
        assert [event.output_tokens for event in found[:-1]] == list(range(count))
        assert (await client.generate(REQUEST)) == DONE  # on the same connection

    engine = Engine(answer)
    serve(tmp_path / "s.sock", engine, ask)


@pytest.mark.parametrize("verb", ["stream", "generate"])
def test_a_connection_that_ends_cancels_its_request_and_no_other(tmp_path: Path, verb: str) -> None:
    leave = threading.Event()

    def answer(deliver: Deliver) -> None:
        deliver(TokenEvent("Hel", 3, 1))
        leave.wait(20)
        deliver(DONE)  # of the cancelled one it is dropped

    async def ask(client: ModelClient, connections: Connections) -> None:
        other = asyncio.create_task(client.generate(REQUEST))
        await until(lambda: len(engine.taken) == 1)
        leaving = asyncio.create_task(_last(client, pieces=verb == "stream"))
        await until(lambda: len(engine.taken) == 2)
        leaving.cancel()
        await until(lambda: engine.cancelled == [2])
        leave.set()
        assert await other == DONE

    engine = Engine(answer)
    serve(tmp_path / "s.sock", engine, ask)
    assert engine.cancelled == [2]


async def _last(client: ModelClient, *, pieces: bool) -> None:
    async with aclosing(client.stream(REQUEST, pieces=pieces)) as events:
        async for _ in events:
            pass


def test_short_requests_are_taken_at_once_and_long_ones_by_a_thread(tmp_path: Path) -> None:
    async def ask(client: ModelClient, connections: Connections) -> None:
        await client.generate(REQUEST)
        await client.generate(GenerationRequest((Message("user", "x" * SHORT_BYTES),)))

    engine = Engine(finish)
    serve(tmp_path / "s.sock", engine, ask)
    assert [thread is threading.main_thread() for thread in engine.threads] == [True, False]


def test_a_fault_of_ours_is_told_as_such_and_its_details_are_not(tmp_path: Path) -> None:
    async def ask(client: ModelClient, connections: Connections) -> None:
        with pytest.raises(ModelErrorException, match="its log says why") as caught:
            await client.count(REQUEST.messages)
        assert "fault" not in str(caught.value)

    serve(tmp_path / "s.sock", Engine(finish), ask)


def test_a_server_that_ends_lets_answers_end_and_takes_no_more(tmp_path: Path) -> None:
    may_end = threading.Event()

    def answer(deliver: Deliver) -> None:
        may_end.wait(20)
        deliver(DONE)

    async def ask(client: ModelClient, connections: Connections) -> None:
        answering = asyncio.create_task(client.generate(REQUEST))
        await until(lambda: len(engine.taken) == 1)
        ending = asyncio.create_task(connections.end(20.0))
        await until(lambda: connections.is_ending)
        with pytest.raises(ServingError):
            await client.generate(REQUEST)
        may_end.set()
        assert await answering == DONE
        await ending

    engine = Engine(answer)
    serve(tmp_path / "s.sock", engine, ask, keeps=0)
    assert len(engine.taken) == 1
