"""The shrink of a prompt step on NVIDIA Hopper: ``x a^T`` of each piece of the step's tokens.

A thread block multiplies a whole tile of tokens by 64 rows of a piece's A, over its part of d_in,
and writes zeros for those that are not of the piece. It does little but wait for its copies: d_in
is cut so that all multiprocessors wait at once, each for as much as its shared memory holds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_linear.gpu_config import PART
from kernels_pallas.lora_linear.gpu_prompt_config import SHRINK_LANES, STAGES, TILE_TOKENS
from kernels_pallas.lora_matmul.gpu_config import LANES, round_up
from kernels_pallas.shared_memory import tiled


def build(*, dtype: Any, d_in: int, members: int, rank: int, shrinks: int, pieces: int) -> Any:
    """Builds the kernel: (x, a, where this layer's slots begin, ranks, the pieces' arrays) ->
    hidden ``[pieces, shrinks, 128, members * rank rounded up to 64]``. Its sum over the shrinks
    is the product; what lies beyond the last piece is not written."""
    ranks_k = rank // PART
    rows = round_up(members * rank, LANES)
    groups = rows // LANES
    # True ranks decide which parts of A are read.
    copies = LANES // PART if ranks_k > 1 else 1
    length = LANES // copies
    steps = d_in // (shrinks * SHRINK_LANES * LANES)
    stages = min(STAGES, steps)
    wide = tiled(LANES, 2)

    def prompt_shrink(
        x,  # [T, d_in]
        a,  # [layers * slots, members * rank, d_in]
        first_slot,
        ranks,
        piece_slots,
        piece_starts,
        piece_counts,
        tile_edges,
        hidden,
        a_smem,  # [stages, lanes, 64, 64]
        x_smem,  # [stages, lanes, 128, 64]
        out_smem,  # [128, 64]
        full,
    ):
        piece, group = lax.axis_index("piece"), lax.axis_index("group")
        cut = lax.axis_index("cut")

        @pl.when(piece < tile_edges[tile_edges.shape[0] - 1])
        def _of_piece():
            slot, begin = piece_slots[piece], piece_starts[piece]
            first_token = lax.div(begin, TILE_TOKENS) * TILE_TOKENS
            true_rank = ranks[slot] if ranks_k > 1 else None

            def fetch(i):
                stage = lax.rem(i, stages)
                for lane in range(SHRINK_LANES):
                    k = pl.ds(((cut * steps + i) * SHRINK_LANES + lane) * LANES, LANES)
                    for part in range(copies):
                        row = group * LANES + part * length
                        if true_rank is not None:
                            # Beyond it: out of the array's bounds, where the copy engine writes
                            # zeros without reading.
                            row = jnp.where(lax.rem(row, rank) < true_rank, row, members * rank)
                        plgpu.copy_gmem_to_smem(
                            a.at[first_slot[0] + slot, pl.ds(row, length), k],
                            a_smem.at[stage, lane, pl.ds(part * length, length)],
                            full.at[stage],
                        )
                    # Past the last token, too.
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(first_token, TILE_TOKENS), k],
                        x_smem.at[stage, lane],
                        full.at[stage],
                    )

            def multiply(acc):
                for i in range(stages):
                    fetch(jnp.int32(i))

                @pl.loop(0, steps)
                def _step(i):
                    stage = lax.rem(i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    for lane in range(SHRINK_LANES):
                        plgpu.wgmma(
                            acc, a_smem.at[stage, lane], x_smem.at[stage, lane].transpose((1, 0))
                        )
                    plgpu.wgmma_wait(0)
                    pl.when(i + stages < steps)(lambda: fetch(i + stages))

                return acc[...]

            total = pl.run_scoped(multiply, plgpu.ACC((LANES, TILE_TOKENS)))
            token = plgpu.broadcasted_iota(
                jnp.int32, (LANES, TILE_TOKENS), 1, layout=plgpu.Layout.WGMMA
            )
            place = token + first_token - begin
            # Other pieces' tokens, or padding, NaN perhaps.
            of_piece = (place >= 0) & (place < piece_counts[piece])
            total = jnp.where(of_piece, total, 0.0).astype(dtype)
            out_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                total, plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, hidden.at[piece, cut, :, pl.ds(group * LANES, LANES)])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        prompt_shrink,
        out_type=jax.ShapeDtypeStruct((pieces, shrinks, TILE_TOKENS, rows), dtype),
        grid=(pieces, groups, shrinks),
        grid_names=("piece", "group", "cut"),
        scratch_types=[
            plgpu.SMEM((stages, SHRINK_LANES, LANES, LANES), dtype, transforms=wide),
            plgpu.SMEM((stages, SHRINK_LANES, TILE_TOKENS, LANES), dtype, transforms=wide),
            plgpu.SMEM((TILE_TOKENS, LANES), dtype, transforms=wide),
            plgpu.Barrier(num_barriers=stages, num_arrivals=SHRINK_LANES * (copies + 1)),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )
