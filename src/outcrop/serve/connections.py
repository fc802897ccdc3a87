"""The connections of a model server's socket: which requests cross it, and their answers.

A request is a line that says what is wanted and how many bytes follow, and those bytes:

    stream SIZE     a GenerationRequest; answered by its events, a line each (`request.py`)
    generate SIZE   the same, where only the whole answer is wanted: the events before the last come
                    a few times a second, several in one
    count SIZE      messages; answered by {"input_tokens": n}
    stats 0         answered by the figures of engine and process

What is refused is answered by an error event. The next request may follow on the same connection;
one that ends while it is answered cancels its request. `GET /stats` is answered in HTTP, for the
server's owner: `curl --unix-socket`.

The engine's thread writes events to the socket by itself. That the event loop need not wake for
each token matters: it would want a core and the interpreter's lock while all cores compute the next
pass. The loop takes requests, and what a slow reader has left in the socket.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from outcrop.errors import ApiError, ModelErrorException, ValidationException
from outcrop.serve.interface import Engine
from outcrop.serve.request import (
    Event,
    TokenEvent,
    event_to_json,
    messages_from_json,
    prompt_from_json,
    request_from_json,
)

logger = logging.getLogger("outcrop.model-server")

MAX_WAITING_CONNECTIONS = 1024
READ_BYTES = 256 * 1024
MAX_HEAD_BYTES = 8 * 1024
MAX_BODY_BYTES = 1 << 30
PROGRESS_SECONDS = 0.25
"""How often a whole answer says how far it is: so much of its tokens is not counted as used, where
the server dies."""
SHORT_BYTES = 16 * 1024
"""A request up to this size is rendered at once: handing it to a thread takes as long."""
PAUSE_SECONDS = 1.0
"""Without descriptors for another connection, none is taken for so long."""


class Connections:
    """All connections of a server's socket. Used on the event loop, but for `Connection.send`."""

    def __init__(
        self,
        engine: Engine,
        listener: socket.socket,
        stats: Callable[[], dict[str, Any]],
        *,
        timeout_seconds: float,
        short_bytes: int = SHORT_BYTES,
    ) -> None:
        """
        Args:
            stats: returns the figures of engine and process.
            timeout_seconds: for requests that bring no limit of their own.
            short_bytes: requests of more are taken to the engine by a thread of their own; 0 where
                the engine may take its time over any.
        """
        self.engine, self.stats = engine, stats
        self.timeout_seconds, self.short_bytes = timeout_seconds, short_bytes
        self.loop = asyncio.get_running_loop()
        self.open: set[Connection] = set()
        self.is_ending = False
        self._listener = listener
        listener.setblocking(False)
        listener.listen(MAX_WAITING_CONNECTIONS)
        self.loop.add_reader(listener, self._accept)

    async def end(self, seconds: float) -> None:
        """Take no more requests, and close all connections; answers have so long to end."""
        if not self.is_ending:
            self.is_ending = True
            self.loop.remove_reader(self._listener)
            # What lies unread in a socket is reset: its client knows that it was not taken.
            self._listener.close()
        for connection in list(self.open):
            if not connection.is_busy:
                connection.close()
        deadline = time.monotonic() + seconds
        while self.open and time.monotonic() < deadline:  # noqa: ASYNC110 -- bounded, and rare
            await asyncio.sleep(0.02)
        for connection in list(self.open):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                taken, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                logger.exception("a connection could not be taken")
                self.loop.remove_reader(self._listener)
                self.loop.call_later(PAUSE_SECONDS, self._accept_again)
                return
            self.open.add(Connection(self, taken))

    def _accept_again(self) -> None:
        if not self.is_ending:
            self.loop.add_reader(self._listener, self._accept)


