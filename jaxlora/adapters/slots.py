"""The device's slots: which adapter is in which, who may have to go, who must not."""

from __future__ import annotations

from collections import OrderedDict
from operator import itemgetter

from jaxlora.adapters.registered import Registered


class Slots:
    """``num_slots`` slots. One is *idle* while its adapter is used by nobody: the adapter stays
    until the slot is needed, and the least recently used goes first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self.num_writes = 0
        """Times a slot was given to an adapter, which had to be written to it."""
        self._entries: dict[int, Registered] = {}
        """By slot."""
        self._free = list(range(num_slots - 1, -1, -1))
        self._idle: OrderedDict[int, Registered] = OrderedDict()
        """Least recently used first."""

    def entries(self) -> list[tuple[int, Registered]]:
        """The slots with an adapter, in order, and which it is."""
        return sorted(self._entries.items(), key=itemgetter(0))

    @property
    def num_free(self) -> int:
        """Slots without an adapter."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Slots whose adapter nobody uses."""
        return len(self._idle)

    @property
    def num_in_use(self) -> int:
        """Slots whose adapter somebody uses."""
        return self.num_slots - self.num_free - self.num_idle

    @property
    def has_room(self) -> bool:
        """A slot is to be had."""
        return bool(self._free) or self._victim() is not None

    def enter(self, entry: Registered) -> int:
        """Gives an adapter a slot, idle for now; another adapter loses its own if need be. There
        must be room."""
        if not self._free:
            victim = self._victim()
            assert victim is not None
            self.vacate(victim)
            self.num_evictions += 1
        entry.slot = slot = self._free.pop()
        self._entries[slot] = self._idle[slot] = entry
        self.num_writes += 1
        return slot

    def use(self, entry: Registered) -> None:
        """One more uses an adapter that is in a slot."""
        assert entry.slot is not None
        self._idle.pop(entry.slot, None)
        entry.in_use += 1

    def release(self, entry: Registered) -> None:
        """One uses it no more. Raises ValueError if nobody did."""
        if entry.in_use < 1 or entry.slot is None:
            raise ValueError(f"adapter {entry.name!r} released more often than acquired")
        entry.in_use -= 1
        if entry.in_use == 0:
            self._idle[entry.slot] = entry

    def vacate(self, entry: Registered) -> None:
        """Takes an adapter that nobody uses out of its slot, if it has one."""
        if entry.slot is not None:
            self._idle.pop(entry.slot, None)
            del self._entries[entry.slot]
            self._free.append(entry.slot)
            entry.slot = None

    def vacate_idle(self) -> None:
        """Empties every slot that is not in use, so that the next user writes it again."""
        for entry in list(self._idle.values()):
            self.vacate(entry)

    def _victim(self) -> Registered | None:
        # A retired one is held still: it may have no copy on the host, and nothing to read.
        may_go = (each for each in self._idle.values() if not (each.pinned or each.retired))
        return next(may_go, None)
