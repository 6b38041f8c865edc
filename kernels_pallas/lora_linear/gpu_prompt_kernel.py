"""The kernel of a prompt step's linear on NVIDIA Hopper: base product, adapters, residual or gate.

As many thread blocks as the chip has multiprocessors take tiles of the result one after another:
256 rows of W (the M side of ``wgmma``, 64 at a time) by a tile of tokens. One warpgroup keeps the
copy engine ahead with what is to be contracted next, two multiply; both go through one pipeline.

An adapter is more of the same contraction. The step's tokens come cut into pieces
(:mod:`.gpu_pieces`), and what ``x a^T`` is of each, with zeros for the tile's other tokens, another
kernel has computed (:mod:`.gpu_prompt_shrink`). Each tile contracts, after W, its columns of b with
the rows of its pieces: the zeros keep an adapter from its neighbours. Last through the pipeline
comes the residual.
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
    PARTS,
    ROWS,
    STAGES,
    TILE_TOKENS,
    WIDTH,
)
from kernels_pallas.lora_matmul.gpu_config import LANES
from kernels_pallas.shared_memory import tiled

_CORES = tuple(itertools.product(range(PARTS), range(CONSUMERS)))


def build(
    *,
    dtype: Any,
    tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    shrinks: int,
    has_residual: bool,
    gated: bool,
) -> Any:
    """Builds the kernel: (x, w, residual?, b, where this layer's slots begin, ranks, the pieces'
    slots and edges and what the shrink yielded?) -> y."""
    half = TILE_TOKENS // 2
    with_lora = rank > 0
    columns = sum(splits) // (2 if gated else 1)
    tile_columns = ROWS // (2 if gated else 1)
    grid = (columns // tile_columns, -(-tokens // TILE_TOKENS))
    tiles = grid[0] * grid[1]
    thread_blocks = min(tiles, MULTIPROCESSORS)
    steps = d_in // LANES
    # Of a gate's two members each part has another.
    hidden_parts = PARTS if gated else 1
    # Cuts of a piece that are contracted at a time, and how many times.
    cuts = min(shrinks, LANES // PART // hidden_parts)
    cut_steps = shrinks // cuts
    edges = tuple(itertools.accumulate(splits))
    ranks_k = rank // PART
    producer = CONSUMERS
    # A gate's halves of W lie apart.
    weight_copies = PARTS if gated else 1

    wide, narrow = tiled(LANES, 2), tiled(PART, 2)
    views = [
        [
            plgpu.SMEM((STAGES, ROWS, LANES), dtype, transforms=wide),
            plgpu.SMEM((STAGES, TILE_TOKENS, LANES), dtype, transforms=wide),
        ],
        # In each stage's part of the same memory.
        [
            plgpu.SMEM(
                (STAGES, LANES // PART, PARTS, CONSUMERS, PART, LANES), dtype, transforms=narrow
            ),
            plgpu.SMEM((STAGES, LANES // PART, TILE_TOKENS, PART), dtype, transforms=narrow),
        ],
        [
            plgpu.SMEM((STAGES, CONSUMERS, TILE_TOKENS, LANES), dtype, transforms=wide),
        ],
    ]
    scratch: dict[str, Any] = {
        "smem": plgpu.RefUnion(*views),
        "out_smem": plgpu.SMEM((CONSUMERS, 2, half, LANES), dtype, transforms=wide),
        # One for each kind of step, which differ in how many copies they take.
        "full": plgpu.Barrier(num_barriers=STAGES, num_arrivals=weight_copies + 1),
        "empty": plgpu.Barrier(num_barriers=STAGES, num_arrivals=CONSUMERS),
    }
    if with_lora:
        copies = len(_CORES) + hidden_parts * cuts
        scratch["lora_full"] = plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies)
    if has_residual:
        scratch["residual_full"] = plgpu.Barrier(num_barriers=STAGES, num_arrivals=CONSUMERS)

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
            b, first_slot, ranks, piece_slots, tile_edges, hidden, y = rest
            # hidden: [P, shrinks, 128, members * r rounded up]
        else:
            (y,) = rest
        # w_smem: [stages, 256, 64], x_smem: [stages, 128, 64],
        # b_smem: [stages, 4, parts, consumers, 16, 64], hidden_smem: [stages, 4, 128, 16],
        # residual_smem: [stages, consumers, 128, 64]
        (w_smem, x_smem), (b_smem, hidden_smem), (residual_smem,) = smem
        me, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
        ends: Any = {"stages": STAGES, "empty": empty}
        my_tiles = lax.div(tiles - cta + thread_blocks - 1, thread_blocks)

        def tile_of(turn):
            """Which columns' tile, and which tokens'."""
            return plgpu.planar_snake(cta + turn * thread_blocks, grid, 0, WIDTH)

        def row(column_tile, part, consumer):
            """First row of W, and column of b, of a consumer's part of a tile."""
            if gated:
                return part * columns + column_tile * tile_columns + consumer * LANES
            return column_tile * ROWS + (part * CONSUMERS + consumer) * LANES

        def piece_steps(token_tile):
            """The first of a tile's pieces, and of how many."""
            begin = tile_edges[token_tile]
            return begin, tile_edges[token_tile + 1] - begin

        def fill(step, fetch):
            """Has the copy engine fill the step's stage, once that is empty."""
            fetch(free_stage(step, **ends))

        @pl.when(me == producer)
        def _produce():
            plgpu.set_max_registers(56, action="decrease")

            def tile(turn, begin):
                column_tile, token_tile = tile_of(turn)
                if with_lora:
                    first_piece, num_pieces = piece_steps(token_tile)

                @pl.loop(0, steps)
                def _step(i):
                    def fetch(stage):
                        length = ROWS // weight_copies
                        for part in range(weight_copies):
                            source = pl.ds(row(column_tile, part, 0), length)
                            plgpu.copy_gmem_to_smem(
                                w.at[source, pl.ds(i * LANES, LANES)],
                                w_smem.at[stage, pl.ds(part * length, length)],
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

                    @pl.loop(0, num_pieces)
                    def _piece(i):
                        piece = first_piece + i
                        slot = piece_slots[piece]
                        true_rank = ranks[slot] if ranks_k > 1 else None
                        for j, cut_step in itertools.product(range(ranks_k), range(cut_steps)):

                            def fetch(
                                stage,
                                j=j,
                                cut_step=cut_step,
                                piece=piece,
                                slot=slot,
                                rank_=true_rank,
                            ):
                                start = jnp.int32(j * PART)
                                if rank_ is not None:
                                    start = jnp.where(start < rank_, start, rank)
                                for part, consumer in _CORES:
                                    at = pl.ds(row(column_tile, part, consumer), LANES)
                                    plgpu.copy_gmem_to_smem(
                                        b.at[first_slot[0] + slot, pl.ds(start, PART), at],
                                        b_smem.at[stage, 0, part, consumer],
                                        lora_full.at[stage],
                                    )
                                for part in range(hidden_parts):
                                    column = row(column_tile, part, 0)
                                    member = sum(
                                        jnp.where(column >= edge, 1, 0) for edge in edges[:-1]
                                    )
                                    at = pl.ds(member * rank + j * PART, PART)
                                    for cut in range(cuts):
                                        plgpu.copy_gmem_to_smem(
                                            hidden.at[piece, cut_step * cuts + cut, :, at],
                                            hidden_smem.at[stage, part * cuts + cut],
                                            lora_full.at[stage],
                                        )

                            fill(step + (i * ranks_k + j) * cut_steps + cut_step, fetch)

                    step = step + num_pieces * ranks_k * cut_steps
                if has_residual:
                    for part in range(PARTS):

                        def fetch(stage, part=part):
                            for consumer in range(CONSUMERS):
                                source = pl.ds(token_tile * TILE_TOKENS, TILE_TOKENS)
                                at = pl.ds(row(column_tile, part, consumer), LANES)
                                plgpu.copy_gmem_to_smem(
                                    residual.at[source, at],
                                    residual_smem.at[stage, consumer],
                                    residual_full.at[stage],
                                )

                        fill(step + part, fetch)
                    step = step + PARTS
                return step

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
                lora_steps = piece_steps(token_tile)[1] * ranks_k * cut_steps if with_lora else 0

                def multiply(*accs):
                    def product(_turn, stage):
                        for part, acc in enumerate(accs):
                            mine = pl.ds((part * CONSUMERS + me) * LANES, LANES)
                            plgpu.wgmma(
                                acc, w_smem.at[stage, mine], x_smem.at[stage].transpose((1, 0))
                            )

                    step = contract(begin, steps, product, full=full, products=PARTS, **ends)
                    if with_lora:

                        def adapters(_turn, stage):
                            for part, acc in enumerate(accs):
                                for cut in range(cuts):
                                    first_cut = part * cuts if gated else 0
                                    rows = hidden_smem.at[stage, first_cut + cut]
                                    plgpu.wgmma(
                                        acc,
                                        b_smem.at[stage, 0, part, me].transpose((1, 0)),
                                        rows.transpose((1, 0)),
                                    )

                        contract(
                            step,
                            lora_steps,
                            adapters,
                            full=lora_full,
                            products=PARTS * cuts,
                            **ends,
                        )
                    return tuple(acc[...] for acc in accs)

                shape = plgpu.ACC((LANES, TILE_TOKENS))
                values = list(pl.run_scoped(multiply, *[shape] * PARTS))
                step = begin + steps + lora_steps
                if gated:
                    values = [through_gate(*values)]
                for part, value in enumerate(values):
                    if has_residual:
                        stage = lax.rem(step + part, STAGES)
                        plgpu.barrier_wait(residual_full.at[stage])
                        value = onto(residual_smem.at[stage, me], value)  # noqa: PLW2901
                        plgpu.barrier_arrive(empty.at[stage])
                    for i in range(2):
                        source = pl.ds(token_tile * TILE_TOKENS + i * half, half)
                        at = pl.ds(row(column_tile, part, me), LANES)
                        store(value[:, i * half : (i + 1) * half], i, y.at[source, at])
                return step + (PARTS if has_residual else 0)

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
