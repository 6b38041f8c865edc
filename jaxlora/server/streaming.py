"""Replies that go on: server-sent events, several sources at once, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jaxlora.server.errors import ClientGoneError, as_api_error

T = TypeVar("T")

_DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def event_stream(request: Request, chunks: AsyncIterator[dict[str, Any]]) -> EventStream:
    """A reply of chunks as they come.

    Waits for the first one, so that a request that is refused gets a status of its own: what that
    raises is raised here.
    """
    found, first = await unless_client_leaves(request.receive, _next(chunks))
    return EventStream([first] if found else [], chunks)


class EventStream(Response):
    """Chunks as events, then [DONE]; an error is an event too. A client that leaves cancels them.

    Each chunk is encoded once and handed over when the client has taken those before it.
    """

    def __init__(self, first: list[dict[str, Any]], chunks: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__()
        self.raw_headers = _HEADERS.copy()
        self._first, self._chunks = first, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the reply."""
        # Nobody is left to be told.
        with contextlib.suppress(ClientGoneError):
            await unless_client_leaves(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        end = _DONE
        try:
            for chunk in self._first:
                await send(_part(event(chunk)))
            async for chunk in self._chunks:
                await send(_part(event(chunk)))
        except Exception as error:  # noqa: BLE001  the status is sent: this is the one way to tell
            end = event(as_api_error(error).body()) + _DONE
        finally:
            await close(self._chunks)
        await send(_part(end, more=False))


def _part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def close(iterator: AsyncIterator[Any]) -> None:
    """Closes an async generator now instead of when it is collected."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client closes the connection first.

    Raises ClientGoneError then. The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merge(iterators: Sequence[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """Items of several iterators as they come, with the number of the iterator; one item of each is
    asked for at a time. Closes them all at the end."""
    pending = {
        asyncio.ensure_future(_next(iterator)): number for number, iterator in enumerate(iterators)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                number = pending.pop(task)
                found, item = task.result()
                if found:
                    pending[asyncio.ensure_future(_next(iterators[number]))] = number
                    yield number, item
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for iterator in iterators:
            await close(iterator)


async def _next(iterator: AsyncIterator[T]) -> tuple[bool, Any]:
    """(True, item), or (False, None) at the end: StopAsyncIteration may not leave a task."""
    try:
        return True, await anext(iterator)
    except StopAsyncIteration:
        return False, None
