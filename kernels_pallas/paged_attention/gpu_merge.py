"""What the parts of a context found, put together on NVIDIA Hopper by the last part's thread block.

Each writes its output and the base-2 logarithm of its sum of exponentials, the level, to a slot of
its own in device memory, and all but the last count up. The last one waits for them, and weighs
each output by two to the power of its level. It has the highest index, so the others run already.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import gpu_counter

LANES = 32
"""Columns of a tile of an output in shared memory: 128 bytes."""
_THREADS = 128
NOTHING = -1e30
"""A score or level of no weight: finite, so that differences of two are not NaN."""
_AT_ONCE = 16
"""Numbers a thread holds of outputs that are on their way: to wait for each part alone would take
as long as a tile of keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """Of query blocks with ``width`` tokens of ``group`` heads each."""

    dtype: Any
    slots: int
    num_kv_heads: int
    width: int
    group: int
    head_dim: int

    @property
    def rows(self) -> int:
        """A token's in a slot: its heads, and one more if they cannot be dealt out to threads."""
        return self.group if self.group * self.head_dim % _THREADS == 0 else self.group + 1

    @property
    def out_type(self) -> list[jax.ShapeDtypeStruct]:
        """The slots: outputs, and levels as wide as these, for a thread to find both alike."""
        shape = (self.slots * self.num_kv_heads * self.width, self.rows, self.head_dim)
        return [jax.ShapeDtypeStruct(shape, jnp.float32)] * 2

    @property
    def result(self) -> Any:
        """Shared memory for a token's result."""
        return plgpu.SMEM((self.rows, self.head_dim), self.dtype)


@dataclasses.dataclass(frozen=True)
class Slots:
    """Of one query block's parts, in the kernel."""

    sizes: Merge
    outputs: Any
    levels: Any
    counters: Any
    first: Any
    head: Any

    def write(self, output: Any, level: Any, part: Any, count: Any, views: Any) -> None:
        """A part's ``output`` ``[64, D]`` and ``level`` ``[64]``, of ``count`` tokens, by way of
        shared memory: ``views`` of ``[D / 32 + 1, 64, 32]``, the first one for copies."""
        copied, written = views
        group, tiles = self.sizes.group, self.sizes.head_dim // LANES
        for j in range(tiles):
            written[j] = output[:, j * LANES : (j + 1) * LANES]
        written[tiles] = lax.broadcast_in_dim(level, (output.shape[0], LANES), [0])
        plgpu.commit_smem()

        @pl.loop(0, count)
        def _token(token):
            rows = pl.ds(token * group, group)
            for j in range(tiles):
                at = self._place(part, token), pl.ds(0, group), pl.ds(j * LANES, LANES)
                plgpu.copy_smem_to_gmem(copied.at[j, rows], self.outputs.at[at])
                plgpu.copy_smem_to_gmem(copied.at[tiles, rows], self.levels.at[at])

        plgpu.wait_smem_to_gmem(0)

    def count_up(self) -> None:
        """Says that a part which is not the last is written."""
        gpu_counter.add_one(self._counter())

    def merge(self, num_parts: Any, count: Any, result_smem: Any, target: Any) -> None:
        """Waits until all are written; ``target(token)`` is where a token's result belongs."""
        gpu_counter.wait_for(self._counter(), num_parts - 1, take=True)
        shape = self.sizes.rows, self.sizes.head_dim
        per_thread = math.prod(shape) // _THREADS
        vector = next(n for n in (4, 2, 1) if per_thread % n == 0)
        layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)
        at_once = max(1, _AT_ONCE // per_thread)

        nothing = [
            plgpu.layout_cast(jnp.full(shape, value), layout) for value in (0.0, 0.0, NOTHING)
        ]

        def add(token: Any, i: Any, carry: list[Any]) -> list[Any]:
            total, weight, high = carry
            found = []
            for ahead in range(at_once):
                part = i * at_once + ahead
                place = self._place(jnp.minimum(part, num_parts - 1), token)
                output, level = (
                    plgpu.layout_cast(array[place, ...], layout)
                    for array in (self.outputs, self.levels)
                )
                found.append((output, jnp.where(part < num_parts, level, NOTHING)))
            new_high = functools.reduce(jnp.maximum, (level for _, level in found), high)
            decay = jnp.exp2(high - new_high)
            total, weight = total * decay, weight * decay
            for output, level in found:
                share = jnp.exp2(level - new_high)
                total, weight = total + share * output, weight + share
            return [total, weight, new_high]

        turns = lax.div(num_parts + at_once - 1, at_once)

        @pl.loop(0, count)
        def _token(token):
            total, weight, _ = lax.fori_loop(0, turns, functools.partial(add, token), nothing)
            result_smem[...] = (total / weight).astype(self.sizes.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_smem.at[pl.ds(0, self.sizes.group)], target(token))
            plgpu.wait_smem_to_gmem(0)

    def _place(self, part: Any, token: Any) -> Any:
        slot = (self.first + part) * self.sizes.num_kv_heads + self.head
        return slot * self.sizes.width + token

    def _counter(self) -> Any:
        return self.counters.at[pl.ds(self.first * self.sizes.num_kv_heads + self.head, 1)]
