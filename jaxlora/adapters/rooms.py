"""Where adapters lie on the devices until they are written to a slot."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.adapters.copy_stream import CopyStream
from jaxlora.parallel import Devices

Kind = TypeVar("Kind", bound=Hashable)


class Rooms(Generic[Kind]):
    """Brings buffers to the devices, each of which has one of ``streams`` for that.

    ``kinds`` are all there are, with the numbers that each device has room for and their dtype. A
    room is an array of JAX's that nobody has seen yet, so it is written to where it lies.
    """

    def __init__(
        self,
        devices: Devices,
        streams: Sequence[CopyStream],
        kinds: Mapping[Kind, tuple[int, np.dtype[Any]]],
    ) -> None:
        self._streams = dict(zip(devices.all, streams, strict=True))
        self._kinds = kinds
        self._makers: Mapping[Kind, Callable[[], jax.Array]] = {}

    def programs(self) -> dict[Kind, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """What makes a room of each kind, and its arguments, of which there are none. The engine
        compiles them and hands them to :meth:`use_programs`."""
        return {
            kind: (partial(jnp.zeros, (size,), dtype), ())
            for kind, (size, dtype) in self._kinds.items()
        }

    def use_programs(self, makers: Mapping[Kind, Callable[[], jax.Array]]) -> None:
        """Takes the compiled programs, by kind."""
        self._makers = makers

    def bring(self, kind: Kind, buffer: np.ndarray) -> jax.Array:
        """A buffer, all devices' parts one after the other, on the devices; waits until it is
        there, and any thread may. Raises MemoryError."""
        room = self._makers[kind]()
        # Steps that were dispatched before it may still use the memory it is made of.
        room.block_until_ready()
        for shard in room.addressable_shards:
            part = buffer[shard.index]
            self._streams[shard.device].copy(part, shard.data.unsafe_buffer_pointer())
        return room
