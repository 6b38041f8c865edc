"""One version of an adapter that the registry knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
    """Where it can be read again."""
    lora_int_id: int
    version: str
    rank: int
    num_bytes: int
    config: Mapping[str, Any]
    fingerprint: tuple[int, ...]
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

    @property
    def name(self) -> str:
        """The name requests ask for."""
        return self.request.lora_name

    @property
    def in_memory(self) -> bool:
        """It was made of tensors, so there is nowhere to read it again."""
        return self.request.tensors is not None
