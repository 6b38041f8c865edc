"""The adapters on the device: stacked arrays, one slot an adapter, written without compiling.

Per layer and group (see :mod:`jaxlora.models.lora`) the bank holds ``a[S, members * r, d_in]`` and
``b[S, r, d_out]``. An adapter reaches its slot as one packed buffer and one donated, jitted call
with the slot as a run-time value. Buffers come in few sizes, by rank rounded up, so that a rank-8
adapter does not pay for a rank-64 capacity; rows above an adapter's true rank keep what they held
and are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.extras import ExtrasBank
from jaxlora.config import ModelConfig
from jaxlora.models.lora import Group, LayerBank, LoraPair, groups
from kernels_pallas.lora_matmul.op import Implementation


class AdapterBank:
    """``num_slots`` adapters of rank up to ``max_rank``, for one model.

    ``modules`` are the short names adapters may target; groups without one are not allocated.
    ``extras`` are kinds of adapters beyond those (:data:`jaxlora.config.LORA_EXTRAS`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        kernel: Implementation,
        num_slots: int,
        max_rank: int,
        dtype: jnp.dtype,
        modules: Collection[str],
        extras: Collection[str] = (),
    ) -> None:
        self.kernel = kernel
        """What multiplies with the bank; steps are cut into blocks as it wants them."""
        self.num_slots = num_slots
        # Kernels move whole tiles of rows.
        self.max_rank = -(-max_rank // 16) * 16
        """Rows each member has in a slot."""
        self.dtype = dtype
        self.groups: tuple[Group, ...] = tuple(
            group for group in groups(config) if set(group.members) & set(modules)
        )
        self.num_layers = config.num_layers
        self.layers: list[LayerBank] = [
            {group.name: self._empty(group) for group in self.groups}
            for _ in range(config.num_layers)
        ]
        self.ranks = np.zeros(num_slots, np.int32)
        """True rank of each slot's adapter, 0 for an empty slot."""
        self.extras: ExtrasBank | None = None
        if extras:
            self.extras = ExtrasBank(
                config,
                kinds=extras,
                groups=self.groups,
                num_slots=num_slots,
                max_rank=self.max_rank,
                dtype=dtype,
            )
        """What the engine was started for with EngineArgs.lora_extras."""
        self._writers: dict[int, Callable[..., Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Device memory the bank takes."""
        extras = 0 if self.extras is None else self.extras.num_bytes
        return extras + sum(leaf.nbytes for leaf in jax.tree.leaves(self.layers))

    def programs(self) -> dict[int, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The slot write for every buffer size, by rank: function (which donates its first
        argument) and example arguments. The engine compiles them and hands them to
        :meth:`use_programs`."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        return {
            rank: (
                partial(self._write, rank),
                (self.layers, jax.ShapeDtypeStruct((self._buffer_size(rank),), self.dtype), slot),
            )
            for rank in rank_buckets(self.max_rank)
        }

    def use_programs(self, writers: dict[int, Callable[..., Any]]) -> None:
        """Takes the compiled slot writes, by rank."""
        self._writers = writers

    def load(self, slot: int, adapter: Adapter) -> None:
        """Puts an adapter into a slot: one transfer, one dispatch. Nothing waits for either."""
        rank = next(r for r in rank_buckets(self.max_rank) if r >= adapter.rank)
        buffer = jax.device_put(self.pack(adapter, rank))
        self.layers = self._writers[rank](self.layers, buffer, np.int32(slot))
        # A new array: steps under way may still read the old one.
        self.ranks = self.ranks.copy()
        self.ranks[slot] = adapter.rank
        if self.extras is not None:
            self.extras.load(slot, adapter)

    def pack(self, adapter: Adapter, rank: int) -> np.ndarray:
        """The adapter as one buffer: per layer and group A ``[members, rank, d_in]``, then B
        ``[rank, d_out]`` with the scale folded in (in float32, before the cast)."""
        buffer = np.zeros(self._buffer_size(rank), self.dtype)
        at = 0
        for layer in range(self.num_layers):
            for group in self.groups:
                members, d_out = len(group.members), sum(group.splits)
                a = buffer[at : at + members * rank * group.d_in]
                a = a.reshape(members, rank, group.d_in)
                at += a.size
                b = buffer[at : at + rank * d_out].reshape(rank, d_out)
                at += b.size
                column = 0
                for m, (member, width) in enumerate(zip(group.members, group.splits, strict=True)):
                    pair = adapter.modules.get((layer, member))
                    if pair is not None:
                        a[m, : pair.rank] = pair.a
                        b[: pair.rank, column : column + width] = pair.scaled_b().T
                    column += width
        return buffer

    def _write(
        self, rank: int, layers: list[LayerBank], buffer: jax.Array, slot: jax.Array
    ) -> list[LayerBank]:
        at = 0

        def take(*shape: int) -> jax.Array:
            nonlocal at
            size = int(np.prod(shape))
            part = buffer[at : at + size].reshape(shape)
            at += size
            return part

        written = []
        for layer in layers:
            new: LayerBank = {}
            for group in self.groups:
                a, b = layer[group.name]
                # Members are written one by one unless they lie together: XLA would copy a donated
                # array to reshape it.
                members = len(group.members)
                parts = 1 if rank == self.max_rank else members
                for m in range(parts):
                    part = take(1, members // parts * rank, group.d_in)
                    a = jax.lax.dynamic_update_slice(a, part, (slot, m * self.max_rank, 0))
                part = take(1, rank, sum(group.splits))
                b = jax.lax.dynamic_update_slice(b, part, (slot, 0, 0))
                new[group.name] = LoraPair(a, b)
            written.append(new)
        return written

    def _empty(self, group: Group) -> LoraPair:
        a = (self.num_slots, len(group.members) * self.max_rank, group.d_in)
        b = (self.num_slots, self.max_rank, sum(group.splits))
        return LoraPair(jnp.zeros(a, self.dtype), jnp.zeros(b, self.dtype))

    def _buffer_size(self, rank: int) -> int:
        return self.num_layers * sum(
            rank * (len(group.members) * group.d_in + sum(group.splits)) for group in self.groups
        )


def rank_buckets(max_rank: int) -> tuple[int, ...]:
    """Sizes in which adapters travel: 16, 32, 64, ... and ``max_rank`` itself."""
    sizes, rank = [], 16
    while rank < max_rank:
        sizes.append(rank)
        rank *= 2
    return (*sizes, max_rank)
