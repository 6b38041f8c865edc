"""The adapters on the device: stacked arrays, one slot an adapter, written without compiling.

Per group (see :mod:`jaxlora.models.lora`) the bank holds ``a[L, S, members * r, d_in]`` and
``b[L, S, r, d_out]``: of all L layers where the kernel takes them so, since what a call costs the
host is its arrays, and else layer by layer with an L of 1. Of several devices each has the columns
of its own outputs (qkv, gate_up) or inputs (o, down), and the other matrix whole.

An adapter is *staged* first: brought to each device as one buffer, on any thread, in pieces that
steps can go between. It then reaches a slot by one donated, jitted call with the slot as a run-time
value, and that call does the arithmetic: it finds, scales, transposes, casts. A buffer holds what
was saved, as it was saved; the file's own block of memory, where that has the size. Buffers come in
few sizes, by rank rounded up, so that a rank-8 adapter does not pay for a rank-64 capacity; rows
above that, or the next multiple of 16, keep what they held and are never read.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora.adapters.adapter import Adapter
from jaxlora.adapters.extras import ExtrasBank, StagedExtras
from jaxlora.adapters.host_blocks import Allocate, ordinary_memory
from jaxlora.adapters.pieces import assign, bits, copy_in_pieces
from jaxlora.adapters.transfer import Transfer
from jaxlora.config import ModelConfig
from jaxlora.errors import AdapterCapacityError, ConfigError
from jaxlora.models.lora import Bank, Group, groups, num_layers
from jaxlora.parallel import Devices, bytes_on_each, shard
from kernels_pallas.lora_matmul.op import Implementation
from kernels_pallas.slot_write import reference
from kernels_pallas.slot_write.op import ABSENT, TILE, Pair
from kernels_pallas.slot_write.op import Implementation as SlotWrite

_FLOAT32 = np.dtype(np.float32)
_MIN_STAGING_BYTES = 256 << 20
_PIECE_BYTES = 16 << 20
"""A GPU takes them in 0.4 ms."""
_MAX_PLACE = np.iinfo(np.int32).max


class BufferKind(NamedTuple):
    """What a packed buffer is laid out for; each kind has its own program."""

    rank: int
    """Rows and columns that each pair has room for."""
    dtype: str

    def __str__(self) -> str:
        """For logs: ``rank 16 bfloat16``."""
        return f"rank {self.rank} {self.dtype}"


class Packed(NamedTuple):
    """An adapter as a slot write takes it, on the host or on the device."""

    buffer: Any
    """``[devices * size]`` on the host, and there what a :class:`Transfer` makes of it."""
    places: Any
    """``[layers, members, 2]``, int32: where in a buffer a member's A ``[rank, d_in]`` begins, and
    its B ``[d_out, rank]``; ABSENT without one."""
    scales: Any
    """``[layers, members]``, float32."""


class _Table(NamedTuple):
    """What a slot write is told of an adapter beside its weights, as in :class:`Packed`."""

    scales: np.ndarray
    places: np.ndarray | None
    """None if the adapter must be packed matrix by matrix."""


@dataclasses.dataclass(frozen=True, eq=False)
class StagedAdapter:
    """An adapter on the device, ready to be written to any slot."""

    rank: int
    """True rank."""
    kind: BufferKind
    packed: Packed
    extras: StagedExtras | None


class AdapterBank:
    """``num_slots`` adapters of rank up to ``max_rank``, for one model.

    ``modules`` are the short names adapters may target; groups without one are not allocated.
    ``extras`` are kinds of adapters beyond those (:data:`jaxlora.engine_args.LORA_EXTRAS`).
    ``allocate`` gives the memory that adapters are packed in; they are sent in pieces of at most
    ``piece_bytes``.
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
        writer: SlotWrite = reference.IMPLEMENTATION,
        extras: Collection[str] = (),
        allocate: Allocate = ordinary_memory,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        self.kernel = kernel
        """What multiplies with the bank; steps are cut into blocks as it wants them."""
        self._writer = writer
        self._allocate = allocate
        self.num_slots = num_slots
        self.max_rank = -(-max_rank // TILE) * TILE
        """Rows each member has in a slot."""
        self.dtype = dtype
        self._devices = devices
        self.groups: tuple[Group, ...] = tuple(
            group
            for group in groups(shard(config, devices.count))
            if set(group.members) & set(modules)
        )
        """In the widths of one device."""
        members = (member for group in self.groups for member in group.members)
        self._numbers = {member: number for number, member in enumerate(members)}
        self.num_layers = config.num_layers
        size = self._buffer_size(self.max_rank)
        if size > _MAX_PLACE:
            raise ConfigError(
                f"an adapter of max_lora_rank={max_rank} has {size} elements on each device, more "
                f"than the {_MAX_PLACE} that a slot write can count; lower max_lora_rank, name "
                "fewer lora_target_modules, or raise tensor_parallel_size"
            )
        self._transfers = {
            BufferKind(rank, name): Transfer(
                devices, self._buffer_size(rank), 1, jnp.dtype(name), piece_bytes
            )
            for rank in rank_buckets(self.max_rank)
            for name in dict.fromkeys([jnp.dtype(dtype).name, _FLOAT32.name])
        }
        parts = 1 if kernel.stacked and self.groups else self.num_layers
        self.arrays: list[Bank] = [
            {group.name: self._empty(group, self.num_layers // parts) for group in self.groups}
            for _ in range(parts)
        ]
        self._slots = [devices.put(np.int32(slot)) for slot in range(num_slots)]
        """Their numbers, on the device: a write sends nothing."""
        self.ranks = np.zeros(num_slots, np.int32)
        """True rank of each slot's adapter, 0 for an empty slot."""
        self.extras: ExtrasBank | None = None
        if extras:
            self.extras = ExtrasBank(
                config,
                devices,
                kinds=extras,
                groups=self.groups,
                num_slots=num_slots,
                max_rank=self.max_rank,
                dtype=dtype,
                piece_bytes=piece_bytes,
            )
        """What the engine was started for with EngineArgs.lora_extras."""
        self._writers: dict[BufferKind, Callable[..., Any]] = {}
        self._tables: weakref.WeakKeyDictionary[object, _Table] = weakref.WeakKeyDictionary()
        """By what adapters that lie alike have in common."""

    @property
    def num_bytes(self) -> int:
        """Memory the bank takes on each device."""
        extras = 0 if self.extras is None else self.extras.num_bytes
        return extras + bytes_on_each(self.arrays)

    @property
    def staging_bytes(self) -> int:
        """Memory of each device to be kept free for staged adapters: two of any kind, one of them
        on its way while the other waits for its slot, and more where they are small."""
        sizes = [transfer.num_bytes for transfer in self._transfers.values()]
        most = max(sizes) * self.num_slots
        extras = 0 if self.extras is None else self.extras.slot_bytes
        return max(min(most, _MIN_STAGING_BYTES), 2 * max(sizes)) + extras

    @property
    def reserved_bytes(self) -> int:
        """Memory of each device to be kept free in all: for what is staged, and for a write of what
        came in pieces, which it puts together."""
        cut = [each.num_bytes for each in self._transfers.values() if each.num_pieces > 1]
        return self.staging_bytes + max(cut, default=0)

    @property
    def packed_bytes(self) -> int:
        """Host memory for the largest adapter without extras, in the bank's dtype."""
        size = self._devices.count * self._buffer_size(self.max_rank)
        return size * jnp.dtype(self.dtype).itemsize

    def programs(self) -> dict[BufferKind, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The slot write for every kind of buffer: function (which donates its first argument, and
        returns its like) and example arguments. The engine compiles them and hands them to
        :meth:`use_programs`."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        members = (self.num_layers, self._num_members)
        places = jax.ShapeDtypeStruct((*members, 2), np.int32, sharding=self._devices.sharding())
        scales = jax.ShapeDtypeStruct(members, np.float32, sharding=self._devices.sharding())
        write = partial(_write, self._writer.function, self.groups)
        return {
            kind: (
                partial(write, kind.rank),
                (self.arrays, Packed(transfer.shapes(), places, scales), slot),
            )
            for kind, transfer in self._transfers.items()
        }

    def use_programs(self, writers: dict[BufferKind, Callable[..., Any]]) -> None:
        """Takes the compiled slot writes, by kind of buffer."""
        self._writers = writers

    def stage(self, adapter: Adapter) -> StagedAdapter:
        """Brings an adapter to the device, all its matrices in one transfer or a few, and waits for
        it; any thread may. Also if that fails half way JAX holds the memory it still reads.

        Raises AdapterCapacityError if the device's memory does not suffice.
        """
        kind, packed = self.pack(adapter)
        try:
            extras = None if self.extras is None else self.extras.stage(adapter)
            buffer = self._transfers[kind].send(packed.buffer)
            places, scales = self._devices.put((packed.places, packed.scales))
            staged = StagedAdapter(adapter.rank, kind, Packed(buffer, places, scales), extras)
            jax.block_until_ready((staged.packed, extras))
        except jax.errors.JaxRuntimeError as error:
            raise AdapterCapacityError(
                f"adapter {adapter.name!r} of {packed.buffer.nbytes} bytes could not be brought to "
                f"the device; lower gpu_memory_utilization if memory is short: {error}"
            ) from error
        return staged

    def staged_bytes(self, adapter: Adapter) -> int:
        """Memory an adapter takes on each device while it is staged."""
        extras = 0 if self.extras is None else self.extras.staged_bytes(adapter)
        return self._transfers[self._kind_of(adapter)].num_bytes + extras

    def load(self, slot: int, staged: StagedAdapter) -> None:
        """Puts an adapter into a slot: one dispatch, nothing is sent, and nothing waits for it."""
        self.arrays = self._writers[staged.kind](self.arrays, staged.packed, self._slots[slot])
        # A new array: steps under way may still read the old one.
        self.ranks = self.ranks.copy()
        self.ranks[slot] = staged.rank
        if self.extras is not None:
            self.extras.load(slot, staged.extras)

    def pack(self, adapter: Adapter) -> tuple[BufferKind, Packed]:
        """The adapter as one buffer a device, on the host."""
        kind, alike = self._kind_of(adapter), adapter.alike
        table = None if alike is None else self._tables.get(alike)
        if table is None:
            table = _Table(self._scales(adapter), self._places_as_saved(kind, adapter))
            for array in table:
                if array is not None:
                    array.flags.writeable = False
            if alike is not None:
                self._tables[alike] = table
        scales, places = table
        if places is None:
            buffer, places = self._packed(kind, adapter)
        else:
            buffer = self._as_saved(kind, adapter.blocks[0])
        return kind, Packed(buffer, places, scales)

    def _scales(self, adapter: Adapter) -> np.ndarray:
        scales = np.ones((self.num_layers, self._num_members), np.float32)
        for (layer, target), pair in adapter.modules.items():
            # A gain goes into B itself.
            if target in self._numbers and pair.gain is None:
                scales[layer, self._numbers[target]] = pair.scale
        return scales

    def _places_as_saved(self, kind: BufferKind, adapter: Adapter) -> np.ndarray | None:
        """Where the matrices are in the block an adapter lies in, if they may lie so in its kind of
        buffer.

        What packing matrix by matrix costs is less the copying than Python's lock, which each of
        hundreds of copies gives back and takes again.
        """
        if self._devices.count > 1 or len(adapter.blocks) != 1:
            return None
        if adapter.blocks[0].size > self._buffer_size(kind.rank):
            return None
        places = np.full((self.num_layers, self._num_members, 2), ABSENT, np.int32)
        for (layer, target), pair in adapter.modules.items():
            number = self._numbers.get(target)
            if number is None or pair.at is None or pair.gain is not None:
                return None
            if pair.rank != kind.rank:
                return None
            places[layer, number] = pair.at
        unit = max(1, self._writer.alignment // jnp.dtype(kind.dtype).itemsize)
        return None if (places[places != ABSENT] % unit).any() else places

    def _as_saved(self, kind: BufferKind, block: np.ndarray) -> np.ndarray:
        """A block as a buffer: itself, or a copy in few pieces."""
        size, dtype = self._buffer_size(kind.rank), jnp.dtype(kind.dtype)
        if block.size == size and block.dtype == dtype:
            return block
        whole = self._allocate(size * dtype.itemsize).view(dtype)
        copy_in_pieces(block, whole[: block.size])
        return whole

    def _packed(self, kind: BufferKind, adapter: Adapter) -> tuple[np.ndarray, np.ndarray]:
        """Matrix by matrix: A of each layer and member, then B, with zeros above their ranks. Where
        the adapter has none lies whatever does: it is not read."""
        count, size = self._devices.count, self._buffer_size(kind.rank)
        dtype = jnp.dtype(kind.dtype)
        buffers = self._allocate(count * size * dtype.itemsize).view(dtype).reshape(count, size)
        places = np.full((self.num_layers, self._num_members, 2), ABSENT, np.int32)
        at = 0
        for layer in range(self.num_layers):
            for group in self.groups:
                for member, width in zip(group.members, group.splits, strict=True):
                    begin_b = at + kind.rank * group.d_in
                    end = begin_b + width * kind.rank
                    pair = adapter.modules.get((layer, member))
                    if pair is not None:
                        places[layer, self._numbers[member]] = at, begin_b
                        a = buffers[:, at:begin_b].reshape(count, kind.rank, group.d_in)
                        b = buffers[:, begin_b:end].reshape(count, width, kind.rank)
                        pair_b = pair.b if pair.gain is None else pair.scaled_b()
                        for n, part in enumerate(self._parts(pair.a, group.in_axis, 1)):
                            assign(part, a[n, : pair.rank])
                        for n, part in enumerate(self._parts(pair_b, group.out_axis, 0)):
                            assign(part, b[n, :, : pair.rank])
                        bits(a[:, pair.rank :])[...] = 0
                        bits(b[:, :, pair.rank :])[...] = 0
                    at = end
        return buffers.reshape(-1), places

    def _parts(self, matrix: np.ndarray, logical_axis: str | None, axis: int) -> list[np.ndarray]:
        """What each device has of a matrix, whose ``axis`` this logical one is."""
        count = self._devices.count
        split = self._devices.num_parts(logical_axis) > 1
        return np.split(matrix, count, axis) if split else [matrix] * count

    def _kind_of(self, adapter: Adapter) -> BufferKind:
        rank = next(r for r in rank_buckets(self.max_rank) if r >= adapter.rank)
        # What is neither float32 nor the bank's dtype is sent as float32, which holds it exactly.
        dtype = self.dtype if adapter.packed_dtype == self.dtype else _FLOAT32
        return BufferKind(rank, jnp.dtype(dtype).name)

    @property
    def _num_members(self) -> int:
        return len(self._numbers)

    def _empty(self, group: Group, num_layers: int) -> Pair:
        a = (num_layers, self.num_slots, len(group.members) * self.max_rank, group.d_in)
        b = (num_layers, self.num_slots, self.max_rank, sum(group.splits))
        return Pair(
            self._devices.zeros(a, self.dtype, (None, None, None, group.in_axis)),
            self._devices.zeros(b, self.dtype, (None, None, None, group.out_axis)),
        )

    def _buffer_size(self, rank: int) -> int:
        pairs = sum(len(group.members) * group.d_in + sum(group.splits) for group in self.groups)
        return self.num_layers * rank * pairs


def _write(
    write: Callable[..., list[Pair]],
    groups: tuple[Group, ...],
    rank: int,
    arrays: list[Bank],
    packed: Packed,
    slot: jax.Array,
) -> list[Bank]:
    if not groups:
        return arrays
    splits = [group.splits for group in groups]
    buffer = jnp.concatenate(packed.buffer)
    written, first = [], 0
    for part in arrays:
        layers = slice(first, first := first + num_layers(part))
        pairs = [part[group.name] for group in groups]
        places, scales = packed.places[layers], packed.scales[layers]
        new = write(pairs, buffer, places, scales, slot, splits=splits, rank=rank)
        written.append({group.name: pair for group, pair in zip(groups, new, strict=True)})
    return written


def rank_buckets(max_rank: int) -> tuple[int, ...]:
    """Sizes in which adapters travel: 8, 16, 32, 64, ... and ``max_rank`` itself."""
    sizes, rank = [], 8
    while rank < max_rank:
        sizes.append(rank)
        rank *= 2
    return (*sizes, max_rank)
