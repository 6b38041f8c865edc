"""What callers ask of an engine about its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxlora import checks
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.scheduler import Scheduler
from jaxlora.outputs import LoRAStatus
from jaxlora.types import LoRARequest


class AdapterCalls:
    """The part of :class:`~jaxlora.engine.engine.LLMEngine` that adds, changes, pins and removes
    adapters and tells of them. Without LoRA :meth:`describe_loras` has none to describe; everything
    else raises ValueError."""

    def __init__(self, registry: AdapterRegistry | None, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._registry = registry

    @property
    def adapters(self) -> AdapterRegistry:
        """Everything else there is to ask about adapters. Raises ValueError without LoRA."""
        if self._registry is None:
            raise ValueError("LoRA is not enabled: start the engine with enable_lora=True")
        return self._registry

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads an adapter ahead of its first request; False if it is registered already.

        With load_inplace, or if the files in its folder have changed, it is read again: False if
        its content is the same, and otherwise requests from now on get the new version, while
        those that came before finish on the old one.
        """
        return self.adapters.add(lora_request)

    def add_loras(self, lora_requests: list[LoRARequest]) -> None:
        """:meth:`add_lora` for several new adapters, which are read at once. Raises what the first
        that fails raises; those before it stay."""
        self.adapters.add_many(lora_requests)

    def update_lora(
        self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> bool:
        """Gives a registered adapter new weights: numpy or jax arrays under PEFT's names, which are
        copied. ``config`` is as in adapter_config.json; None is the adapter's own.

        False if they are the weights it has. Later requests get the new version, earlier ones
        finish on the old. Raises AdapterError if there is no such adapter or the new one cannot be
        served, and leaves the old in place.
        """
        return self.add_lora(self.update_request(name, tensors, config))

    def update_request(
        self, name: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> LoRARequest:
        """What :meth:`add_lora` takes to do as :meth:`update_lora` does."""
        entry = self.adapters.names.find(name)
        return LoRARequest.from_tensors(
            name, tensors, entry.config if config is None else config, load_inplace=True
        )

    def remove_lora(self, lora_int_id: int) -> bool:
        """Forgets an adapter, False if there is none; requests that use it finish first."""
        return self.adapters.remove(checks.integer("lora_int_id", lora_int_id))

    def list_loras(self) -> set[int]:
        """Ids of the registered adapters."""
        return self.adapters.names.ids()

    def describe_loras(self) -> list[LoRAStatus]:
        """The registered adapters, in the order they were registered."""
        return self.observe_loras()()

    def observe_loras(self) -> Callable[[], list[LoRAStatus]]:
        """What does the long part of :meth:`describe_loras`: any thread may call it while the
        engine steps. Each adapter is where it is when it is looked at."""
        registry = self._registry
        if registry is None:
            return list
        waiting = self.scheduler.waiting.lines
        entries = registry.names.entries()
        return lambda: [
            LoRAStatus(
                lora_name=entry.name,
                lora_int_id=entry.lora_int_id,
                rank=entry.rank,
                tier=registry.tier(entry),
                pinned=entry.pinned,
                waiting=entry in waiting,
            )
            for entry in entries
        ]

    def lora_id(self, lora_name: str) -> int | None:
        """The id of the adapter that requests get under a name, None if there is none."""
        names = self.adapters.names
        return names.find(lora_name).lora_int_id if lora_name in names else None

    def pin_lora(self, lora_int_id: int) -> bool:
        """Brings an adapter into a slot as soon as one is to be had, while :meth:`step` is called,
        and keeps it there until it is removed. Raises AdapterNotFoundError, and
        AdapterCapacityError if that leaves too little room for others."""
        return self.adapters.pin(checks.integer("lora_int_id", lora_int_id))
