"""The host's tier of adapters: copies in memory, within limits of number and size."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from jaxlora.adapters.adapter import Adapter

Key = TypeVar("Key", bound=Hashable)


class HostCache(Generic[Key]):
    """At most ``max_adapters`` adapters of ``max_bytes`` bytes together; None is no limit.

    Room is reserved first, so that what is being read counts already.
    """

    def __init__(self, *, max_adapters: int | None = None, max_bytes: int | None = None) -> None:
        self.max_adapters = max_adapters
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of all copies, reserved room included."""
        self._rooms: OrderedDict[Key, tuple[int, Adapter | None]] = OrderedDict()
        """Size and copy, None while only the room is reserved; least recently used first."""

    def __contains__(self, key: Key) -> bool:
        """Whether there is a copy, or room for one."""
        return key in self._rooms

    def __len__(self) -> int:
        """Copies, reserved rooms included."""
        return len(self._rooms)

    def has(self, key: Key) -> bool:
        """Whether there is a copy."""
        return self.peek(key) is not None

    def peek(self, key: Key) -> Adapter | None:
        """The copy, None if there is none."""
        return self._rooms.get(key, (0, None))[1]

    def touch(self, key: Key) -> None:
        """A copy, if there is one, is now the most recently used."""
        if key in self._rooms:
            self._rooms.move_to_end(key)

    def reserve(self, key: Key, num_bytes: int, droppable: Callable[[Key], bool]) -> bool:
        """Reserves room, at the expense of the least recently used that may be dropped. False, and
        nothing is dropped, if that does not make enough room."""
        total, count, victims = self.num_bytes, len(self._rooms), []
        candidates = iter(list(self._rooms))
        while not self.fits(count + 1, total + num_bytes):
            victim = next((each for each in candidates if droppable(each)), None)
            if victim is None:
                return False
            victims.append(victim)
            total -= self._rooms[victim][0]
            count -= 1
        for victim in victims:
            self.drop(victim)
        self._rooms[key] = (num_bytes, None)
        self.num_bytes += num_bytes
        return True

    def put(self, key: Key, adapter: Adapter) -> None:
        """Fills the room that was reserved."""
        num_bytes, _ = self._rooms[key]
        self._rooms[key] = (num_bytes, adapter)

    def drop(self, key: Key) -> None:
        """Drops a copy, or gives up its room, if there is one."""
        num_bytes, _ = self._rooms.pop(key, (0, None))
        self.num_bytes -= num_bytes

    def fits(self, num_adapters: int, num_bytes: int) -> bool:
        """Whether so many adapters of so many bytes together are within the limits."""
        within = self.max_adapters is None or num_adapters <= self.max_adapters
        return within and (self.max_bytes is None or num_bytes <= self.max_bytes)

    def limits(self) -> str:
        """The limits as options, for messages."""
        parts = [] if self.max_adapters is None else [f"max_cpu_loras={self.max_adapters}"]
        if self.max_bytes is not None:
            parts.append(f"max_cpu_lora_gb={self.max_bytes / (1 << 30):.3g}")
        return ", ".join(parts)


def default_max_bytes() -> int:
    """A quarter of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
