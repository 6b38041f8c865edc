"""What stays in the host's tier of adapters, and whether that leaves room for the others."""

from __future__ import annotations

from collections.abc import Iterable

from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.registered import Registered
from jaxlora.errors import AdapterCapacityError


def may_drop(entry: Registered) -> bool:
    """Whether a copy on the host can be had again, or will not be missed."""
    will_be_missed = entry.slot is None and entry.num_holders > 0
    return not (_stays(entry) or will_be_missed)


def check_room(host: HostCache[Registered], entries: Iterable[Registered], what: str) -> None:
    """Raises AdapterCapacityError if some of the adapters could never be on the host, because of
    those that stay there; ``what`` brought that about."""
    if host.is_unlimited:
        return
    entries = set(entries)
    stay = {each for each in entries if _stays(each)}
    num_bytes = sum(each.num_bytes for each in stay)
    sizes = [each.num_bytes for each in entries - stay]
    if not host.fits(len(stay) + bool(sizes), num_bytes + max(sizes, default=0)):
        raise AdapterCapacityError(
            f"{what} would leave too little room in host memory: {len(stay)} adapters of "
            f"{num_bytes} bytes are pinned or in memory only, and the largest other has "
            f"{max(sizes, default=0)} bytes; raise {host.limits()}"
        )


def _stays(entry: Registered) -> bool:
    return not entry.retired and (entry.pinned or entry.in_memory)
