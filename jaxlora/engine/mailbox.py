"""The way of a request's events from the engine's thread to an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from typing import Any

from jaxlora.engine.loop import EngineLoop
from jaxlora.engine.messages import Event
from jaxlora.outputs import RequestOutput


class Stream:
    """One request's newest event, on its event loop's side."""

    def __init__(self, *, adds_up: bool) -> None:
        self._adds_up = adds_up
        """See :func:`joined`."""
        self._newest: Event | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Joins it with what nobody has taken yet, and wakes who waits."""
        self._newest = self.newest(self._newest, event)
        # It is done if who waited was cancelled, or was told of an earlier event just now.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def newest(self, old: Event | None, new: Event) -> Event:
        """The one event that stands for both."""
        event: Event = joined(old, new, adds_up=self._adds_up)
        return event

    async def get(self) -> RequestOutput:
        """What has come since the last call, once there is anything. Raises the error that ended
        the request."""
        while self._newest is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        event, self._newest = self._newest, None
        if isinstance(event, RequestOutput):
            return event
        try:
            raise event
        finally:
            # Its traceback holds this frame.
            del event


def joined(old: Any, new: Any, *, adds_up: bool) -> Any:
    """What stands for both of two replies to one who has taken neither, as a rule the new one:
    outputs that ``adds_up`` do not hold what was in those before."""
    if adds_up and isinstance(old, RequestOutput) and isinstance(new, RequestOutput):
        return old.followed_by(new)
    return new


class Sink:
    """Where one request's events go from the engine's thread."""

    def __init__(self, loop: EngineLoop, request_id: str, mailbox: Mailbox, stream: Stream) -> None:
        self._loop, self._request_id = loop, request_id
        self._mailbox, self._stream = mailbox, stream

    def __call__(self, event: Event) -> None:
        """Called on the engine's thread; the request ends if nobody can be told of it."""
        if not self._mailbox.put(self._stream, event):
            self._loop.abort([self._request_id], self)


class Mailbox:
    """Carries events from the engine's thread to one event loop.

    Of each request it holds the newest event only, and it wakes the event loop once for all that
    came while it was busy: a slow consumer costs neither the engine's time nor memory.
    """

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        # The event loop is the key under which the mailbox is kept; it must be able to go.
        self._event_loop = weakref.ref(event_loop)
        self._lock = threading.Lock()
        self._arrived: dict[Stream, Event] = {}

    def put(self, stream: Stream, event: Event) -> bool:
        """Called on the engine's thread; False if the event loop is gone, and with it who waits."""
        event_loop = self._event_loop()
        if event_loop is None or event_loop.is_closed():
            return False
        with self._lock:
            asleep = not self._arrived
            self._arrived[stream] = stream.newest(self._arrived.get(stream), event)
        if asleep:
            # Raised if it is closed just now; the next event says so.
            with contextlib.suppress(RuntimeError):
                event_loop.call_soon_threadsafe(self._deliver)
        return True

    def _deliver(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, {}
        for stream, event in arrived.items():
            stream.put(event)
