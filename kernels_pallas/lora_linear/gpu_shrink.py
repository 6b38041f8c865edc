"""The shrinks of a decode step on NVIDIA Hopper: ``x a^T`` of each block of the step's tokens.

One warpgroup of some thread blocks of :mod:`.gpu_kernel` computes them. A block of tokens, in one
of the parts that d_in is cut into, is a unit. For every 16 ranks of every member it yields a strip:
a column for each rank and a row for each of the step's tokens, zeros but for the block's. Four
strips, of one unit or of several, are a group and look like 64 columns of x.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_linear.gpu_config import PART
from kernels_pallas.lora_matmul.gpu_config import LANES, round_up
from kernels_pallas.shared_memory import rows, tiled, two_views

STRIPS = LANES // PART
"""In a group: as many as fill a stage of the pipeline that contracts them."""


class Adapters(NamedTuple):
    """Arguments of the kernel: the bank's arrays, and the batch's."""

    a: Any  # [layers * slots, members * rank, d_in]
    b: Any  # [layers * slots, rank, d_out]
    first_slot: Any
    ranks: Any
    num_blocks: Any
    block_slots: Any
    block_starts: Any
    block_counts: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrinks:
    """How a step's shrinks are cut, and where their strips lie."""

    dtype: Any
    tokens: int
    """Those that are computed."""
    d_in: int
    members: int
    rank: int
    """The bank's capacity."""
    blocks: int
    """The batch's bound on them."""
    block_tokens: int
    cuts: int
    """Parts of d_in."""
    stages: int
    """Depth of the pipeline."""

    @property
    def ranks_k(self) -> int:
        """Strips of a unit and member."""
        return self.rank // PART

    def strips(self) -> itertools.product[tuple[int, int]]:
        """A unit's, as (member, which of its ranks')."""
        return itertools.product(range(self.members), range(self.ranks_k))

    @property
    def unit_multiple(self) -> int:
        """Units are dealt out so many together as fill whole groups."""
        return STRIPS // math.gcd(STRIPS, self.ranks_k)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of all strips, in device memory: [members, groups, T, 64]."""
        units = round_up(self.blocks * self.cuts, self.unit_multiple)
        return self.members, units * self.ranks_k // STRIPS, self.tokens, LANES

    @property
    def a_rows(self) -> int:
        """Of A in a stage, the M side of ``wgmma``."""
        return round_up(self.members * self.rank, LANES)

    @property
    def a_parts(self) -> list[tuple[int, int, int]]:
        """Rows of A that are copied alone, as (row in the slot, its first rank, length): true ranks
        decide which are read."""
        if self.ranks_k == 1:
            return [(0, 0, self.members * self.rank)]
        return [
            (m * self.rank + j, j, PART)
            for m in range(self.members)
            for j in range(0, self.rank, PART)
        ]

    @property
    def lanes(self) -> int:
        """Blocks of 64 columns of x and A in one step."""
        return math.gcd(2, self.d_in // (self.cuts * LANES))

    @property
    def steps(self) -> int:
        """Of a unit."""
        return self.d_in // (self.cuts * self.lanes * LANES)

    def units(self, adapters: Adapters) -> tuple[Any, Any]:
        """How many the step has, and how many with those that fill the last group with zeros."""
        there, multiple = adapters.num_blocks[0] * self.cuts, self.unit_multiple
        return there, lax.div(there + multiple - 1, multiple) * multiple

    def origin(self, index: Any, units: Any, adapters: Adapters) -> tuple[Any, Any]:
        """Of all strips of a member the one at ``index``: its slot, and where its rows of b begin,
        ``rank`` if it has none. ``units`` is how many the step has."""
        unit, begin = lax.div(index, self.ranks_k), lax.rem(index, self.ranks_k) * PART
        slot = adapters.block_slots[jnp.minimum(lax.div(unit, self.cuts), self.blocks - 1)]
        is_there = unit < units
        if self.ranks_k > 1:
            is_there &= begin < adapters.ranks[slot]
        # Else out of the array's bounds, where the copy engine writes zeros without reading: beyond
        # the true rank, or after the last block.
        return slot, jnp.where(is_there, begin, self.rank)

    def scratch(self) -> dict[str, Any]:
        """The buffers of a :class:`Shrinker`."""
        x_shape = (self.stages, self.lanes, self.block_tokens, LANES)
        strips_shape = (self.block_tokens // 8, self.a_rows // PART, 8, PART)
        return {
            "a_smem": plgpu.SMEM(
                (self.stages, self.lanes, self.a_rows, LANES),
                self.dtype,
                transforms=tiled(LANES, 2),
            ),
            "shrink_x_views": two_views(x_shape, self.dtype),
            "shrink_full": plgpu.Barrier(
                num_barriers=self.stages, num_arrivals=self.lanes * (len(self.a_parts) + 1)
            ),
            # Strips of eight tokens, and all of them.
            "shrunk_views": plgpu.RefUnion(
                plgpu.SMEM(strips_shape, self.dtype, transforms=rows(PART)),
                plgpu.SMEM((self.block_tokens, self.a_rows), self.dtype, transforms=tiled(PART, 2)),
            ),
            "zeros_smem": plgpu.SMEM((self.tokens, PART), self.dtype),
        }


@dataclasses.dataclass(frozen=True)
class Shrinker:
    """The warpgroup, with what it reads and writes in device memory and buffers of its own."""

    shrinks: Shrinks
    x: Any  # [T, d_in]
    adapters: Adapters
    first: Any
    """Where this layer's slots begin."""
    hidden: Any  # [members, groups, T, 64]
    a_smem: Any  # [stages, lanes, members * rank, 64]
    shrink_x_views: Any  # [stages, lanes, block_tokens, 64]
    shrink_full: Any
    shrunk_views: Any  # [block_tokens, members * rank]
    zeros_smem: Any  # [T, 16]

    def prepare(self) -> None:
        """Once, before all else."""
        self.zeros_smem[...] = jnp.zeros(self.zeros_smem.shape, self.shrinks.dtype)
        plgpu.commit_smem()

    def clear(self, unit: Any) -> None:
        """Has the copy engine fill the unit's strips with zeros."""
        for member, j in self.shrinks.strips():
            plgpu.copy_smem_to_gmem(
                self.zeros_smem, self._strip(unit, member, j, pl.ds(0, self.shrinks.tokens))
            )

    def shrink(self, unit: Any, turn: Any) -> None:
        """Fills the unit's strips, but for the last copies, which are on their way. ``turn`` counts
        the units that this thread block had before."""
        shrinks, adapters = self.shrinks, self.adapters
        a_smem, full = self.a_smem, self.shrink_full
        x_copied, x_smem = self.shrink_x_views
        strips_smem, shrunk_smem = self.shrunk_views
        stages, steps = shrinks.stages, shrinks.steps

        block, cut = lax.div(unit, shrinks.cuts), lax.rem(unit, shrinks.cuts)
        slot, start = adapters.block_slots[block], adapters.block_starts[block]
        count = adapters.block_counts[block]
        true_rank = adapters.ranks[slot] if shrinks.ranks_k > 1 else None

        def stage_of(i: Any) -> Any:
            return lax.rem(turn * steps + i, stages)

        def fetch(i: Any) -> None:
            stage = stage_of(i)
            for lane in range(shrinks.lanes):
                k = ((cut * steps + i) * shrinks.lanes + lane) * LANES
                for to, j, length in shrinks.a_parts:
                    source: Any = to
                    if true_rank is not None:
                        # Beyond it: out of the array's bounds, where the copy engine writes zeros
                        # without reading.
                        source = jnp.where(j < true_rank, to, shrinks.members * shrinks.rank)
                    plgpu.copy_gmem_to_smem(
                        adapters.a.at[self.first + slot, pl.ds(source, length), pl.ds(k, LANES)],
                        a_smem.at[stage, lane, to : to + length],
                        full.at[stage],
                    )
                plgpu.copy_gmem_to_smem(
                    self.x.at[pl.ds(start, shrinks.block_tokens), pl.ds(k, LANES)],
                    x_copied.at[stage, lane],
                    full.at[stage],
                )

        def multiply(acc: Any) -> Any:
            for i in range(min(stages, steps)):
                fetch(jnp.int32(i))
            # What has to arrive first is on its way.
            self.clear(unit)

            @pl.loop(0, steps)
            def _step(i: Any) -> None:
                stage = stage_of(i)
                plgpu.barrier_wait(full.at[stage])
                for lane in range(shrinks.lanes):
                    plgpu.wgmma(
                        acc, a_smem.at[stage, lane], x_smem.at[stage, lane].transpose((1, 0))
                    )
                plgpu.wgmma_wait(0)
                later = i + stages
                pl.when(later < steps)(lambda: fetch(later))

            return acc[...]

        shape = (shrinks.a_rows, shrinks.block_tokens)
        total = pl.run_scoped(multiply, plgpu.ACC(shape))
        token = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        # Other blocks' tokens, or padding, NaN perhaps.
        total = jnp.where(token < count, total, 0.0).astype(shrinks.dtype)
        shrunk_smem.transpose((1, 0))[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        # The zeros are in place.
        plgpu.wait_smem_to_gmem(0)
        for member, j in shrinks.strips():
            for eight in range(shrinks.block_tokens // 8):
                plgpu.copy_smem_to_gmem(
                    strips_smem.at[eight, member * shrinks.ranks_k + j],
                    self._strip(unit, member, j, pl.ds(start + eight * 8, 8)),
                )

    def _strip(self, unit: Any, member: int, j: int, tokens: Any) -> Any:
        """What the unit has for some ranks of a member, in device memory."""
        index = unit * self.shrinks.ranks_k + j
        columns = pl.ds(lax.rem(index, STRIPS) * PART, PART)
        return self.hidden.at[member, lax.div(index, STRIPS), tokens, columns]
