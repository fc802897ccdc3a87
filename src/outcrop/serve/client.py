"""The only caller of a model server's socket: requests in, answers and errors out.

An error of the model server comes out as the exception it was there. Imports no torch.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx

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

# A socket of this machine needs no certificates; a context of its own costs each call 0.25 ms.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class ModelClient:
    """One model server, by its socket. Holds no connection between calls."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def generate(self, request: GenerationRequest) -> Generation:
        """Return the whole answer. Raises as `stream`."""
        # Read to its end: what an iteration leaves behind is closed at some later time only.
        last: TokenEvent | Generation | None = None
        async for event in self.stream(request):
            last = event
        assert isinstance(last, Generation)
        return last

    async def stream(
        self, request: GenerationRequest
    ) -> AsyncGenerator[TokenEvent | Generation, None]:
        """Yield the answer as it is made; the last event is the Generation.

        Closing the iterator early (`contextlib.aclosing`) cancels the request in the model server.

        Raises:
            ServingError: no model server listens at the socket; nothing has been done.
            ModelErrorException: the model server ended before the answer did.
            ApiError: what the model server refused the request with, of its own class.
        """
        done = False
        async with (
            self._open("/generate", request_to_json(request)) as response,
            aclosing(_lines(response)) as lines,
        ):
            async for line in lines:
                event = event_from_json(line)
                if isinstance(event, ApiError):
                    raise event
                done = isinstance(event, Generation)
                yield event
        if not done:
            raise _cut_off()

    async def count(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> int:
        """Return how many tokens the prompt has. Raises as `stream`."""
        body = messages_to_json(tuple(messages), tuple(tools))
        async with self._open("/count", body) as response:
            text = b"".join([chunk async for chunk in response.aiter_bytes()])
        if response.is_error:
            error = event_from_json(text)
            assert isinstance(error, ApiError)
            raise error
        return int(json.loads(text)["input_tokens"])

    async def stats(self) -> dict[str, Any]:
        """Return the figures of engine and process. Raises as `stream`."""
        async with self._open("/stats", None) as response:
            text = b"".join([chunk async for chunk in response.aiter_bytes()])
        found: dict[str, Any] = json.loads(text)
        return found

    @asynccontextmanager
    async def _open(self, path: str, body: bytes | None) -> AsyncIterator[httpx.Response]:
        # Reading an answer may take as long as its caller allows; the caller counts.
        limits = httpx.Timeout(None, connect=CONNECT_SECONDS)
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket), verify=_NO_TLS, trust_env=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://model-server", timeout=limits, trust_env=False
        ) as client:
            begun = False
            try:
                method = "GET" if body is None else "POST"
                async with client.stream(method, path, content=body) as response:
                    begun = True
                    if response.is_error and "json" not in response.headers.get("content-type", ""):
                        raise ModelErrorException(
                            "The model server failed on this request; its log says why."
                        )
                    yield response
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                raise ServingError("no model server listens at the socket") from error
            except httpx.TransportError as error:
                if not begun:  # a server that is being torn down still accepts, and resets
                    raise ServingError("the model server ended before it answered") from error
                raise _cut_off() from error


async def _lines(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield whole lines only: one that is cut off is no event."""
    rest = b""
    async with aclosing(cast(AsyncGenerator[bytes, None], response.aiter_bytes())) as chunks:
        async for chunk in chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line


def _cut_off() -> ModelErrorException:
    return ModelErrorException("The model server ended before the answer was complete. Try again.")
