"""The bank's arrays for what few adapters have: vectors, LoRA on embedding and head, matrices.

They exist for what the engine was started for (EngineArgs.lora_extras). Only an adapter with extras
is staged and written here, all of them at once; what a slot held before an adapter without stays
and is not read (:mod:`jaxlora.models.extras`). Over several devices they lie as the base's weights
do, device by device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora.adapters.adapter import NO_LAYER, Adapter
from jaxlora.adapters.transfer import Transfer
from jaxlora.config import ModelConfig
from jaxlora.models.extras import Extras, Vectors, VocabularyPair
from jaxlora.models.lora import Group, vocabulary_groups
from jaxlora.parallel import TENSOR, Axes, Devices, ShapesOnly, bytes_on_each, own_ids, shard

_NUM_ROWS = 64
"""Rows of a matrix that are written at once."""
_MATRIX: Axes = ("vocab", "hidden")


@dataclasses.dataclass(frozen=True, eq=False)
class StagedExtras:
    """One adapter's extras on the device."""

    values: Extras
    matrices: dict[str, tuple[jax.Array, ...]]
    """By target, what follows one another in each device's part of a matrix: some rows, flat."""
    rows: dict[str, list[tuple[jax.Array, jax.Array]]]
    """By target, ids and rows of the base's matrix that are replaced, a few at a time."""


jax.tree_util.register_dataclass(StagedExtras)


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """An array of one slot, on the host."""

    array: np.ndarray
    """Where it is split, the devices' parts one after the other."""
    axes: Axes
    """Logical ones, which say where that is."""


