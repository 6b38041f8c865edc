"""What adapters are called: each has a name and an id, and no two share one.

There may be thousands, and steps wait: of all of them at once there is nothing but a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxlora.adapters.registered import Registered
from jaxlora.checks import require
from jaxlora.errors import AdapterNotFoundError
from jaxlora.types import LoRARequest


class Names:
    """The registered adapters, each in the version that requests get now."""

    def __init__(self) -> None:
        self._by_name: dict[str, Registered] = {}
        self._by_id: dict[int, Registered] = {}
        self._largest_id = 0
        """That there ever was."""

    def __len__(self) -> int:
        """Number of adapters."""
        return len(self._by_id)

    def __contains__(self, name: str) -> bool:
        """Whether an adapter has this name."""
        return name in self._by_name

    def find(self, name: str) -> Registered:
        """The adapter of a name. Raises AdapterNotFoundError if there is none."""
        if name not in self._by_name:
            raise AdapterNotFoundError(f"no adapter is named {name!r}; add_lora it first")
        return self._by_name[name]

    def by_id(self, lora_int_id: int) -> Registered | None:
        """The adapter of an id, None if there is none."""
        return self._by_id.get(lora_int_id)

    def entries(self) -> Sequence[Registered]:
        """All of them, in the order they were registered."""
        return list(self._by_id.values())

    def ids(self) -> set[int]:
        """All ids."""
        return set(self._by_id)

    def new_id(self) -> int:
        """One that no adapter ever had."""
        return self._largest_id + 1

    def put(self, entry: Registered) -> None:
        """Registers an adapter, in place of the version there was."""
        self._by_name[entry.name] = self._by_id[entry.lora_int_id] = entry
        self._largest_id = max(self._largest_id, entry.lora_int_id)

    def pop(self, lora_int_id: int) -> Registered | None:
        """Forgets an adapter, and returns it; None if there is none."""
        entry = self._by_id.pop(lora_int_id, None)
        if entry is not None:
            del self._by_name[entry.name]
        return entry

    def known(self, request: LoRARequest) -> Registered | None:
        """The adapter a request names, None if it is new. Raises ValueError if the request's name
        or id is another adapter's, or if it says that the adapter is elsewhere, or is none."""
        require("lora_request", request, isinstance(request, LoRARequest), "a LoRARequest")
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
        if entry is None or request.load_inplace:
            return entry
        known = entry.request
        if request.tensors is not None and request.tensors.number not in entry.made_of:
            raise ValueError(
                f"adapter {request.lora_name!r} was not made of these tensors; update_lora it"
            )
        if request.lora_path not in ("", known.lora_path):
            whence = f"loaded from {known.lora_path!r}" if known.lora_path else "made of tensors"
            raise ValueError(
                f"adapter {request.lora_name!r} was {whence}, the request names "
                f"{request.lora_path!r}; load it in place, or remove_lora it first"
            )
        return entry

    def with_path(self, request: LoRARequest) -> LoRARequest:
        """The request; one that has no path with that of the adapter it names."""
        entry = self._by_name.get(request.lora_name)
        if entry is None or request.lora_path or request.tensors is not None:
            return request
        return dataclasses.replace(request, lora_path=entry.request.lora_path)
