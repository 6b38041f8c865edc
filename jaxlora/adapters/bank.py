"""The adapters on the device: stacked arrays, one slot an adapter, written without compiling.

Per layer and group (see :mod:`jaxlora.models.lora`) the bank holds ``a[S, members * r, d_in]`` and
``b[S, r, d_out]``; of several devices each has the columns of its own outputs (qkv, gate_up) or
inputs (o, down), and the other matrix whole. An adapter is *staged* first: packed and brought to
each device as one buffer, on any thread. It then reaches a slot by one donated, jitted call with
the slot as a run-time value, and that call does the arithmetic: it scales, transposes, casts. A
buffer holds what was saved, as it was saved. Buffers come in few sizes, by rank rounded up, so that
a rank-8 adapter does not pay for a rank-64 capacity; rows above an adapter's true rank keep what
they held and are never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.extras import ExtrasBank, StagedExtras
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterCapacityError
from jaxlora.models.lora import Group, LayerBank, LoraPair, groups
from jaxlora.parallel import MESH_AXES, Axes, Devices, bytes_on_each, shard
from kernels_pallas.lora_matmul.op import Implementation

_BUFFER: Axes = ("device", None)
"""Of a packed adapter: what each device writes."""
_FLOAT32 = np.dtype(np.float32)
_MIN_STAGING_BYTES = 256 << 20


class BufferKind(NamedTuple):
    """What a packed buffer is laid out for; each kind has its own program."""

    rank: int
    """Rows and columns that each pair has room for."""
    dtype: str

    def __str__(self) -> str:
        """For logs: ``rank 16 bfloat16``."""
        return f"rank {self.rank} {self.dtype}"


class _Layout(NamedTuple):
    """What the slot write depends on besides its arguments."""

    groups: tuple[Group, ...]
    num_layers: int
    max_rank: int
    dtype: jnp.dtype

    @property
    def num_members(self) -> int:
        """Linears of a layer that are written."""
        return sum(len(group.members) for group in self.groups)


@dataclasses.dataclass(frozen=True, eq=False)
class StagedAdapter:
    """An adapter on the device, ready to be written to any slot."""

    rank: int
    """True rank."""
    kind: BufferKind
    buffer: jax.Array
    extras: StagedExtras | None


class AdapterBank:
    """``num_slots`` adapters of rank up to ``max_rank``, for one model.

    ``modules`` are the short names adapters may target; groups without one are not allocated.
    ``extras`` are kinds of adapters beyond those (:data:`jaxlora.config.LORA_EXTRAS`).
    """

    def __init__(
        self,
        config: ModelConfig,
        devices: Devices,
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
        self._devices = devices
        self.groups: tuple[Group, ...] = tuple(
            group
            for group in groups(shard(config, devices.count))
            if set(group.members) & set(modules)
        )
        """In the widths of one device."""
        self.num_layers = config.num_layers
        self._layout = _Layout(self.groups, config.num_layers, self.max_rank, jnp.dtype(dtype))
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
        self._writers: dict[BufferKind, Callable[..., Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory the bank takes on each device."""
        extras = 0 if self.extras is None else self.extras.num_bytes
        return extras + bytes_on_each(self.layers)

    @property
    def staging_bytes(self) -> int:
        """Memory of each device to be kept free for staged adapters: two of any kind, one of them
        on its way while the other waits for its slot, and more where they are small."""
        sizes = [self._buffer_bytes(kind) for kind in self._kinds()]
        most = max(sizes) * self.num_slots
        extras = 0 if self.extras is None else self.extras.slot_bytes
        return max(min(most, _MIN_STAGING_BYTES), 2 * max(sizes)) + extras

    def programs(self) -> dict[BufferKind, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The slot write for every kind of buffer: function (which donates its first argument, and
        returns its like) and example arguments. The engine compiles them and hands them to
        :meth:`use_programs`."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        sharding = self._devices.sharding(_BUFFER)

        def buffer(kind: BufferKind) -> jax.ShapeDtypeStruct:
            shape = (self._devices.count, self._buffer_size(kind))
            return jax.ShapeDtypeStruct(shape, jnp.dtype(kind.dtype), sharding=sharding)

        return {
            kind: (partial(_write, self._layout, kind.rank), (self.layers, buffer(kind), slot))
            for kind in self._kinds()
        }

    def use_programs(self, writers: dict[BufferKind, Callable[..., Any]]) -> None:
        """Takes the compiled slot writes, by kind of buffer."""
        self._writers = writers

    def stage(self, adapter: Adapter) -> StagedAdapter:
        """Brings an adapter to the device, in one transfer, and waits for it; any thread may.

        Raises AdapterCapacityError if the device's memory does not suffice.
        """
        kind, packed = self.pack(adapter)
        try:
            extras = None if self.extras is None else self.extras.stage(adapter)
            buffer = self._devices.put(packed, _BUFFER)
            staged = StagedAdapter(adapter.rank, kind, buffer, extras)
            jax.block_until_ready((staged.buffer, extras))
        except jax.errors.JaxRuntimeError as error:
            raise AdapterCapacityError(
                f"adapter {adapter.name!r} of {packed.nbytes} bytes could not be brought to the "
                f"device; lower gpu_memory_utilization if memory is short: {error}"
            ) from error
        return staged

    def staged_bytes(self, adapter: Adapter) -> int:
        """Memory an adapter takes on each device while it is staged."""
        extras = 0 if self.extras is None else self.extras.staged_bytes(adapter)
        return self._buffer_bytes(self._kind_of(adapter)) + extras

    def load(self, slot: int, staged: StagedAdapter) -> None:
        """Puts an adapter into a slot: one dispatch, and nothing waits for it."""
        self.layers = self._writers[staged.kind](self.layers, staged.buffer, np.int32(slot))
        # A new array: steps under way may still read the old one.
        self.ranks = self.ranks.copy()
        self.ranks[slot] = staged.rank
        if self.extras is not None:
            self.extras.load(slot, staged.extras)

    def pack(self, adapter: Adapter) -> tuple[BufferKind, np.ndarray]:
        """The adapter as one buffer a device: per layer and group A ``[members, rank, d_in]``, then
        B ``[d_out, rank]`` with the members' rows one below the other; at the end the bits of a
        float32 scale for each layer and member."""
        kind = self._kind_of(adapter)
        count = self._devices.count
        buffers = np.zeros((count, self._buffer_size(kind)), jnp.dtype(kind.dtype))
        scales = np.ones((self.num_layers, self._layout.num_members), np.float32)
        at = 0
        for layer in range(self.num_layers):
            number = 0
            for group in self.groups:
                members, d_out = len(group.members), sum(group.splits)
                a = buffers[:, at : at + members * kind.rank * group.d_in]
                a = a.reshape(count, members, kind.rank, group.d_in)
                at += a[0].size
                b = buffers[:, at : at + d_out * kind.rank].reshape(count, d_out, kind.rank)
                at += b[0].size
                row = 0
                for m, (member, width) in enumerate(zip(group.members, group.splits, strict=True)):
                    pair = adapter.modules.get((layer, member))
                    if pair is not None:
                        below, pair_b = b[:, row : row + width, : pair.rank], pair.b
                        if pair.gain is None:
                            scales[layer, number + m] = pair.scale
                        else:
                            pair_b = pair.scaled_b()
                        for n, part in enumerate(_parts(pair.a, group.in_axis, count, 1)):
                            _copy(part, a[n, m, : pair.rank])
                        for n, part in enumerate(_parts(pair_b, group.out_axis, count, 0)):
                            _copy(part, below[n])
                    row += width
                number += members
        buffers[:, at:] = scales.reshape(-1).view(buffers.dtype)
        return kind, buffers

    def _kinds(self) -> list[BufferKind]:
        dtypes = dict.fromkeys([jnp.dtype(self.dtype).name, _FLOAT32.name])
        return [BufferKind(rank, name) for rank in rank_buckets(self.max_rank) for name in dtypes]

    def _kind_of(self, adapter: Adapter) -> BufferKind:
        rank = next(r for r in rank_buckets(self.max_rank) if r >= adapter.rank)
        # What is neither float32 nor the bank's dtype is sent as float32, which holds it exactly.
        dtype = self.dtype if adapter.packed_dtype == self.dtype else _FLOAT32
        return BufferKind(rank, jnp.dtype(dtype).name)

    def _buffer_bytes(self, kind: BufferKind) -> int:
        return self._buffer_size(kind) * jnp.dtype(kind.dtype).itemsize

    def _empty(self, group: Group) -> LoraPair:
        a = (self.num_slots, len(group.members) * self.max_rank, group.d_in)
        b = (self.num_slots, self.max_rank, sum(group.splits))
        return LoraPair(
            self._devices.zeros(a, self.dtype, (None, None, group.in_axis)),
            self._devices.zeros(b, self.dtype, (None, None, group.out_axis)),
        )

    def _buffer_size(self, kind: BufferKind) -> int:
        pairs = sum(len(group.members) * group.d_in + sum(group.splits) for group in self.groups)
        scales = self._layout.num_members * (4 // jnp.dtype(kind.dtype).itemsize)
        return self.num_layers * (kind.rank * pairs + scales)


def _write(
    layout: _Layout, rank: int, layers: list[LayerBank], buffers: jax.Array, slot: jax.Array
) -> list[LayerBank]:
    (buffer,) = buffers
    shape, words = (layout.num_layers, layout.num_members), 4 // buffer.dtype.itemsize
    bits = buffer[buffer.size - words * shape[0] * shape[1] :]
    if words > 1:
        bits = jax.lax.bitcast_convert_type(bits.reshape(*shape, words), jnp.float32)
    scales = bits.reshape(shape)
    at = 0

    def take(*shape: int) -> jax.Array:
        nonlocal at
        size = int(np.prod(shape))
        part = buffer[at : at + size].reshape(shape)
        at += size
        return part

    written = []
    for number, layer in enumerate(layers):
        scale_of = iter(scales[number])
        new: LayerBank = {}
        for group in layout.groups:
            a, b = layer[group.name]
            # Members are written one by one unless they lie together: XLA would copy a donated
            # array to reshape it.
            members = len(group.members)
            parts = 1 if rank == layout.max_rank else members
            for m in range(parts):
                part = take(1, members // parts * rank, group.d_in).astype(layout.dtype)
                a = jax.lax.dynamic_update_slice(a, part, (slot, m * layout.max_rank, 0))
            # In float32 before it is rounded.
            scale = jnp.concatenate([jnp.full(width, next(scale_of)) for width in group.splits])
            part = take(sum(group.splits), rank).astype(jnp.float32) * scale[:, None]
            part = part.astype(layout.dtype).T[None]
            b = jax.lax.dynamic_update_slice(b, part, (slot, 0, 0))
            new[group.name] = LoraPair(a, b)
        written.append(new)
    return written


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """Assigns, many times faster than numpy does where both are bfloat16."""
    if source.dtype == target.dtype:
        bits = np.dtype(f"u{source.dtype.itemsize}")
        source, target = source.view(bits), target.view(bits)
    target[...] = source


def _parts(matrix: np.ndarray, logical_axis: str | None, count: int, axis: int) -> list[np.ndarray]:
    """What each of ``count`` devices has of a matrix, whose ``axis`` this logical one is."""
    split = logical_axis is not None and MESH_AXES[logical_axis] is not None
    return np.split(matrix, count, axis) if split else [matrix] * count


def rank_buckets(max_rank: int) -> tuple[int, ...]:
    """Sizes in which adapters travel: 16, 32, 64, ... and ``max_rank`` itself."""
    sizes, rank = [], 16
    while rank < max_rank:
        sizes.append(rank)
        rank *= 2
    return (*sizes, max_rank)
