"""The only caller of a model server's socket: requests in, answers and errors out.

What crosses the socket is told in `connections.py`. Connections are kept between calls: to make one
costs more than to ask. An error of the model server comes out as the exception it was there.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from outcrop.data.records import Message, Tool
from outcrop.errors import ApiError, ModelErrorException, ServingError
from outcrop.serve.request import (
    Generation,
    GenerationRequest,
    TokenEvent,
    event_from_json,
    messages_to_json,
    request_to_json,
)

CONNECT_SECONDS = 5.0
MAX_LINES = 64
"""Lines of an answer that wait for their reader, before no more are read from the socket."""


class ModelClient:
    """One model server, by its socket. Used from one event loop at a time."""

    def __init__(self, socket: Path, *, keeps: int = 0) -> None:
        """
        Args:
            keeps: connections that are kept open between calls; `close` ends them.
        """
        self.socket = socket
        self._keeps = keeps
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, in use or kept, that the server has not ended."""
        return any(connection.is_open for held in (self._idle, self._busy) for connection in held)

    def close(self) -> None:
        """End the kept connections; calls that are under way go on."""
        self._keeps = 0
        while self._idle:
            self._idle.pop().close()

    async def generate(self, request: GenerationRequest) -> Generation:
        """Return the whole answer. Raises as `stream`."""
        # Read to its end: what an iteration leaves behind is closed at some later time only.
        last: TokenEvent | Generation | None = None
        async for event in self.stream(request, pieces=False):
            last = event
        assert isinstance(last, Generation)
        return last

    async def stream(
        self, request: GenerationRequest, *, pieces: bool = True
    ) -> AsyncGenerator[TokenEvent | Generation, None]:
        """Yield the answer as it is made; the last event is the Generation.

        Closing the iterator early (`contextlib.aclosing`) cancels the request in the model server.

        Args:
            pieces: False where only the whole answer is wanted: the events before it say a few
                times a second how far it is.
        Raises:
            ServingError: no model server listens at the socket; nothing has been done.
            ModelErrorException: the model server ended before the answer did.
            ApiError: what the model server refused the request with, of its own class.
        """
        verb = "stream" if pieces else "generate"
        async with self._open(verb, request_to_json(request)) as connection:
            while True:
                event = event_from_json(await connection.next_line())
                if isinstance(event, TokenEvent):
                    yield event
                    continue
                connection.is_idle = True
                if isinstance(event, ApiError):
                    raise event
                break
        # After the connection was given back: who has read this event may never ask for another.
        yield event

    async def count(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: str | None = None
    ) -> int:
        """Return how many tokens the prompt has: of messages, or of a text as it stands whose
        control tokens count as such. Raises as `stream`.
        """
        body = messages_to_json(tuple(messages), tuple(tools), prompt)
        found = await self._ask("count", body)
        return int(found["input_tokens"])

    async def stats(self) -> dict[str, Any]:
        """Return the figures of engine and process. Raises as `stream`."""
        return await self._ask("stats", b"")

    async def _ask(self, verb: str, body: bytes) -> dict[str, Any]:
        async with self._open(verb, body) as connection:
            line = await connection.next_line()
            connection.is_idle = True
        found: dict[str, Any] = json.loads(line)
        if found.get("event") == "error":
            raise cast(ApiError, event_from_json(line))
        return found

    @asynccontextmanager
    async def _open(self, verb: str, body: bytes) -> AsyncIterator[_Connection]:
        """Send a request. Its connection is kept if it is idle at the end, and closed otherwise."""
        connection = self._take() or await self._connect()
        self._busy.add(connection)
        try:
            connection.send(b"%s %d\n" % (verb.encode(), len(body)) + body)
            yield connection
        finally:
            self._busy.remove(connection)
            if connection.is_idle and len(self._idle) < self._keeps:
                self._idle.append(connection)
            else:
                connection.close()

    def _take(self) -> _Connection | None:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.loop is loop:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_unix_connection(
                    lambda: _Connection(loop), str(self.socket)
                )
        except (OSError, TimeoutError) as error:
            raise ServingError("no model server listens at the socket") from error
        return connection


class _Connection(asyncio.Protocol):
    """A connection on which one request at a time is answered, in lines."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.is_open = False
        self.is_idle = False
        """Whether the answer to its last request has come to its end."""
        self._transport: asyncio.Transport | None = None
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._paused = False
        self._has_begun = False
        self._cause: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def send(self, data: bytes) -> None:
        """Send a request, after which lines come."""
        assert self._transport is not None
        self.is_idle, self._has_begun = False, False
        self._transport.write(data)

    async def next_line(self) -> bytes:
        """Return the answer's next line, without its end.

        Raises:
            ServingError: the server ended before it took the request, so nothing was done.
            ModelErrorException: it ended later.
        """
        while not self._lines:
            if not self.is_open:
                raise self._ended()
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        line = self._lines.popleft()
        if self._paused and not self._lines:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()
        return line

    def close(self) -> None:
        """End the connection; a request that is under way is cancelled by that."""
        if self.is_open and not self.loop.is_closed():
            assert self._transport is not None
            self._transport.abort()
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol. Only whole lines count: one that is cut off is no event."""
        self._has_begun = True
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines += lines
        if len(self._lines) > MAX_LINES and not self._paused:
            assert self._transport is not None
            self._paused = True  # its reader is slow; the server keeps what comes meanwhile
            self._transport.pause_reading()
        if lines:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self.is_open, self._cause = False, exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ended(self) -> Exception:
        # A socket is reset, rather than ended, when its other side is closed with bytes in it that
        # nobody has read: then the server never saw the whole request. A kept connection whose
        # server has gone refuses them at once.
        # Source: Linux, net/unix/af_unix.c, unix_release_sock.
        error: Exception
        if isinstance(self._cause, ConnectionError) and not self._has_begun:
            error = ServingError("the model server ended before it took the request")
        else:
            error = ModelErrorException(
                "The model server ended before the answer was complete. Try again."
            )
        error.__cause__ = self._cause
        return error
