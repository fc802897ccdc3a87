"""The client where there is no server, or one that breaks off."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from outcrop.data.records import Message
from outcrop.errors import ModelErrorException, ServingError
from outcrop.serve.client import ModelClient
from outcrop.serve.request import (
    Generation,
    GenerationRequest,
    TokenEvent,
    event_to_json,
)

REQUEST = GenerationRequest((Message("user", "Hello"),))
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN = event_to_json(TokenEvent("Hel", 3, 1))
DONE = event_to_json(Generation("Hello", 3, 2, "stop"))


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def with_server(
    socket: Path, pieces: list[bytes], ask: Callable[[ModelClient], Awaitable[None]]
) -> None:
    """Run `ask` against a server that answers with exactly these bytes and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_unix_server(answer, str(socket))
    async with server, asyncio.timeout(30):
        await ask(ModelClient(socket))


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


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD],
        [HEAD, chunk(TOKEN)],
        [HEAD, chunk(TOKEN), b"0\r\n\r\n"],
        [HEAD, chunk(TOKEN), chunk(DONE[:-5])],
        [HEAD, chunk(TOKEN), chunk(DONE[:-1]), b"0\r\n\r\n"],
    ],
)
def test_an_answer_that_breaks_off_is_a_model_error(tmp_path: Path, pieces: list[bytes]) -> None:
    async def ask(client: ModelClient) -> None:
        with pytest.raises(ModelErrorException, match="before the answer was complete"):
            await client.generate(REQUEST)

    asyncio.run(with_server(tmp_path / "s.sock", pieces, ask))


def test_a_server_that_ends_before_it_answers_has_done_nothing(tmp_path: Path) -> None:
    async def ask(client: ModelClient) -> None:
        with pytest.raises(ServingError, match="before it answered"):
            await client.generate(REQUEST)

    asyncio.run(with_server(tmp_path / "s.sock", [], ask))


def test_a_failure_of_the_server_itself_is_a_model_error(tmp_path: Path) -> None:
    wrong = (
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/plain\r\n"
        b"content-length: 5\r\n\r\nWrong"
    )

    async def ask(client: ModelClient) -> None:
        with pytest.raises(ModelErrorException, match="failed on this request"):
            await client.generate(REQUEST)

    asyncio.run(with_server(tmp_path / "s.sock", [wrong], ask))


def test_events_may_be_cut_anywhere(tmp_path: Path) -> None:
    data = TOKEN + TOKEN + DONE
    pieces = [chunk(data[place : place + 1]) for place in range(len(data))]

    async def ask(client: ModelClient) -> None:
        events = [event async for event in client.stream(REQUEST)]
        assert [type(event) for event in events] == [TokenEvent, TokenEvent, Generation]

    asyncio.run(with_server(tmp_path / "s.sock", [HEAD, *pieces, b"0\r\n\r\n"], ask))


def test_client_request_and_formats_never_import_torch() -> None:
    program = (
        "import sys, outcrop.serve.client, outcrop.serve.prompt_formats;"
        "print({'torch', 'transformers', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "set()\n"
