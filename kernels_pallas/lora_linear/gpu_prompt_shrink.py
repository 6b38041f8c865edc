"""The shrink of a prompt step on NVIDIA Hopper: ``x a^T`` of each piece of the step's tokens.

A thread block multiplies a piece's tokens by up to 64 rows of its A, and writes strips: a column
for each of sixteen ranks and a row for each token of the tile, zeros but for the piece's. Four
strips side by side, a group's (:mod:`.gpu_pieces`), look like 64 columns of x.

It does little but wait for its copies: for a large piece d_in is cut, and the tile is in half, so
that all multiprocessors wait at once, each for as much as its shared memory holds. Where many
adapters are in a step most pieces are small, and of those only a window of the tile is copied, for
all of d_in.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_linear.gpu_config import PART
from kernels_pallas.lora_linear.gpu_pipeline import contract, free_stage
from kernels_pallas.lora_linear.gpu_prompt_config import (
    FEW_PIECES,
    HALF_TILE,
    TILE_TOKENS,
    UNITS,
    WINDOW,
    shrink_bytes,
    shrink_pipeline,
    window_of,
)
from kernels_pallas.lora_matmul.gpu_config import LANES
from kernels_pallas.shared_memory import tiled


def build(
    *, dtype: Any, tokens: int, d_in: int, members: int, rank: int, shrinks: int, groups: int
) -> Any:
    """Builds the kernel: (x, a, where this layer's slots begin, ranks, the pieces) -> hidden
    ``[members * rank / 16, groups, 128, 64]``. What lies beyond the last group is not written."""
    ranks_k = rank // PART
    strips = members * ranks_k
    blocks = -(-strips // UNITS)
    # Of a thread block: strips, and rows of A. No bank's ranks leave the last one fewer.
    mine, rows = strips // blocks, strips // blocks * PART
    # True ranks decide which parts of A are read.
    copies = mine if ranks_k > 1 else 1
    length = rows // copies
    room = shrink_bytes(tokens, groups, blocks * shrinks)
    wide = tiled(LANES, 2)

    def buffers(copied: int, columns: int) -> list[Any]:
        """[stages, rows, lanes] of A and [stages * copied, lanes] of x for a shrink of so many
        tokens over so many columns, and behind these as many rows that are never copied as
        ``wgmma`` multiplies more than there are in a window."""
        lanes, stages = shrink_pipeline(columns, rows, copied, room)
        shapes = (stages, rows, lanes), (stages * copied + max(0, LANES - copied), lanes)
        return [plgpu.SMEM(shape, dtype, transforms=wide) for shape in shapes]

    cut = d_in // shrinks
    views = [buffers(HALF_TILE, cut)]
    # Of few pieces none is small.
    if groups > FEW_PIECES:
        views.append(buffers(WINDOW, d_in))
    most_stages = max(a.shape[0] for a, _ in views)
    scratch = {
        "smem": plgpu.RefUnion(*views),
        # With room for the window's rows that are not copied, beyond the tile.
        "strips_smem": plgpu.SMEM(
            (mine, TILE_TOKENS + LANES - WINDOW, PART), dtype, transforms=tiled(PART, 2)
        ),
        "full": plgpu.Barrier(num_barriers=most_stages, num_arrivals=copies + 1),
        "empty": plgpu.Barrier(num_barriers=most_stages),
    }

    def prompt_shrink_kernel(
        x,  # [T, d_in]
        a,  # [layers * slots, members * rank, d_in]
        first_slot,
        ranks,
        slots,
        starts,
        counts,
        tile_edges,
        large,
        hidden,
        *,
        smem,
        strips_smem,
        full,
        empty,
    ):
        me = lax.axis_index("warpgroup")
        group, unit = lax.axis_index("group"), lax.axis_index("unit")
        half = lax.rem(lax.axis_index("strips_and_half"), 2)
        first_strip = lax.div(lax.axis_index("strips_and_half"), 2) * mine

        def produce(slot, first_token, tokens, first_lane, steps, view):
            """Brings A, and x from a token on, over some steps."""
            a_smem, x_smem = view
            stages, _, lanes = a_smem.shape
            matrix, first_row = first_slot[0] + slot, first_strip * PART
            true_rank = ranks[slot] if ranks_k > 1 else None

            @pl.loop(0, steps)
            def _step(i):
                stage = free_stage(i, stages=stages, empty=empty)
                at = pl.ds(first_lane + i * lanes, lanes)
                for part in range(copies):
                    row = first_row + part * length
                    if true_rank is not None:
                        # Beyond it: out of the array's bounds, where the copy engine writes zeros
                        # without reading.
                        row = jnp.where(lax.rem(row, rank) < true_rank, row, members * rank)
                    plgpu.copy_gmem_to_smem(
                        a.at[matrix, pl.ds(row, length), at],
                        a_smem.at[stage, pl.ds(part * length, length)],
                        full.at[stage],
                    )
                # Past the last token, too.
                plgpu.copy_gmem_to_smem(
                    x.at[pl.ds(first_token, tokens), at],
                    x_smem.at[pl.ds(stage * tokens, tokens)],
                    full.at[stage],
                )

        def consume(begin, end, tokens, steps, view):
            """The strips' columns, with zeros where rows are not from ``begin`` to ``end``."""
            a_smem, x_smem = view
            shape = LANES, rows

            def multiply(acc):
                def product(_turn, stage):
                    plgpu.wgmma(
                        acc,
                        x_smem.at[pl.ds(stage * tokens, LANES)],
                        a_smem.at[stage].transpose((1, 0)),
                    )

                ends: Any = {"stages": a_smem.shape[0], "full": full, "empty": empty}
                contract(jnp.int32(0), steps, product, products=1, **ends)
                return acc[...]

            total = pl.run_scoped(multiply, plgpu.ACC(shape))
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
            # Other pieces' tokens, padding, or what is not copied: NaN perhaps.
            total = jnp.where((row >= begin) & (row < end), total, 0.0).astype(dtype)
            return [total[:, i * PART : (i + 1) * PART] for i in range(mine)]

        def write(columns, first_row):
            for i, column in enumerate(columns):
                strips_smem.at[i, pl.ds(first_row, column.shape[0])][...] = column
            plgpu.commit_smem()

        def clear(tokens):
            zeros = jnp.zeros((tokens, PART), dtype)
            write([plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)] * mine, 0)

        def send(first_row, tokens):
            for i in range(mine):
                plgpu.copy_smem_to_gmem(
                    strips_smem.at[i, pl.ds(0, tokens)],
                    hidden.at[
                        first_strip + i, group, pl.ds(first_row, tokens), pl.ds(unit * PART, PART)
                    ],
                )
            plgpu.wait_smem_to_gmem(0)

        def of_unit():
            slot, begin, count = slots[group, unit], starts[group, unit], counts[group, unit]
            place = begin & (TILE_TOKENS - 1)
            first_token = begin - place
            is_large = large[group] > 0
            first_row = half * HALF_TILE
            in_half = place - first_row
            has_some = (unit < shrinks) & (in_half < HALF_TILE) & (in_half + count > 0)

            @pl.when(is_large & has_some)
            def _large():
                steps = cut // smem[0][0].shape[2]

                @pl.when(me == 1)
                def _produce():
                    produce(slot, first_token + first_row, HALF_TILE, unit * cut, steps, smem[0])

                @pl.when(me == 0)
                def _consume():
                    write(consume(in_half, in_half + count, HALF_TILE, steps, smem[0]), 0)
                    send(first_row, HALF_TILE)

            def small():
                window = window_of(place)
                steps = d_in // smem[1][0].shape[2]

                @pl.when(me == 1)
                def _produce():
                    produce(slot, first_token + window, WINDOW, 0, steps, smem[1])

                @pl.when(me == 0)
                def _consume():
                    clear(TILE_TOKENS)
                    begin = place - window
                    write(consume(begin, begin + count, WINDOW, steps, smem[1]), window)
                    send(0, TILE_TOKENS)

            if groups > FEW_PIECES:
                pl.when(~is_large & (count > 0) & (half == 0))(small)

            @pl.when((me == 0) & jnp.where(is_large, ~has_some, count == 0))
            def _nothing():
                clear(HALF_TILE)
                send(first_row, HALF_TILE)

        pl.when(group < tile_edges[tile_edges.shape[0] - 1])(of_unit)

    def prompt_shrink(*refs):
        kernel = functools.partial(prompt_shrink_kernel, *refs)
        pl.run_scoped(kernel, collective_axes="warpgroup", **scratch)

    return plgpu.kernel(
        prompt_shrink,
        out_type=jax.ShapeDtypeStruct((strips, groups, TILE_TOKENS, LANES), dtype),
        grid=(groups, UNITS, blocks * 2),
        grid_names=("group", "unit", "strips_and_half"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
