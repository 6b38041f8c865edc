"""Adapters between the two tiers: on the device already, but in no slot yet."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Executor, Future
from typing import Any

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.registered import Registered
from jaxlora.errors import forget_frames


@dataclasses.dataclass(eq=False)
class _Room:
    num_bytes: int
    future: Future[Any]


class StagingArea:
    """Stages adapters on threads, ahead of their turn, within ``max_bytes`` of device memory.

    ``stage(adapter)`` brings one to the device and returns what the bank writes to a slot;
    ``size_of(adapter)`` is how much memory that takes. What is larger than ``max_bytes`` is staged
    alone. None is no limit.
    """

    def __init__(
        self,
        stage: Callable[[Adapter], Any],
        *,
        size_of: Callable[[Adapter], int],
        threads: Executor,
        max_bytes: int | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self.news = threading.Event()
        """Set when anything has been staged, or could not be."""
        self._stage = stage
        self._size_of = size_of
        self._threads = threads
        self._rooms: dict[Registered, _Room] = {}
        self._dropped: dict[object, int] = {}
        """Bytes of what is not wanted any more, but under way: they are taken until it arrives."""

    @property
    def num_bytes(self) -> int:
        """Device memory of what is staged or on its way."""
        wanted = sum(room.num_bytes for room in self._rooms.values())
        # A copy, since what arrives leaves it on a thread of its own.
        return wanted + sum(list(self._dropped.values()))

    @property
    def under_way(self) -> list[Future[Any]]:
        """What threads are at work on."""
        return [room.future for room in self._rooms.values() if not room.future.done()]

    @property
    def is_making_room(self) -> bool:
        """Threads are at work on what is not wanted any more, and takes memory until then."""
        return bool(self._dropped)

    def has(self, entry: Registered) -> bool:
        """Whether an adapter is staged."""
        room = self._rooms.get(entry)
        return room is not None and room.future.done() and room.future.exception() is None

    def take(self, entry: Registered) -> Any:
        """What was staged; the area forgets it."""
        return self._rooms.pop(entry).future.result()

    def drop(self, entry: Registered) -> None:
        """An adapter is wanted no more, if it was."""
        room = self._rooms.pop(entry, None)
        if room is None or room.future.cancel() or room.future.done():
            return
        # Not the future, which would keep what arrives until somebody looks: an engine without work
        # may not for a long time.
        ticket, dropped, news = object(), self._dropped, self.news
        dropped[ticket] = room.num_bytes

        def arrived(_: Future[Any]) -> None:
            del dropped[ticket]
            news.set()

        room.future.add_done_callback(arrived)

    def want(self, wanted: Iterable[tuple[Registered, Adapter]]) -> None:
        """Begins to stage adapters, the first ones that fit; others make room for them."""
        first: dict[Registered, tuple[int, Adapter]] = {}
        total = 0
        news = self.news  # A future keeps what it calls, and this object keeps the future.
        for entry, adapter in wanted:
            room = self._rooms.get(entry)
            size = self._size_of(adapter) if room is None else room.num_bytes
            if first and not self._fits(total + size):
                break
            first[entry] = (size, adapter)
            total += size
        for entry, (size, adapter) in first.items():
            if entry not in self._rooms and self._make_room(size, first.keys()):
                future = self._threads.submit(self._stage, adapter)
                future.add_done_callback(lambda _: news.set())
                self._rooms[entry] = _Room(size, future)

    def failed(self) -> list[tuple[Registered, Exception]]:
        """What could not be staged, which is forgotten, with the reason."""
        failed: list[tuple[Registered, Exception]] = []
        for entry, room in list(self._rooms.items()):
            error = room.future.exception() if room.future.done() else None
            if isinstance(error, Exception):
                forget_frames(error)
                del self._rooms[entry]
                failed.append((entry, error))
            elif error is not None:
                raise error
        return failed

    def _make_room(self, num_bytes: int, keep: Container[Registered]) -> bool:
        others = [entry for entry in self._rooms if entry not in keep]
        while others and not self._fits(self.num_bytes + num_bytes):
            self.drop(others.pop())
        return self._fits(self.num_bytes + num_bytes) or not (self._rooms or self._dropped)

    def _fits(self, num_bytes: int) -> bool:
        return self.max_bytes is None or num_bytes <= self.max_bytes
