"""The kernel of a prompt step's linear on NVIDIA Hopper: base product, adapters, residual or gate.

As many thread blocks as the chip has multiprocessors take tiles of the result one after another:
256 or 128 rows of W (the M side of ``wgmma``, 64 at a time) by a tile of tokens. One warpgroup
keeps the copy engine ahead with what is to be contracted next, two multiply; both go through one
pipeline.

An adapter is more of the same contraction. The step's tokens come cut into pieces
(:mod:`.gpu_pieces`), and what ``x a^T`` is of each, with zeros for the tile's other tokens, another
kernel has computed (:mod:`.gpu_prompt_shrink`). Each tile contracts, after W, its columns of b with
the hidden rows of its groups of pieces: the zeros keep an adapter from its neighbours. Last through
the pipeline comes the residual.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_linear.gpu_config import MULTIPROCESSORS, PART
from kernels_pallas.lora_linear.gpu_ending import onto, through_gate
from kernels_pallas.lora_linear.gpu_pipeline import contract, free_stage
from kernels_pallas.lora_linear.gpu_prompt_config import (
    CONSUMERS,
    TILE_TOKENS,
    UNITS,
    WIDTH,
    parts_of,
    stages_of,
)
from kernels_pallas.lora_matmul.gpu_config import LANES
from kernels_pallas.shared_memory import tiled


def build(
    *,
    dtype: Any,
    tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    has_residual: bool,
    gated: bool,
) -> Any:
    """Builds the kernel: (x, w, residual?, b, where this layer's slots begin, ranks, the pieces'
    slots and edges and what the shrink yielded?) -> y."""
    parts = parts_of(tokens, splits, gated=gated)
    stages = stages_of(parts)
    tile_rows = parts * CONSUMERS * LANES
    half = TILE_TOKENS // 2
    with_lora = rank > 0
    columns = sum(splits) // (2 if gated else 1)
    tile_columns = tile_rows // (2 if gated else 1)
    grid = (columns // tile_columns, -(-tokens // TILE_TOKENS))
    tiles = grid[0] * grid[1]
    thread_blocks = min(tiles, MULTIPROCESSORS)
    steps = d_in // LANES
    # Of a gate's two members each part has another, and its halves of W lie apart.
    sides = parts if gated else 1
    side_rows = tile_rows // sides
    edges = tuple(itertools.accumulate(splits))
    ranks_k = rank // PART
    producer = CONSUMERS

    wide = tiled(LANES, 2)
    views = [
        [
            plgpu.SMEM((stages, tile_rows, LANES), dtype, transforms=wide),
            plgpu.SMEM((stages, TILE_TOKENS, LANES), dtype, transforms=wide),
        ],
        # In each stage's part of the same memory.
        [
            plgpu.SMEM((stages, sides, LANES, side_rows), dtype, transforms=wide),
        ],
        [
            plgpu.SMEM((stages, parts, CONSUMERS, half, LANES), dtype, transforms=wide),
        ],
    ]
    scratch: dict[str, Any] = {
        "smem": plgpu.RefUnion(*views),
        "out_smem": plgpu.SMEM((CONSUMERS, 2, half, LANES), dtype, transforms=wide),
        # One for each kind of step, which differ in how many copies they take.
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=sides + 1),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
    }
    if with_lora:
        scratch["lora_full"] = plgpu.Barrier(num_barriers=stages, num_arrivals=UNITS + 1)
    if has_residual:
        scratch["residual_full"] = plgpu.Barrier(
            num_barriers=stages, num_arrivals=parts * CONSUMERS
        )

    def prompt_linear_kernel(
        x,
        w,
        *refs,
        smem,
        out_smem,
        full,
        empty,
        lora_full=None,
        residual_full=None,
    ):
        # x: [T, d_in], w: [d_out, d_in], out_smem: [consumers, 2, half, 64]
        rest = list(refs)
        residual: Any = rest.pop(0) if has_residual else None  # [T, d_out]
        if with_lora:
            b, first_slot, ranks, slots, tile_edges, hidden, y = rest
            # slots: [groups, units], hidden: [members * r / 16, groups, 128, 64]
        else:
            (y,) = rest
        # w_smem: [stages, tile rows, 64], x_smem: [stages, 128, 64], as for hidden rows,
        # b_smem: [stages, sides, 64, side rows], of which a step fills one side,
        # residual_smem: [stages, parts, consumers, half, 64]
        (w_smem, x_smem), (b_smem,), (residual_smem,) = smem
        me, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        ends: Any = {"stages": stages, "empty": empty}
        my_tiles = lax.div(tiles - cta + thread_blocks - 1, thread_blocks)

        def tile_of(turn):
            """Which columns' tile, and which tokens'."""
            return plgpu.planar_snake(cta + turn * thread_blocks, grid, 0, WIDTH)

        def row(column_tile, part, consumer):
            """First row of W, and column of b, of a consumer's part of a tile."""
            if gated:
                return part * columns + column_tile * tile_columns + consumer * LANES
            return column_tile * tile_rows + (part * CONSUMERS + consumer) * LANES

        def groups_of(token_tile):
            """The first of a tile's groups, and how many there are."""
            first = tile_edges[token_tile]
            return first, tile_edges[token_tile + 1] - first

        # Which rows of the result are stored, and the residual brought, at a time.
        quarters = tuple(itertools.product(range(1 if gated else parts), range(2)))
        residual_steps = len(quarters) // parts if has_residual else 0

        def fill(step, fetch):
            """Has the copy engine fill the step's stage, once that is empty."""
            fetch(free_stage(step, **ends))

        @pl.when(me == producer)
        def _produce():
            plgpu.set_max_registers(56, action="decrease")
            layer = first_slot[0] if with_lora else None

            def tile(turn, begin):
                column_tile, token_tile = tile_of(turn)

                @pl.loop(0, steps)
                def _step(i):
                    def fetch(stage):
                        for side in range(sides):
                            source = pl.ds(row(column_tile, side, 0), side_rows)
                            plgpu.copy_gmem_to_smem(
                                w.at[source, pl.ds(i * LANES, LANES)],
                                w_smem.at[stage, pl.ds(side * side_rows, side_rows)],
                                full.at[stage],
                            )
                        # JAX lets only a start that it does not know lie beyond the last token: the
                        # copy engine then reads zeros and writes nothing.
                        source = pl.ds(token_tile * TILE_TOKENS, TILE_TOKENS)
                        plgpu.copy_gmem_to_smem(
                            x.at[source, pl.ds(i * LANES, LANES)], x_smem.at[stage], full.at[stage]
                        )

                    fill(begin + i, fetch)

                step = begin + steps
                if with_lora:
                    step = adapters(column_tile, token_tile, step)
                for i in range(residual_steps):

                    def fetch(stage, i=i):
                        for j, (part, side) in enumerate(quarters[i * parts : (i + 1) * parts]):
                            for consumer in range(CONSUMERS):
                                start = token_tile * TILE_TOKENS + side * half
                                at = pl.ds(row(column_tile, part, consumer), LANES)
                                plgpu.copy_gmem_to_smem(
                                    residual.at[pl.ds(start, half), at],
                                    residual_smem.at[stage, j, consumer],
                                    residual_full.at[stage],
                                )

                    fill(step + i, fetch)
                return step + residual_steps

            def adapters(column_tile, token_tile, begin):
                first, count = groups_of(token_tile)
                last = slots.shape[0] - 1

                def slots_of(i):
                    group = jnp.minimum(first + i, last)
                    return [slots[group, unit] for unit in range(UNITS)]

                def contract_group(i, current):
                    # A group ahead: loading them takes as long as a step's copies.
                    following = slots_of(i + 1)
                    for j, side in itertools.product(range(ranks_k), range(sides)):

                        def fetch(stage, j=j, side=side):
                            column = row(column_tile, side, 0)
                            for unit, slot in enumerate(current):
                                there = slot >= 0
                                if ranks_k > 1:
                                    there &= ranks[jnp.maximum(slot, 0)] > j * PART
                                # Else beyond the array's bounds, where the copy engine writes zeros
                                # without reading.
                                ranks_at = pl.ds(jnp.where(there, j * PART, rank), PART)
                                plgpu.copy_gmem_to_smem(
                                    b.at[layer + slot, ranks_at, pl.ds(column, side_rows)],
                                    b_smem.at[stage, 0, pl.ds(unit * PART, PART)],
                                    lora_full.at[stage],
                                )
                            member = sum(jnp.where(column >= edge, 1, 0) for edge in edges[:-1])
                            plgpu.copy_gmem_to_smem(
                                hidden.at[member * ranks_k + j, first + i],
                                x_smem.at[stage],
                                lora_full.at[stage],
                            )

                        fill(begin + (i * ranks_k + j) * sides + side, fetch)
                    return following

                lax.fori_loop(0, count, contract_group, slots_of(jnp.int32(0)))
                return begin + count * ranks_k * sides

            lax.fori_loop(0, my_tiles, tile, jnp.int32(0))

        def store(value, slot, target):
            """Sends [64, half] of a consumer's sums on their way, transposed."""
            # Of the two that may be on their way the older one, whose place it takes.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out_smem.at[me, slot].transpose((1, 0))[...] = plgpu.layout_cast(
                value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[me, slot], target)

        @pl.when(me < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(224, action="increase")

            def tile(turn, begin):
                column_tile, token_tile = tile_of(turn)
                lora_steps = groups_of(token_tile)[1] * ranks_k if with_lora else 0

                def multiply(*accs):
                    def product(_turn, stage):
                        for part, acc in enumerate(accs):
                            mine = pl.ds((part * CONSUMERS + me) * LANES, LANES)
                            plgpu.wgmma(
                                acc, w_smem.at[stage, mine], x_smem.at[stage].transpose((1, 0))
                            )

                    step = contract(begin, steps, product, full=full, products=parts, **ends)
                    if with_lora:

                        def adapters(turn, stage):
                            for part in (turn,) if gated else range(parts):
                                place = 0 if gated else part
                                mine = pl.ds((place * CONSUMERS + me) * LANES, LANES)
                                plgpu.wgmma(
                                    accs[part],
                                    b_smem.at[stage, 0, :, mine].transpose((1, 0)),
                                    x_smem.at[stage].transpose((1, 0)),
                                )

                        contract(
                            step,
                            lora_steps,
                            adapters,
                            full=lora_full,
                            products=parts // sides,
                            turns=sides,
                            **ends,
                        )
                    return tuple(acc[...] for acc in accs)

                shape = plgpu.ACC((LANES, TILE_TOKENS))
                values = list(pl.run_scoped(multiply, *[shape] * parts))
                step = begin + steps + lora_steps * sides
                if gated:
                    values = [through_gate(*values)]
                for i, (part, side) in enumerate(quarters):
                    value = values[part][:, side * half : (side + 1) * half]
                    if has_residual:
                        stage = lax.rem(step + i // parts, stages)
                        if i % parts == 0:
                            plgpu.barrier_wait(residual_full.at[stage])
                        value = onto(residual_smem.at[stage, i % parts, me], value)
                        if i % parts == parts - 1:
                            plgpu.barrier_arrive(empty.at[stage])
                    start = token_tile * TILE_TOKENS + side * half
                    at = pl.ds(row(column_tile, part, me), LANES)
                    store(value, side, y.at[pl.ds(start, half), at])
                return step + residual_steps

            lax.fori_loop(0, my_tiles, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def prompt_linear(*refs):
        kernel = functools.partial(prompt_linear_kernel, *refs)
        pl.run_scoped(kernel, collective_axes="warpgroup", **scratch)

    return plgpu.kernel(
        prompt_linear,
        out_type=jax.ShapeDtypeStruct((tokens, columns), dtype),
        grid=(thread_blocks,),
        grid_names=("cta",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
