"""One version of an adapter that the registry knows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxlora.adapters.adapter import Adapter
from jaxlora.types import LoRARequest


@dataclasses.dataclass(eq=False)
class HeldVersion:
    """The version of an adapter that the first of several requests gets, for all of them."""

    entry: Registered | None = None
    """None before the first, and at the end."""
    is_over: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class Registered:
    """A version of an adapter, and where it is."""

    request: LoRARequest
    """Who asked for it, and where it was to be found."""
    lora_int_id: int
    version: str
    rank: int
    num_bytes: int
    config: Mapping[str, Any]
    fingerprint: tuple[int, ...]
    folder: str = ""
    """Where it was read; "" if it was in memory."""
    made_of: set[int] = dataclasses.field(default_factory=set)
    """Numbers of the tensors in memory that were found to be this version."""
    slot: int | None = None
    in_use: int = 0
    """Running sequences."""
    num_holders: int = 0
    """Waiting and running sequences."""
    pinned: bool = False
    pin_error: Exception | None = None
    """What ended its pin."""
    retired: bool = False
    """Removed or replaced: it goes with the last who holds it."""

    @classmethod
    def of(cls, request: LoRARequest, adapter: Adapter, lora_int_id: int) -> Registered:
        """A version that was read for a request."""
        entry = cls(
            request=_without_weights(request),
            lora_int_id=lora_int_id,
            version=adapter.version,
            rank=adapter.rank,
            num_bytes=adapter.num_bytes,
            config=adapter.config,
            fingerprint=adapter.fingerprint,
            folder=adapter.folder,
        )
        entry._note_tensors(request)
        return entry

    def was_read_again(self, request: LoRARequest, adapter: Adapter) -> None:
        """Another request had the same version read, perhaps elsewhere."""
        if request.lora_path:
            # What was read last is what can be read again.
            self.request = _without_weights(request)
            self.fingerprint, self.folder = adapter.fingerprint, adapter.folder
        self._note_tensors(request)
        # It may say more: of modules that this adapter lacks, and the next one has.
        self.config = adapter.config

    def _note_tensors(self, request: LoRARequest) -> None:
        if request.tensors is not None:
            self.made_of.add(request.tensors.number)

    @property
    def name(self) -> str:
        """The name requests ask for."""
        return self.request.lora_name

    def request_again(self) -> LoRARequest:
        """What reads it again: from where it was read, unless that is gone. A hub's branch may lead
        elsewhere by now, and so may a relative path."""
        if not os.path.lexists(self.folder):
            return self.request
        return dataclasses.replace(self.request, lora_path=self.folder)

    @property
    def in_memory(self) -> bool:
        """It was made of tensors, so there is nowhere to read it again."""
        return self.request.tensors is not None

    @property
    def stays_on_host(self) -> bool:
        """Its copy on the host is kept: it is pinned, or in memory."""
        return not self.retired and (self.pinned or self.in_memory)

    @property
    def may_leave_host(self) -> bool:
        """Its copy on the host can be had again, or will not be missed."""
        will_be_missed = self.slot is None and self.num_holders > 0
        return not (self.stays_on_host or will_be_missed)


def _without_weights(request: LoRARequest) -> LoRARequest:
    tensors = None if request.tensors is None else request.tensors.emptied()
    return dataclasses.replace(request, tensors=tensors, load_inplace=False)
