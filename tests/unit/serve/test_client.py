"""The client where there is no server, one that breaks off, or one whose connection is kept."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from outcrop.data.records import Message
from outcrop.errors import ModelErrorException, ServingError, ThrottlingException
from outcrop.serve.client import MAX_LINES, ModelClient
from outcrop.serve.request import (
    Generation,
    GenerationRequest,
    TokenEvent,
    event_to_json,
)

REQUEST = GenerationRequest((Message("user", "Hello"),))
TOKEN = event_to_json(TokenEvent("Hel", 3, 1))
DONE = event_to_json(Generation("Hello", 3, 2, "stop"))
Ask = Callable[[ModelClient], Awaitable[None]]
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Return what a request wants."""
    verb, size = (await reader.readuntil(b"\n")).split()
    await reader.readexactly(int(size))
    return verb


async def with_answers(socket: Path, answer: Answer, ask: Ask, *, keeps: int = 0) -> None:
    """Run `ask` against a server that treats each connection so, and then closes it."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(take, str(socket))
    client = ModelClient(socket, keeps=keeps)
    async with server, asyncio.timeout(30):
        await ask(client)
        client.close()


async def with_server(socket: Path, pieces: list[bytes], ask: Ask) -> None:
    """Run `ask` against a server that answers with exactly these bytes and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    await with_answers(socket, answer, ask)


def test_without_a_socket_there_is_a_serving_error(tmp_path: Path) -> None:
    client = ModelClient(tmp_path / "absent.sock")
    with pytest.raises(ServingError) as caught:
        asyncio.run(client.generate(REQUEST))
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(ServingError):
        asyncio.run(client.count(REQUEST.messages))


def test_a_refused_connection_is_a_serving_error(tmp_path: Path) -> None:
    async def ask(client: ModelClient) -> None:
        assert client is not None

    path = tmp_path / "s.sock"
    asyncio.run(with_server(path, [], ask))
    path.touch()
    with pytest.raises(ServingError):
        asyncio.run(ModelClient(path).generate(REQUEST))


@pytest.mark.parametrize("pieces", [[], [TOKEN], [TOKEN, DONE[:-5]], [TOKEN, DONE[:-1]]])
def test_an_answer_that_breaks_off_is_a_model_error(tmp_path: Path, pieces: list[bytes]) -> None:
    async def ask(client: ModelClient) -> None:
        with pytest.raises(ModelErrorException, match="before the answer was complete"):
            await client.generate(REQUEST)

    asyncio.run(with_server(tmp_path / "s.sock", pieces, ask))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a reset does not say so")
def test_a_server_that_ends_before_it_took_the_request_has_done_nothing(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return  # closed, with the request in it

    async def ask(client: ModelClient) -> None:
        with pytest.raises(ServingError, match="before it took"):
            await client.generate(REQUEST)

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask))


def test_events_may_be_cut_anywhere(tmp_path: Path) -> None:
    data = TOKEN + TOKEN + DONE
    pieces = [data[place : place + 1] for place in range(len(data))]

    async def ask(client: ModelClient) -> None:
        events = [event async for event in client.stream(REQUEST)]
        assert [type(event) for event in events] == [TokenEvent, TokenEvent, Generation]

    asyncio.run(with_server(tmp_path / "s.sock", pieces, ask))


def test_a_connection_is_kept_after_an_answer_an_error_and_a_count(tmp_path: Path) -> None:
    connections: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        for reply in (DONE, event_to_json(ThrottlingException("later")), b'{"input_tokens":3}\n'):
            await read_request(reader)
            writer.write(reply)

    async def ask(client: ModelClient) -> None:
        assert (await client.generate(REQUEST)).text == "Hello"
        with pytest.raises(ThrottlingException, match="later"):
            await client.generate(REQUEST)
        assert await client.count(REQUEST.messages) == 3

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask, keeps=1))
    assert len(connections) == 1


def test_requests_at_the_same_time_have_connections_of_their_own(tmp_path: Path) -> None:
    connections: list[int] = []
    both = asyncio.Barrier(2)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        await read_request(reader)
        await both.wait()
        writer.write(DONE)
        await reader.read()  # until the client closes it

    async def ask(client: ModelClient) -> None:
        await asyncio.gather(client.generate(REQUEST), client.generate(REQUEST))

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask, keeps=2))
    assert len(connections) == 2


def test_an_answer_that_is_left_ends_its_own_connection_only(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader) == b"generate":
            writer.write(DONE)
        writer.write(TOKEN)
        assert await reader.read() == b""
        ended.set()

    async def ask(client: ModelClient) -> None:
        await client.generate(REQUEST)
        async with aclosing(client.stream(REQUEST)) as events:
            await anext(events)
            await client.generate(REQUEST)  # on a second one, which is kept
            assert not ended.is_set()
        await ended.wait()
        await client.generate(REQUEST)

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask, keeps=2))


def test_a_kept_connection_whose_server_has_gone_is_not_used(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(DONE)

    async def ask(client: ModelClient) -> None:
        for _ in range(3):  # each answered on a connection of its own
            await client.generate(REQUEST)
            while client.is_connected:  # noqa: ASYNC110 -- the end of a connection sets no event
                await asyncio.sleep(0)

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask, keeps=1))


def test_what_a_slow_reader_has_not_read_stays_in_the_socket(tmp_path: Path) -> None:
    sent: list[int] = []
    long_token = event_to_json(TokenEvent("x" * 1000, 3, 1))
    count = 4000

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for number in range(count):
            sent.append(number)
            writer.write(long_token)
            await writer.drain()
        writer.write(DONE)

    async def ask(client: ModelClient) -> None:
        async with aclosing(client.stream(REQUEST)) as events:
            await anext(events)
            most = -1
            while len(sent) > most:  # until nothing more is taken from the server
                most = len(sent)
                for _ in range(100):
                    await asyncio.sleep(0)
            assert MAX_LINES < most < count
            assert len([event async for event in events]) == count

    asyncio.run(with_answers(tmp_path / "s.sock", answer, ask))


def test_client_request_and_formats_never_import_torch() -> None:
    program = (
        "import sys, outcrop.serve.client, outcrop.serve.prompt_formats;"
        "print({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "set()\n"