class ExtrasBank:
    """``num_slots`` adapters' extras of the given kinds; ranks are padded to ``max_rank``.
    ``groups`` are those of the layers, in the widths of one device. Matrices are sent in pieces of
    at most ``piece_bytes``."""

    def __init__(
        self,
        config: ModelConfig,
        devices: Devices,
        *,
        kinds: Collection[str],
        groups: Sequence[Group],
        num_slots: int,
        max_rank: int,
        dtype: jnp.dtype,
        piece_bytes: int,
    ) -> None:
        self.kinds = frozenset(kinds)
        """Some of :data:`jaxlora.engine_args.LORA_EXTRAS`."""
        self.used = np.zeros(num_slots, bool)
        """Which slots hold an adapter with extras."""
        names = {"saved_embed_tokens": "embed", "saved_lm_head": "lm_head"}
        self._saved = tuple(target for kind, target in names.items() if kind in self.kinds)
        self._config = config
        self._devices = devices
        self._groups = groups
        self._max_rank = max_rank
        self._dtype = dtype
        local = shard(config, devices.count)
        self._embed, self._lm_head = vocabulary_groups(local)
        shapes = ShapesOnly(devices.mesh)
        neutral = self._values(None)
        self._slot = jax.tree.map(lambda value: shapes.put(value.array, value.axes), neutral)
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self._slot)
        matrix = (local.vocab_size, local.hidden_size)
        self._matrix = shapes.zeros(matrix, dtype, _MATRIX)
        self._transfer = Transfer(devices, *matrix, dtype, piece_bytes)
        """Of a matrix."""

        def all_slots(value: _Value) -> Any:
            part = devices.sharding(value.axes).shard_shape(value.array.shape)
            return devices.zeros((num_slots, *part), value.array.dtype, (None, *value.axes))

        self._arrays: Extras = jax.tree.map(all_slots, neutral)
        self._matrices = {
            target: devices.zeros((num_slots, *matrix), dtype, (None, *_MATRIX))
            for target in self._saved
        }
        self._writers: dict[str, Callable[..., Any]] = {}
        self._base: Callable[[str], jax.Array] | None = None

    @property
    def arrays(self) -> Extras:
        """What a forward pass reads."""
        return self._arrays._replace(matrices=self._matrices)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays on each device."""
        return bytes_on_each(self.arrays)

    def programs(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The slot writes by name: function, which donates its first argument, and example
        arguments."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
        programs = {"extras": (_write, (self._arrays, self._slot, slot))}
        for bank in list(self._matrices.values())[:1]:
            programs["matrix"] = (_put, (bank, self._matrix, slot))
            ids = jax.ShapeDtypeStruct((_NUM_ROWS,), np.int32)
            rows = jax.ShapeDtypeStruct((_NUM_ROWS, bank.shape[2]), bank.dtype)
            programs["rows"] = (_put_rows, (bank, ids, rows, slot))
            programs["pieces"] = (_put_pieces, (bank, self._transfer.shapes(), slot))
        return programs

    def use_programs(self, writers: dict[str, Callable[..., Any]]) -> None:
        """Takes the compiled slot writes, by name."""
        self._writers = writers

    def use_base(self, matrix: Callable[[str], jax.Array]) -> None:
        """Takes what gives the base's "embed" or "lm_head" on the device."""
        self._base = matrix

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot on each device."""
        return self.num_bytes // len(self.used)

    def stage(self, adapter: Adapter) -> StagedExtras | None:
        """Begins to bring an adapter's extras to the device, and waits for its matrices; None if it
        has none."""
        if not adapter.extras:
            return None
        # Matrices apart, because they are large and most adapters with extras have none.
        values = jax.tree.map(lambda value: value.array, self._values(adapter))
        return StagedExtras(
            values=jax.device_put(values, self._shardings),
            matrices={
                target: self._transfer.send(matrix) for target, matrix in adapter.matrices.items()
            },
            rows={
                target: [
                    self._devices.put(self._some_rows(ids, rows, at))
                    for at in range(0, len(ids), _NUM_ROWS)
                ]
                for target, (ids, rows) in adapter.rows.items()
            },
        )

    def staged_bytes(self, adapter: Adapter) -> int:
        """Memory of each device an adapter's extras take while they are staged, at most."""
        return self.slot_bytes if adapter.extras else 0

    def load(self, slot: int, staged: StagedExtras | None) -> None:
        """Notes whether the slot's adapter has extras, and writes them if so."""
        # A new array: steps under way may still read the old one.
        self.used = self.used.copy()
        self.used[slot] = staged is not None
        if staged is None:
            return
        self._arrays = self._writers["extras"](self._arrays, staged.values, np.int32(slot))
        for target, pieces in staged.matrices.items():
            bank = self._matrices[target]
            self._matrices[target] = self._writers["pieces"](bank, pieces, np.int32(slot))
        for target, parts in staged.rows.items():
            assert self._base is not None
            bank = self._writers["matrix"](
                self._matrices[target], self._base(target), np.int32(slot)
            )
            for ids, rows in parts:
                bank = self._writers["rows"](bank, ids, rows, np.int32(slot))
            self._matrices[target] = bank

    def _some_rows(
        self, ids: Sequence[int], rows: np.ndarray, at: int
    ) -> tuple[np.ndarray, np.ndarray]:
        # Ids beyond the vocabulary are padding.
        some = np.full(_NUM_ROWS, self._config.vocab_size, np.int32)
        values = np.zeros((_NUM_ROWS, rows.shape[1]), self._dtype)
        part = ids[at : at + _NUM_ROWS]
        some[: len(part)], values[: len(part)] = part, rows[at : at + _NUM_ROWS]
        return some, values

    def _values(self, adapter: Adapter | None) -> Extras:
        """One slot's, without the axis of slots: neutral where there is no extra."""
        layers = [
            {group.name: self._vectors(adapter, layer, group) for group in self._groups}
            for layer in range(self._config.num_layers)
        ]
        has_matrix = {
            target: _Value(np.asarray(adapter is not None and target in adapter.replaced), ())
            for target in self._saved
        }
        return Extras(
            layers=layers if self.kinds & {"dora", "bias"} else [],
            embed=self._pair(adapter, self._embed) if "embed_tokens" in self.kinds else None,
            lm_head=self._pair(adapter, self._lm_head) if "lm_head" in self.kinds else None,
            has_matrix=has_matrix,  # type: ignore[arg-type]
            matrices={},
        )

    def _vectors(self, adapter: Adapter | None, layer: int, group: Group) -> Vectors:
        count, parts = self._devices.count, self._devices.num_parts(group.out_axis)
        gain = np.ones((parts, sum(group.splits)), np.float32)
        # Where devices' outputs are summed, only one of them may add it.
        shift = np.zeros((count, sum(group.splits)), np.float32)
        column = 0
        for member, width in zip(group.members, group.splits, strict=True):
            pair = adapter.modules.get((layer, member)) if adapter else None
            own = slice(column, column + width)
            if pair is not None and pair.magnitude is not None:
                assert pair.gain is not None, "nobody computed the gains"
                gain[:, own] = pair.gain.reshape(parts, width)
            if pair is not None and pair.bias is not None:
                scaled = pair.bias.astype(np.float32) * np.float32(pair.scale)
                shift[:parts, own] = scaled.reshape(parts, width)
            column += width
        return Vectors(
            _Value(gain.reshape(-1), (group.out_axis,)) if "dora" in self.kinds else None,  # type: ignore[arg-type]
            _Value(shift.reshape(-1), ("device",)) if "bias" in self.kinds else None,  # type: ignore[arg-type]
        )

    def _pair(self, adapter: Adapter | None, group: Group) -> VocabularyPair:
        a_axes: Axes = (None, group.in_axis)
        b_axes: Axes = (None, group.out_axis)
        whole = self._devices.whole_shape
        a = np.zeros(whole((self._max_rank, group.d_in), a_axes), self._dtype)
        b = np.zeros(whole((self._max_rank, sum(group.splits)), b_axes), self._dtype)
        pair = adapter.modules.get((NO_LAYER, group.name)) if adapter else None
        if pair is not None:
            a[: pair.rank] = pair.a
            b[: pair.rank] = pair.scaled_b().T
        if group is self._embed:
            a, a_axes = np.ascontiguousarray(a.T), a_axes[::-1]
        vectors = self._vectors(adapter, NO_LAYER, group)
        return VocabularyPair(_Value(a, a_axes), _Value(b, b_axes), vectors)  # type: ignore[arg-type]


def _write(arrays: Extras, values: Extras, slot: jax.Array) -> Extras:
    return jax.tree.map(lambda array, value: _put(array, value, slot), arrays, values)


def _put(array: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, value, slot, 0)


def _put_pieces(matrices: jax.Array, pieces: tuple[jax.Array, ...], slot: jax.Array) -> jax.Array:
    start = 0
    for piece in pieces:
        rows = piece.reshape(1, -1, matrices.shape[2])
        at = (slot, jnp.int32(start), jnp.int32(0))
        matrices = lax.dynamic_update_slice(matrices, rows, at)
        start += rows.shape[1]
    return matrices


def _put_rows(matrices: jax.Array, ids: jax.Array, rows: jax.Array, slot: jax.Array) -> jax.Array:
    own = own_ids(ids, matrices.shape[1], lax.axis_size(TENSOR))
    return matrices.at[slot, own].set(rows, mode="drop", wrap_negative_indices=False)