class Connection:
    """One client's connection."""

    def __init__(self, owner: Connections, taken: socket.socket) -> None:
        self._owner, self._socket = owner, taken
        self._loop = owner.loop
        self._unread = bytearray()
        self._lock = threading.Lock()
        """Of what follows: events come from the engine's thread."""
        self._unsent = bytearray()
        self._is_closed = False
        self.is_busy = False
        """Whether a request is being answered."""
        self._request = 0
        """How many there were: what comes of an earlier one is dropped."""
        self._number: int | None = None
        """Of the request, in the engine."""
        taken.setblocking(False)
        self._loop.add_reader(taken, self._read)

    def close(self) -> None:
        """End it, and the request that it has under way."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            number = self._number
        self._owner.open.discard(self)
        if number is not None:
            self._owner.engine.cancel(number)

    def send(self, data: bytes, *, last: bool) -> None:
        """Send a part of the answer, from any thread; what the client does not take waits here."""
        with self._lock:
            if self._is_closed:
                return
            if last:  # before it is sent: the next request may be here at once
                self.is_busy, self._number = False, None
            was_empty = not self._unsent
            if was_empty:
                try:
                    data = data[self._socket.send(data) :]
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:  # it was closed; the reader sees that too
                    return
            self._unsent += data
            waits = was_empty and bool(self._unsent)
        if waits:
            self._loop.call_soon_threadsafe(self._send_later)

    def _send_later(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._loop.add_writer(self._socket, self._send_on)

    def _send_on(self) -> None:
        with self._lock:
            try:
                del self._unsent[: self._socket.send(self._unsent)]
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._unsent.clear()
            if not self._unsent:
                self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data or self.is_busy:  # it has ended, or does not keep to the protocol
            self.close()
            return
        self._unread += data
        try:
            self._take()
        except ApiError as error:
            self._refuse(error)
            self.close()

    def _take(self) -> None:
        """Answer a request, once all of it is here."""
        head, found, _ = self._unread.partition(b"\n")
        if not found:
            if len(self._unread) > MAX_HEAD_BYTES:
                raise _not_understood(head)
            return
        words = head.split()
        if words[:1] == [b"GET"]:
            self._answer_http(words)
            return
        if len(words) != 2 or not words[1].isdigit() or int(words[1]) > MAX_BODY_BYTES:
            raise _not_understood(head)
        start, size = len(head) + 1, int(words[1])
        if len(self._unread) < start + size:
            return
        verb, body = bytes(words[0]).decode("latin-1"), bytes(self._unread[start : start + size])
        self._unread.clear()  # the next request comes after this one's answer
        self.is_busy = True
        self._request += 1
        if verb == "stats":
            self._answer(self.stats_line)
        elif verb == "count":
            self._run(size, lambda: self._answer(lambda: self._count(body)))
        elif verb in ("stream", "generate"):
            number = self._request
            self._run(size, lambda: self._generate(body, number, pieces=verb == "stream"))
        else:
            raise _not_understood(head)

    def _run(self, size: int, work: Callable[[], None]) -> None:
        if size <= self._owner.short_bytes:
            work()
        else:
            self._loop.run_in_executor(None, work)

    def stats_line(self) -> bytes:
        """Return the figures as a line."""
        return _line(self._owner.stats())

    def _count(self, body: bytes) -> bytes:
        messages, tools = _read(messages_from_json, body)
        prompt = _read(prompt_from_json, body)
        return _line({"input_tokens": self._owner.engine.count_tokens(messages, tools, prompt)})

    def _answer(self, work: Callable[[], bytes]) -> None:
        try:
            data = work()
        except Exception as error:
            self._refuse(error)
        else:
            self.send(data, last=True)

    def _generate(self, body: bytes, request: int, *, pieces: bool) -> None:
        engine = self._owner.engine
        try:
            wanted = _read(request_from_json, body)
            if wanted.timeout_seconds is None:
                wanted = dataclasses.replace(wanted, timeout_seconds=self._owner.timeout_seconds)
            number = engine.submit(wanted, self._deliver if pieces else _Whole(self._deliver))
        except Exception as error:
            self._refuse(error)
            return
        with self._lock:
            has_gone = self._is_closed
            if self.is_busy and self._request == request:  # its answer may be there already
                self._number = number
        if has_gone:
            engine.cancel(number)

    def _deliver(self, event: Event) -> None:
        self.send(event_to_json(event), last=not isinstance(event, TokenEvent))

    def _refuse(self, error: Exception) -> None:
        if not isinstance(error, ApiError):
            logger.error("a request failed", exc_info=error)
            error = ModelErrorException(
                "The model server failed on this request; its log says why."
            )
        self.send(event_to_json(error), last=True)

    def _answer_http(self, words: list[bytearray]) -> None:
        if b"\r\n\r\n" not in self._unread:
            if len(self._unread) > MAX_HEAD_BYTES:
                self.close()
            return
        known = words[1:2] == [b"/stats"]
        status = "200 OK" if known else "404 Not Found"
        body = self.stats_line() if known else b'{"message": "There is only /stats."}\n'
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._unread.clear()
        self.send(head.encode() + body, last=True)
        self._socket.shutdown(socket.SHUT_WR)  # the client closes it


class _Whole:
    """Passes on the events of an answer of which only the end matters: several as one, seldom."""

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._texts: list[str] = []
        self._told = time.monotonic()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, TokenEvent):
            self._deliver(event)
            return
        self._texts.append(event.text)
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS:
            self._deliver(dataclasses.replace(event, text="".join(self._texts)))
            self._texts.clear()
            self._told = now


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode("ascii") + b"\n"


def _read(read: Callable[[bytes], Any], body: bytes) -> Any:
    try:
        return read(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValidationException(f"The body is not what this takes: {error!r}.") from error


def _not_understood(head: bytes | bytearray) -> ApiError:
    return ValidationException(
        f"A request cannot begin with {bytes(head[:80])!r}: it is one of stream, generate, count "
        "and stats, and the number of bytes that follow."
    )
