"""The HTTP reply whose body is an event stream: frames as they are made, the last of them an error.

Whatever ends a stream early while its client listens ends it with a frame that says so. A client
that goes away ends the work for it. Knows no operation by name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from botocore.model import OperationModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outcrop.api.context import EventStream
from outcrop.errors import ApiError, ModelStreamErrorException, ServiceUnavailableException
from outcrop.wire.eventstream import event_message, exception_message, lists_error
from outcrop.wire.serialize import HttpReply


@dataclass(frozen=True)
class StreamReply:
    """What goes back to the client of an operation that streams."""

    head: HttpReply
    operation: OperationModel
    stream: EventStream
    explain: Callable[[Exception], ApiError]
    """What the client is told of a fault of ours."""
    ended: Callable[[str], None]
    """Called once at the end, with how it ended: `200`, `200 <code of the error>`, or 499."""

    def cut_short(self) -> bytes:
        """Return the last frame of a stream that this gateway cannot finish, because it ends."""
        return exception_message(
            self.operation, ServiceUnavailableException("The service is ending. Ask again.")
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Yield the frames; an error is the last one."""
        ending = "499"  # for the log: cut short. Source: nginx's own status for it
        try:
            async with aclosing(self.stream.rest):
                try:
                    yield event_message(self.operation, *self.stream.first)
                    async for event in self.stream.rest:
                        yield event_message(self.operation, *event)
                    ending = "200"
                except Exception as error:
                    told = self._told(error)
                    ending = f"200 {told.code}"
                    yield exception_message(self.operation, told)
        finally:
            self.ended(ending)

    def _told(self, error: Exception) -> ApiError:
        """Return an error that the stream's model lists, where there is one for it."""
        if not isinstance(error, ApiError):
            return self.explain(error)
        if lists_error(self.operation, error.code):
            return error
        return ModelStreamErrorException(
            error.message,
            members={"originalStatusCode": error.http_status, "originalMessage": error.message},
        )


class EventStreamResponse(Response):
    """Sends frames as they come, and gives them up when the client goes away."""

    def __init__(self, reply: StreamReply) -> None:
        super().__init__(None, reply.head.status, reply.head.headers)
        del self.headers["content-length"]
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            is_gone = anyio.Event()

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                is_gone.set()
                group.cancel_scope.cancel()

            try:
                await self._send(send, lambda: group.start_soon(watch))
            except anyio.get_cancelled_exc_class():
                if not is_gone.is_set():
                    with anyio.CancelScope(shield=True):
                        await _send_body(send, self._reply.cut_short())
                        await _send_body(send, b"", more=False)
                raise
            group.cancel_scope.cancel()

    async def _send(self, send: Send, watch: Callable[[], object]) -> None:
        # Begun before anything can cancel it, so that it closes what it holds.
        async with aclosing(self._reply.frames()) as frames:
            frame = await anext(frames)
            watch()
            head = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **head})
            await _send_body(send, frame)
            async for frame in frames:
                await _send_body(send, frame)
        await _send_body(send, b"", more=False)


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
