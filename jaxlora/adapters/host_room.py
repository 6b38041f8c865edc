"""What stays in the host's tier of adapters, and whether that leaves room for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registered import Registered
from jaxlora.errors import AdapterCapacityError


class HostRoom:
    """Looks after the room that is left for those that do not stay; ``entries`` gives all
    adapters there are, whose number has no limit: as a rule none of them is looked at."""

    def __init__(self, host: HostCache, entries: Callable[[], Iterable[Registered]]) -> None:
        self._host = host
        self._entries = entries
        self._pinned_or_in_memory: set[Registered] = set()
        """When they were last asked about; until they are forgotten."""
        self._largest = 0
        """Bytes of the largest adapter there ever was room for."""

    def check(self, entry: Registered, what: str) -> None:
        """Raises AdapterCapacityError if some adapter could never be on the host, because of those
        that stay there; ``what`` brought that about, which was done to ``entry``."""
        if entry.stays_on_host:
            self._pinned_or_in_memory.add(entry)
        most = max(self._largest, entry.num_bytes)
        stay = {each for each in self._pinned_or_in_memory if each.stays_on_host}
        count, num_bytes = len(stay), sum(each.num_bytes for each in stay)
        if self._host.fits(count + 1, num_bytes + most):
            self._largest = most
            return
        others = {*self._entries(), entry} - stay
        largest = max((each.num_bytes for each in others), default=0)
        if not self._host.fits(count + bool(others), num_bytes + largest):
            raise AdapterCapacityError(
                f"{what} would leave too little room in host memory: {count} adapters of "
                f"{num_bytes} bytes are pinned or in memory only, and the largest other has "
                f"{largest} bytes; raise {self._host.limits()}"
            )
        self._largest = most

    def forget(self, entry: Registered) -> None:
        """An adapter was removed, or could not be registered."""
        self._pinned_or_in_memory.discard(entry)
