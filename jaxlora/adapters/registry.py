"""Which adapters exist, which are in a slot, and who uses them. Host only; touches no device.

A slot is in use while a running request holds it. Idle residents stay until their slot is needed;
the least recently used goes first. A pinned adapter stays once it is in a slot.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

from jaxlora.adapters.adapter import Adapter
from jaxlora.errors import AdapterCapacityError, AdapterNotFoundError
from jaxlora.types import LoRARequest


@dataclasses.dataclass(eq=False, kw_only=True)
class Registered:
    """An adapter the registry knows, and where it is."""

    request: LoRARequest
    lora_int_id: int
    adapter: Adapter
    slot: int | None = None
    in_use: int = 0
    pinned: bool = False
    removed: bool = False

    @property
    def name(self) -> str:
        """The name requests ask for."""
        return self.request.lora_name


class AdapterRegistry:
    """Names, ids and slots. ``load(request)`` reads an adapter, or raises an AdapterError."""

    def __init__(self, num_slots: int, load: Callable[[LoRARequest], Adapter]) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._load = load
        self._by_name: dict[str, Registered] = {}
        self._by_id: dict[int, Registered] = {}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._idle: OrderedDict[int, Registered] = OrderedDict()
        """Residents nobody uses, by slot, least recently used first."""

    def add(self, request: LoRARequest) -> bool:
        """Reads and registers an adapter; False if it was there already.

        Raises ValueError when the name or id is taken by another adapter, AdapterError when the
        adapter cannot be served.
        """
        return not self.has(request) and self.register(request, self.read(request))

    def entries(self) -> list[Registered]:
        """All registered adapters, in the order they were registered."""
        return list(self._by_id.values())

    def has(self, request: LoRARequest) -> bool:
        """Whether the adapter is registered. Raises ValueError as :meth:`add` does."""
        return self._known(request) is not None

    def read(self, request: LoRARequest) -> Adapter:
        """Reads an adapter and changes nothing, so any thread may. Raises AdapterError."""
        return self._load(request)

    def register(self, request: LoRARequest, adapter: Adapter) -> bool:
        """:meth:`add` for an adapter that was read already."""
        if self._known(request) is not None:
            return False
        self._enter(request, adapter)
        return True

    def replace(self, request: LoRARequest, adapter: Adapter) -> None:
        """Registers an adapter, in the place of the one of its name if there is one; requests that
        hold the old one finish on it. Raises ValueError when the id is taken by another name."""
        old = self._known(dataclasses.replace(request, lora_path=""))
        if old is None:
            self._enter(request, adapter)
            return
        pinned = old.pinned
        self.remove(old.lora_int_id)
        request = dataclasses.replace(request, lora_int_id=old.lora_int_id)
        self._enter(request, adapter).pinned = pinned

    def _enter(self, request: LoRARequest, adapter: Adapter) -> Registered:
        lora_int_id = request.lora_int_id or max(self._by_id, default=0) + 1
        entry = Registered(request=request, lora_int_id=lora_int_id, adapter=adapter)
        self._by_name[request.lora_name] = self._by_id[lora_int_id] = entry
        return entry

    def get(self, request: LoRARequest) -> Registered:
        """The adapter a request names, read first if it is new. Raises as :meth:`add` does."""
        self.add(request)
        return self._by_name[request.lora_name]

    def remove(self, lora_int_id: int) -> bool:
        """Forgets an adapter; False if there is none. Requests that hold it finish first."""
        entry = self._by_id.pop(lora_int_id, None)
        if entry is None:
            return False
        del self._by_name[entry.name]
        entry.removed, entry.pinned = True, False
        if entry.in_use == 0:
            self._vacate(entry)
        return True

    def pin(self, lora_int_id: int) -> bool:
        """Keeps an adapter in its slot once it is there. Raises AdapterNotFoundError for an
        unknown id and AdapterCapacityError if no slot would be left for other adapters."""
        entry = self._by_id.get(lora_int_id)
        if entry is None:
            raise AdapterNotFoundError(f"no adapter has id {lora_int_id}; add_lora it first")
        pinned = sum(e.pinned for e in self._by_id.values())
        if not entry.pinned and pinned + 1 >= self.num_slots:
            raise AdapterCapacityError(
                f"pinning {entry.name!r} would leave no slot for other adapters: {pinned} of "
                f"max_loras={self.num_slots} are pinned; raise max_loras"
            )
        entry.pinned = True
        return True

    def list(self) -> set[int]:
        """Ids of all registered adapters, resident or not."""
        return set(self._by_id)

    def has_slot_for(self, entry: Registered) -> bool:
        """Whether :meth:`acquire` would succeed: the adapter is in a slot, or one can be had."""
        return entry.slot is not None or bool(self._free_slots) or self._victim() is not None

    def acquire(self, entry: Registered) -> tuple[int, bool]:
        """A slot for one more user of an adapter, and whether the adapter must be written to it.

        Each call needs one :meth:`release`. Raises AdapterCapacityError while every slot is in use
        or pinned.
        """
        if entry.slot is not None:
            self._idle.pop(entry.slot, None)
            entry.in_use += 1
            return entry.slot, False
        if not self._free_slots:
            victim = self._victim()
            if victim is None:
                raise AdapterCapacityError(
                    f"no slot for adapter {entry.name!r}: all max_loras={self.num_slots} are in "
                    "use or pinned; raise max_loras"
                )
            self._vacate(victim)
            self.num_evictions += 1
        entry.slot = self._free_slots.pop()
        entry.in_use += 1
        return entry.slot, True

    def release(self, entry: Registered) -> None:
        """Ends one use; the last user of a removed adapter frees its slot."""
        if entry.in_use < 1 or entry.slot is None:
            raise ValueError(f"adapter {entry.name!r} released more often than acquired")
        entry.in_use -= 1
        if entry.in_use == 0:
            if entry.removed:
                self._vacate(entry)
            else:
                self._idle[entry.slot] = entry

    def vacate_idle(self) -> None:
        """Empties every slot that is not in use, so that the next user writes it again."""
        for entry in list(self._idle.values()):
            self._vacate(entry)

    def residents(self) -> dict[int, str]:
        """Slot -> name of the registered adapter in it."""
        used = {e.slot: e.name for e in self._by_id.values() if e.slot is not None}
        return dict(sorted(used.items()))

    def _victim(self) -> Registered | None:
        return next((entry for entry in self._idle.values() if not entry.pinned), None)

    def _vacate(self, entry: Registered) -> None:
        if entry.slot is not None:
            self._idle.pop(entry.slot, None)
            self._free_slots.append(entry.slot)
            entry.slot = None

    def _known(self, request: LoRARequest) -> Registered | None:
        entry = self._by_name.get(request.lora_name)
        if request.lora_int_id is not None:
            other = self._by_id.get(request.lora_int_id)
            if other is not None and other is not entry:
                raise ValueError(
                    f"lora_int_id {request.lora_int_id} belongs to adapter {other.name!r}, "
                    f"it cannot name {request.lora_name!r} as well"
                )
            if entry is not None and entry.lora_int_id != request.lora_int_id:
                raise ValueError(
                    f"adapter {request.lora_name!r} has lora_int_id {entry.lora_int_id}, "
                    f"the request says {request.lora_int_id}"
                )
        if entry is not None and request.lora_path not in ("", entry.request.lora_path):
            raise ValueError(
                f"adapter {request.lora_name!r} was loaded from {entry.request.lora_path!r}, the "
                f"request names {request.lora_path!r}; remove_lora it first, or use another name"
            )
        return entry
