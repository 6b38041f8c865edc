"""Replies that go on: server-sent events, several sources at once, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from jaxlora.server.errors import as_api_error

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ClientGoneError(Exception):
    """The client closed its connection before there was a reply."""


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data).encode() + b"\n\n"


async def events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Chunks as events; an error is one too. Always ends with [DONE]."""
    try:
        async for chunk in chunks:
            yield event(chunk)
    except Exception as error:  # noqa: BLE001  the status is sent, so this is the one way to tell
        yield event(as_api_error(error).body())
    yield DONE


async def event_stream(
    request: Request, chunks: AsyncIterator[dict[str, Any]]
) -> StreamingResponse:
    """A reply of chunks as they come. A client that leaves cancels them.

    Waits for the first one, so that a request that is refused gets a status of its own: what that
    raises is raised here.
    """
    found, first = await unless_client_leaves(request, _next(chunks))

    async def all_chunks() -> AsyncIterator[dict[str, Any]]:
        try:
            if found:
                yield first
            async for chunk in chunks:
                yield chunk
        finally:
            await close(chunks)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(all_chunks()), media_type="text/event-stream", headers=headers)


async def close(iterator: AsyncIterator[Any]) -> None:
    """Closes an async generator now instead of when it is collected."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is not None:
        await aclose()


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client closes the connection first.

    Raises ClientGoneError then. The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
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
