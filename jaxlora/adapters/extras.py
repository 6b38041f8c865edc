"""The bank's arrays for what few adapters have: vectors, LoRA on embedding and head, matrices.

They exist for what the engine was started for (EngineArgs.lora_extras). Only an adapter with extras
is staged and written here, all of them at once; what a slot held before an adapter without stays
and is not read (:mod:`jaxlora.models.extras`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlora.adapters.adapter import NO_LAYER, Adapter, target_shape
from jaxlora.config import ModelConfig
from jaxlora.models.extras import Extras, Vectors, VocabularyPair
from jaxlora.models.lora import Group

_NUM_ROWS = 64
"""Rows of a matrix that are written at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class StagedExtras:
    """One adapter's extras on the device."""

    values: Extras
    matrices: dict[str, jax.Array]
    """By target, ``[vocab_size, hidden_size]``."""
    rows: dict[str, list[tuple[jax.Array, jax.Array]]]
    """By target, ids and rows of the base's matrix that are replaced, a few at a time."""


jax.tree_util.register_dataclass(StagedExtras)


class ExtrasBank:
    """``num_slots`` adapters' extras of the given kinds; ranks are padded to ``max_rank``."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        kinds: Collection[str],
        groups: Sequence[Group],
        num_slots: int,
        max_rank: int,
        dtype: jnp.dtype,
    ) -> None:
        self.kinds = frozenset(kinds)
        """Some of :data:`jaxlora.engine_args.LORA_EXTRAS`."""
        self.used = np.zeros(num_slots, bool)
        """Which slots hold an adapter with extras."""
        names = {"saved_embed_tokens": "embed", "saved_lm_head": "lm_head"}
        self._saved = tuple(target for kind, target in names.items() if kind in self.kinds)
        self._config = config
        self._groups = groups
        self._max_rank = max_rank
        self._dtype = dtype
        self._slot = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.pack(None)
        )
        self._arrays: Extras = jax.tree.map(
            lambda leaf: jnp.zeros((num_slots, *leaf.shape), leaf.dtype), self._slot
        )
        self._matrices = {
            target: jnp.zeros((num_slots, config.vocab_size, config.hidden_size), dtype)
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
        """Device memory of the arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arrays))

    def programs(self) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
        """The slot writes by name: function, which donates its first argument, and example
        arguments."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        programs: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]
        programs = {"extras": (_write, (self._arrays, self._slot, slot))}
        for bank in list(self._matrices.values())[:1]:
            matrix = jax.ShapeDtypeStruct(bank.shape[1:], bank.dtype)
            programs["matrix"] = (_put, (bank, matrix, slot))
            ids = jax.ShapeDtypeStruct((_NUM_ROWS,), np.int32)
            rows = jax.ShapeDtypeStruct((_NUM_ROWS, bank.shape[2]), bank.dtype)
            programs["rows"] = (_put_rows, (bank, ids, rows, slot))
        return programs

    def use_programs(self, writers: dict[str, Callable[..., Any]]) -> None:
        """Takes the compiled slot writes, by name."""
        self._writers = writers

    def use_base(self, matrix: Callable[[str], jax.Array]) -> None:
        """Takes what gives the base's "embed" or "lm_head" on the device."""
        self._base = matrix

    @property
    def slot_bytes(self) -> int:
        """Device memory of one slot."""
        leaves = jax.tree.leaves(self.arrays)
        return sum(leaf.nbytes // leaf.shape[0] for leaf in leaves)

    def stage(self, adapter: Adapter) -> StagedExtras | None:
        """Begins to bring an adapter's extras to the device; None if it has none."""
        if not adapter.extras:
            return None
        # Matrices apart, because they are large and most adapters with extras have none.
        return StagedExtras(
            values=jax.device_put(self.pack(adapter)),
            matrices={
                target: jax.device_put(matrix.astype(self._dtype))
                for target, matrix in adapter.matrices.items()
            },
            rows={
                target: [
                    jax.device_put(self._some_rows(ids, rows, at))
                    for at in range(0, len(ids), _NUM_ROWS)
                ]
                for target, (ids, rows) in adapter.rows.items()
            },
        )

    def staged_bytes(self, adapter: Adapter) -> int:
        """Device memory an adapter's extras take while they are staged, at most."""
        return self.slot_bytes if adapter.extras else 0

    def load(self, slot: int, staged: StagedExtras | None) -> None:
        """Notes whether the slot's adapter has extras, and writes them if so."""
        # A new array: steps under way may still read the old one.
        self.used = self.used.copy()
        self.used[slot] = staged is not None
        if staged is None:
            return
        self._arrays = self._writers["extras"](self._arrays, staged.values, np.int32(slot))
        for target, matrix in staged.matrices.items():
            bank = self._matrices[target]
            self._matrices[target] = self._writers["matrix"](bank, matrix, np.int32(slot))
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

    def pack(self, adapter: Adapter | None) -> Extras:
        """One slot's values, without the axis of slots: neutral where there is no extra."""
        layers = [
            {
                group.name: self._vectors(
                    adapter, [(layer, member) for member in group.members], group.splits
                )
                for group in self._groups
            }
            for layer in range(self._config.num_layers)
        ]
        return Extras(
            layers=layers if self.kinds & {"dora", "bias"} else [],
            embed=self._pair(adapter, "embed") if "embed_tokens" in self.kinds else None,
            lm_head=self._pair(adapter, "lm_head") if "lm_head" in self.kinds else None,
            has_matrix={
                target: np.asarray(adapter is not None and target in adapter.replaced)  # type: ignore[misc]
                for target in self._saved
            },
            matrices={},
        )

    def _vectors(
        self, adapter: Adapter | None, keys: list[tuple[int, str]], widths: Sequence[int]
    ) -> Vectors:
        gain = np.ones(sum(widths), np.float32) if "dora" in self.kinds else None
        shift = np.zeros(sum(widths), np.float32) if "bias" in self.kinds else None
        column = 0
        for key, width in zip(keys, widths, strict=True):
            pair = adapter.modules.get(key) if adapter else None
            own = slice(column, column + width)
            if pair is not None and pair.magnitude is not None:
                assert gain is not None
                assert pair.gain is not None, "nobody computed the gains"
                gain[own] = pair.gain
            if pair is not None and pair.bias is not None:
                assert shift is not None
                shift[own] = pair.bias.astype(np.float32) * np.float32(pair.scale)
            column += width
        return Vectors(gain, shift)  # type: ignore[arg-type]

    def _pair(self, adapter: Adapter | None, target: str) -> VocabularyPair:
        d_in, d_out = target_shape(self._config, target)
        key = (NO_LAYER, target)
        a = np.zeros((self._max_rank, d_in), self._dtype)
        b = np.zeros((self._max_rank, d_out), self._dtype)
        pair = adapter.modules.get(key) if adapter else None
        if pair is not None:
            a[: pair.rank] = pair.a
            b[: pair.rank] = pair.scaled_b().T
        if target == "embed":
            a = np.ascontiguousarray(a.T)
        return VocabularyPair(a, b, self._vectors(adapter, [key], [d_out]))  # type: ignore[arg-type]


def _write(arrays: Extras, values: Extras, slot: jax.Array) -> Extras:
    return jax.tree.map(lambda array, value: _put(array, value, slot), arrays, values)


def _put(array: jax.Array, value: jax.Array, slot: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(array, value, slot, 0)


def _put_rows(matrices: jax.Array, ids: jax.Array, rows: jax.Array, slot: jax.Array) -> jax.Array:
    return matrices.at[slot, ids].set(rows, mode="drop")
