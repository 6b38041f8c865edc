"""Which adapters exist, in which version, in which tier, and who uses them. Touches no device.

An adapter is a name and its content. New content under a name is a new version: requests that came
before finish on the one they hold, later ones get the new one.

Two tiers hold weights. A *slot* is on the device and is in use while a running request holds it;
idle residents stay until their slot is needed, and the least recently used goes first. The *host
cache* holds what may have to be written to a slot. What fell out of it is read again when a request
needs it, and must then have the version it had. A pinned adapter leaves neither tier. What waits
for a slot is brought up on threads (:mod:`jaxlora.adapters.prefetch`), so that taking the slot is a
matter of one dispatch.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.holds import LAST_PLACE, Holds, Place, lacks_slot
from jaxlora.adapters.host_cache import HostCache
from jaxlora.adapters.host_room import HostRoom
from jaxlora.adapters.names import Names
from jaxlora.adapters.prefetch import Prefetch
from jaxlora.adapters.reader import Reader
from jaxlora.adapters.registered import HeldVersion, Registered
from jaxlora.adapters.slots import Slots
from jaxlora.adapters.staging import StagingArea
from jaxlora.errors import AdapterCapacityError, AdapterNotFoundError
from jaxlora.interrupts import uninterrupted
from jaxlora.types import LoRARequest

logger = logging.getLogger(__name__)

_NUM_READERS = 4
_MOST_READS = 8
"""Most adapters that are read ahead of being registered: they count toward no limit yet."""


class AdapterRegistry:
    """Names, ids, versions and tiers. ``load(request)`` reads an adapter or raises AdapterError.

    ``fingerprint(request)`` tells cheaply whether what it would read has changed; () if unknown.
    ``staging`` is where adapters wait for their slots.
    """

    def __init__(
        self,
        num_slots: int,
        load: Callable[[LoRARequest], Adapter],
        *,
        staging: StagingArea,
        host: HostCache | None = None,
        fingerprint: Callable[[LoRARequest], tuple[int, ...]] = lambda request: (),
        readers: Executor | None = None,
    ) -> None:
        self.slots = Slots(num_slots)
        self.host = HostCache() if host is None else host
        self.reader = Reader(load)
        self._fingerprint = fingerprint
        self.names = Names()
        self._held = Holds()
        # Nothing here holds this object: what it has goes when it is forgotten, without waiting for
        # the garbage collector.
        self._room = HostRoom(self.host, partial(_all_there_are, self.names, self._held))
        self._pinned: dict[Registered, None] = {}
        self._replacing: dict[Registered, None] = {}
        """What took the place of versions that were in a slot or staged, until it is staged."""
        self._staging = staging
        self._readers = readers or ThreadPoolExecutor(_NUM_READERS, "jaxlora-adapters")
        self.prefetch = Prefetch(self.host, staging, read=self.reader.read, readers=self._readers)

    # Names and versions

    def add(self, request: LoRARequest) -> bool:
        """Reads and registers an adapter; False if it was there already, with this content.

        It is read if its name is new, if the request says load_inplace, or if the files of its
        folder have changed. Raises ValueError when the name or id is taken by another adapter,
        AdapterError when the adapter cannot be served.
        """
        if not self.must_read(request):
            return False
        request = self.names.with_path(request)
        return self.register(request, self.read(request))

    def add_many(self, requests: Sequence[LoRARequest]) -> None:
        """:meth:`add` for several, which are read at once, a few at a time. Raises what the first
        that fails raises; those before it stay."""
        for start in range(0, len(requests), _MOST_READS):
            some = [self.names.with_path(each) for each in requests[start : start + _MOST_READS]]
            reads = [self._readers.submit(self.read, request) for request in some]
            reads.reverse()
            for request in some:
                # Left in no variable: it has the error, whose traceback has this frame.
                self.register(request, reads.pop().result())

    def must_read(self, request: LoRARequest) -> bool:
        """Whether :meth:`add` reads the adapter. Raises ValueError as it does."""
        entry = self.names.known(request)
        if entry is None or request.load_inplace:
            return True
        now = () if entry.in_memory else self._fingerprint(entry.request)
        return now not in ((), entry.fingerprint)

    def has(self, request: LoRARequest) -> bool:
        """Whether a request can have its adapter without reading it anew. Raises ValueError as
        :meth:`add` does."""
        return self.names.known(request) is not None and not request.load_inplace

    def read(self, request: LoRARequest) -> Adapter:
        """Reads an adapter and changes nothing, so any thread may. Raises AdapterError."""
        return self.reader.read(request)

    @uninterrupted()
    def register(self, request: LoRARequest, adapter: Adapter) -> bool:
        """:meth:`add` for an adapter that was read already.

        Raises AdapterCapacityError if host memory would have no room for it.
        """
        old = self.names.known(request)
        if old is not None and old.version == adapter.version:
            old.was_read_again(request, adapter)
            return False
        lora_int_id = request.lora_int_id or self.names.new_id()
        new = Registered.of(request, adapter, lora_int_id if old is None else old.lora_int_id)
        new.pinned = old is not None and old.pinned
        was_at_hand = old is not None and (self.is_ready(old) or old in self._replacing)
        if old is not None:
            old.retired = True
        try:
            self._place_on_host(new, adapter)
        except AdapterCapacityError:
            self._room.forget(new)
            if old is not None:
                old.retired = False
            raise
        if old is not None:
            self._retire(old)
        if new.pinned:
            self._pinned[new] = None
        self.names.put(new)
        if was_at_hand:
            # It was in use, so the new version will be: its first request need not wait.
            self._replacing[new] = None
            self.start_prefetch()
        return True

    def get(self, request: LoRARequest) -> Registered:
        """The adapter a request names, read first if it is new or to be loaded in place. Raises as
        :meth:`add` does."""
        if not self.has(request):
            self.add(request)
        return self.names.find(request.lora_name)

    def get_held(self, request: LoRARequest, held: HeldVersion) -> Registered:
        """:meth:`get` for one of several requests. What it holds needs one :meth:`end_hold`."""
        if held.entry is None:
            entry = self.get(request)
            if held.is_over:
                return entry
            # Behind all that wait: whose turn it is, each of the requests says by itself. Nobody
            # holds one on the main thread, so there is no Ctrl-C to be kept out.
            self.hold(entry, LAST_PLACE)
            held.entry = entry
        return held.entry

    def end_hold(self, held: HeldVersion) -> None:
        """There will be no further request."""
        entry, held.entry, held.is_over = held.entry, None, True
        if entry is not None:
            self.let_go(entry)

    def versions(self, lora_int_id: int) -> list[Registered]:
        """The version of an adapter that requests get now, and those it replaced that are held;
        none for an unknown id."""
        entry = self.names.by_id(lora_int_id)
        if entry is None:
            return []
        older = (each for each in self._held if each.retired and each.lora_int_id == lora_int_id)
        return [entry, *(each for each in older if each.name == entry.name)]

    @uninterrupted()
    def remove(self, lora_int_id: int) -> bool:
        """Forgets an adapter; False if there is none. Requests that hold it finish first."""
        entry = self.names.pop(lora_int_id)
        if entry is None:
            return False
        self._retire(entry)
        return True

    @uninterrupted()
    def pin(self, lora_int_id: int) -> bool:
        """Brings an adapter into a slot as soon as one is to be had, and keeps it there and on the
        host.

        Raises AdapterNotFoundError for an unknown id, and AdapterCapacityError if no room on the
        host, or no slot for adapters that requests have asked for, would be left.
        """
        entry = self.names.by_id(lora_int_id)
        if entry is None:
            raise AdapterNotFoundError(f"no adapter has id {lora_int_id}; add_lora it first")
        if entry.pinned:
            return True
        others = [each for each in self._held if each is not entry and not each.pinned]
        free = self.slots.num_slots - len(self._pinned)
        if free == 0 or (free == 1 and others):
            asked = f", and requests ask for {len(others)} others" if others else ""
            remedies = ["remove_lora a pinned one"] if self._pinned else []
            remedies += ["pin it when those requests have ended"] if others and free else []
            raise AdapterCapacityError(
                f"pinning {entry.name!r} would leave too few slots: {self._usage()}{asked}; "
                f"{', '.join(remedies)}, or raise max_loras"
            )
        entry.pinned = True
        try:
            self._room.check(entry, f"pinning {entry.name!r}")
        except AdapterCapacityError:
            entry.pinned = False
            raise
        self._pinned[entry] = None
        entry.pin_error = None
        return True

    def is_placed(self, lora_int_id: int) -> bool:
        """Whether a pinned adapter is in its slot. Raises AdapterNotFoundError if it was removed,
        and what ended its pin."""
        entry = self.names.by_id(lora_int_id)
        if entry is None:
            raise AdapterNotFoundError(f"adapter {lora_int_id} was removed before it had a slot")
        if entry.pin_error is not None:
            # A new one each time: a traceback leads to this object, and this to the entry.
            raise copy.copy(entry.pin_error)
        return entry.slot is not None

    def check_can_run(self, entry: Registered) -> None:
        """Raises AdapterCapacityError if pins leave an adapter no slot."""
        if len(self._pinned) >= self.slots.num_slots and not entry.pinned:
            raise self.no_slot(entry)

    def residents(self) -> dict[int, str]:
        """Slot -> name of the registered adapter in it."""
        return {slot: entry.name for slot, entry in self.slots.entries() if not entry.retired}

    def tier(self, entry: Registered) -> Literal["device", "host", "source"]:
        """Where the weights are, nearest to the device."""
        if entry.slot is not None:
            return "device"
        return "host" if self.host.has(entry) else "source"

    # Slots

    def hold(self, entry: Registered, place: Place = (0, 0)) -> None:
        """A sequence at a place of the queue will use the adapter, in this version. Each call needs
        one :meth:`let_go`."""
        self._held.add(entry, place)

    def let_go(self, entry: Registered) -> None:
        """A sequence has ended."""
        if self._held.end(entry):
            if not entry.pinned:
                self._staging.drop(entry)
            self._forget_if_unused(entry)

    def is_ready(self, entry: Registered) -> bool:
        """The adapter is in a slot, or could be written to one now."""
        return entry.slot is not None or self._staging.has(entry)

    def has_slot_for(self, entry: Registered) -> bool:
        """The adapter is in a slot, or one can be had."""
        if entry.slot is not None:
            return True
        return self.slots.has_room and not (entry.pinned and self._pinned_give_way())

    def acquire(self, entry: Registered) -> tuple[int, Any]:
        """A slot for one more user of an adapter, and what was staged to be written to it, None if
        it is there already.

        Each call needs one :meth:`release`. Raises AdapterCapacityError while every slot is in use
        or pinned, AdapterNotFoundError while the adapter is not staged.
        """
        slot, staged = (entry.slot, None) if entry.slot is not None else self._enter(entry)
        self.slots.use(entry)
        return slot, staged

    def release(self, entry: Registered) -> None:
        """Ends one use; the slot of a retired adapter is free with the last who holds it."""
        self.slots.release(entry)
        self._forget_if_unused(entry)

    def place_pinned(self) -> list[tuple[int, Any]]:
        """Slots for pinned adapters that have none and are staged, and what is to be written."""
        return [
            self._enter(entry)
            for entry in self._pinned
            if entry.slot is None and self.is_ready(entry) and self.has_slot_for(entry)
        ]

    # Ahead of their turn

    @property
    def has_work(self) -> bool:
        """Adapters are on their way to a slot, whether or not a sequence waits for them."""
        return self.prefetch.is_busy or any(entry.slot is None for entry in self._pinned)

    def start_prefetch(self, places: Mapping[Registered, Place] | None = None) -> None:
        """Begins to bring up what is pinned or waited for and has no slot, and to stage what took
        the place of a version that was at hand, if there is room besides. ``places`` are those of
        the first that waits for each; None: as they were."""
        pinned = [entry for entry in self._pinned if entry.slot is None]
        waiting = self._held.without_slot(places)
        # Who is to have the slot must find room to be staged.
        wanted = waiting + pinned if self._pinned_give_way() else pinned + waiting
        replacing = (each for each in self._replacing if not (each.pinned or each.num_holders))
        self.prefetch.start(wanted, then=replacing)

    def finish_prefetch(self) -> list[tuple[Registered, Exception]]:
        """Takes in what was read and staged; what could not be, with the reason, which ends a
        pin."""
        failed = self.prefetch.finish()
        for entry in [each for each in self._replacing if self.is_ready(each)]:
            # Once is enough: who is not asked for makes room for those that are.
            del self._replacing[entry]
        for entry, error in failed:
            self._replacing.pop(entry, None)
            if entry.pinned:
                logger.error("adapter %r is not pinned any more: %s", entry.name, error)
                self._unpin(entry)
                entry.pin_error = error
        return failed

    def _enter(self, entry: Registered) -> tuple[int, Any]:
        """Gives an adapter a slot, which is idle until it is acquired; what to write to it."""
        if not self._staging.has(entry):
            raise AdapterNotFoundError(f"adapter {entry.name!r} is not on the device now")
        if not self.slots.has_room:
            raise self.no_slot(entry)
        self.host.touch(entry)
        return self.slots.enter(entry), self._staging.take(entry)

    def no_slot(self, entry: Registered, seconds: float | None = None) -> AdapterCapacityError:
        """Why an adapter has no slot, after so many seconds of waiting for one."""
        waited = "" if seconds is None else f" in {seconds:g} s, in which none changed hands"
        remedy = "raise max_loras" if seconds is None else "raise max_loras or lora_slot_timeout"
        remedy = f"remove_lora a pinned one, or {remedy}" if self._pinned else remedy
        return AdapterCapacityError(
            f"no slot for adapter {entry.name!r}{waited}: {self._usage()}; {remedy}"
        )

    def _pinned_give_way(self) -> bool:
        """The last slot without a pinned adapter goes to others first, because that one never gives
        it back: to a version that was replaced while requests wait for it."""
        num_left = self.slots.num_slots - sum(entry.slot is not None for entry in self._pinned)
        return num_left == 1 and any(map(lacks_slot, self._held))

    def _usage(self) -> str:
        slots, pinned = self.slots, len(self._pinned)
        return (
            f"of max_loras={slots.num_slots} slots {slots.num_in_use} are in use, {pinned} are "
            "pinned"
        )

    def _unpin(self, entry: Registered) -> None:
        entry.pinned = False
        self._pinned.pop(entry, None)
        if entry.num_holders == 0:
            self._staging.drop(entry)

    def _retire(self, entry: Registered) -> None:
        entry.retired = True
        self._replacing.pop(entry, None)
        self._room.forget(entry)
        self._unpin(entry)
        self._forget_if_unused(entry)

    def _forget_if_unused(self, entry: Registered) -> None:
        if entry.retired and entry.num_holders + entry.in_use == 0:
            self.slots.vacate(entry)
            self.host.drop(entry)

    def _place_on_host(self, new: Registered, adapter: Adapter) -> None:
        self._room.check(new, f"adapter {new.name!r}")
        if self.host.reserve(new):
            self.host.put(new, adapter)
        elif new.in_memory:
            raise AdapterCapacityError(
                f"no room in host memory for adapter {new.name!r}, which is in memory only, while "
                f"others wait for a slot; try again when they run, or raise {self.host.limits()}"
            )


def _all_there_are(names: Names, held: Iterable[Registered]) -> Iterable[Registered]:
    """All that requests may get or hold."""
    registered = (entry for entry in names.entries() if not entry.retired)
    return itertools.chain(registered, held)
