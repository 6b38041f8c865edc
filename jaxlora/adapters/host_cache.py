"""The host's tier of adapters: copies in memory, within limits of number and size."""

from __future__ import annotations

import os
from collections import OrderedDict

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.registered import Registered


class HostCache:
    """At most ``max_adapters`` adapters of ``max_bytes`` bytes together; None is no limit.

    Room is reserved first, so that what is being read counts already.
    """

    def __init__(self, *, max_adapters: int | None = None, max_bytes: int | None = None) -> None:
        self.max_adapters = max_adapters
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes of all copies, reserved room included."""
        self._rooms: OrderedDict[Registered, Adapter | None] = OrderedDict()
        """Copies, None while only the room is reserved; least recently used first."""

    def __contains__(self, entry: Registered) -> bool:
        """Whether there is a copy, or room for one."""
        return entry in self._rooms

    def __len__(self) -> int:
        """Copies, reserved rooms included."""
        return len(self._rooms)

    def has(self, entry: Registered) -> bool:
        """Whether there is a copy."""
        return self.peek(entry) is not None

    def peek(self, entry: Registered) -> Adapter | None:
        """The copy, None if there is none."""
        return self._rooms.get(entry)

    def touch(self, entry: Registered) -> None:
        """A copy, if there is one, is now the most recently used."""
        if entry in self._rooms:
            self._rooms.move_to_end(entry)

    def reserve(self, entry: Registered) -> bool:
        """Reserves room, at the expense of the least recently used that may go. False, and nothing
        is dropped, if that does not make enough room."""
        total, count, victims = self.num_bytes, len(self._rooms), []
        candidates = iter(self._rooms)
        while not self.fits(count + 1, total + entry.num_bytes):
            victim = next((each for each in candidates if each.may_leave_host), None)
            if victim is None:
                return False
            victims.append(victim)
            total -= victim.num_bytes
            count -= 1
        for victim in victims:
            self.drop(victim)
        self._rooms[entry] = None
        self.num_bytes += entry.num_bytes
        return True

    def put(self, entry: Registered, adapter: Adapter) -> None:
        """Fills the room that was reserved."""
        assert entry in self._rooms
        self._rooms[entry] = adapter

    def drop(self, entry: Registered) -> None:
        """Drops a copy, or gives up its room, if there is one."""
        if entry in self._rooms:
            del self._rooms[entry]
            self.num_bytes -= entry.num_bytes

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
