"""The op's kernel on NVIDIA Hopper, in Mosaic GPU: shrink, expand and add fused, or also the gate.

A cluster of thread blocks serves one block of tokens. Each thread block contracts its share of
d_in (the shrink, ``x @ a.T``), the partial sums are exchanged through distributed shared memory,
and each then fills its share of d_out (the expand), which the copy engine adds to y in place. A
block's rows of x, its slot's A and B are all requested before the first arithmetic, so that a
decode step pays for one trip to memory, not for a chain of them.

The weights are the M side of ``wgmma`` (64 rows) and the tokens its N side, as few as 8: a decode
step has few tokens, and a token's column never meets another's, so that neighbours of a block
(padding with NaN among them) need no mask.

With a gate a tile of y comes to shared memory beside B's, the product is added there, and what is
written is another array of half the columns. Tokens without an adapter have blocks, too.

Cost: only slots that a block names are read, and of a rank capacity above 16 only the parts (of
16 rows) that hold true ranks: a part beyond them is requested out of the array's bounds, where
the copy engine writes zeros without reading. What is left above the true rank is masked in
registers.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.lora_matmul.gpu_config import LANES, Config, out_tiles, round_up
from kernels_pallas.shared_memory import tiled, two_views


def build(
    config: Config,
    *,
    dtype: Any,
    num_tokens: int,
    num_slots: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    tokens: int,
    blocks: int,
    gated: bool,
) -> Any:
    """Builds the kernel: (y, x, a, b, first slot, ranks, the blocks' slots, starts and counts),
    where y is a Ref, or, gated, an array, and the result is another."""
    members = len(splits)
    pitch = round_up(rank, 16)  # a member's rows in shared memory: wgmma contracts 16 at a time
    rows = round_up(members * pitch, 64)  # wgmma's M
    edges = tuple(itertools.accumulate(splits))  # first column after each member
    # Parts of A's and B's rows that are copied alone, as (row in the array, row in shared memory,
    # length): whole when small, else 16 rows each, so that true ranks decide what is read.
    part = min(rank, 16)
    a_parts = [
        (m * rank + j, m * pitch + j, j, part) for m in range(members) for j in range(0, rank, part)
    ]
    if rank == pitch == part:
        a_parts = [(0, 0, 0, members * rank)]
    b_parts = [(j, part) for j in range(0, rank, part)]

    workers = config.groups * config.cluster * config.warpgroups
    steps_k = -(-d_in // (config.tile_k * config.cluster))
    # With a gate a tile is two of y's: the same columns of either member.
    parts = 2 if gated else 1
    columns = edges[-1] // parts
    tiles_n = columns // config.tile_n
    stages_k, stages_n, out_slots = config.stages_k, config.stages_n, out_tiles(tokens, gated=gated)

    lanes_k, lanes_n = config.tile_k // LANES, config.tile_n // LANES
    wide = tiled(LANES, 2)
    scratch = {
        "a_smem": plgpu.SMEM((stages_k, rows, config.tile_k), dtype, transforms=wide),
        "x_views": two_views((stages_k, lanes_k, tokens, LANES), dtype),
        "b_smem": plgpu.SMEM(
            (config.warpgroups, stages_n, parts, pitch, config.tile_n), dtype, transforms=wide
        ),
        "partial_smem": plgpu.SMEM((rows, tokens), jnp.float32, transforms=tiled(tokens, 4)),
        "hidden_smem": plgpu.SMEM((tokens, rows), dtype, transforms=tiled(16, 2)),
        "out_views": two_views((config.warpgroups, out_slots, lanes_n, tokens, LANES), dtype),
        "k_barrier": plgpu.Barrier(num_barriers=stages_k, num_arrivals=len(a_parts) + lanes_k),
        "n_barrier": plgpu.Barrier(
            num_barriers=config.warpgroups * stages_n,
            num_arrivals=parts * (len(b_parts) + (lanes_n if gated else 0)),
        ),
        "hidden_barrier": plgpu.Barrier(num_barriers=1),
        "cluster_barrier": plgpu.ClusterBarrier(collective_axes=("cta",), num_barriers=1),
    }
    if gated:
        shape = (config.warpgroups, stages_n, parts, lanes_n, tokens, LANES)
        scratch["y_views"] = two_views(shape, dtype)

    def lora_matmul_kernel(
        y,  # [T, d_out]
        x,  # [T, d_in]
        a,  # [LS, members * rank, d_in]
        b,  # [LS, rank, d_out]
        first_slot,  # [1]
        ranks,  # [S]
        block_slots,  # [W]
        block_starts,  # [W]
        block_counts,  # [W]
        out=None,  # [T, d_out / 2], with a gate
        *,
        a_smem,  # [stages_k, rows, tile_k]
        x_views,  # [stages_k, tile_k / 64, tokens, 64]
        b_smem,  # [warpgroups, stages_n, parts, pitch, tile_n]
        partial_smem,  # [rows, tokens]
        hidden_smem,  # [tokens, rows]
        out_views,  # [warpgroups, slots, tile_n / 64, tokens, 64]
        k_barrier,
        n_barrier,
        hidden_barrier,
        cluster_barrier,
        y_views=None,  # [warpgroups, stages_n, parts, tile_n / 64, tokens, 64]
    ):
        block = lax.axis_index("block")
        cta = lax.axis_index("cta")
        warpgroup = lax.axis_index("warpgroup")
        worker = lax.axis_index("group") * config.cluster + cta
        worker = worker * config.warpgroups + warpgroup
        x_copied, x_smem = x_views
        out_copied, out_smem = out_views

        slot, start, count = block_slots[block], block_starts[block], block_counts[block]

        @pl.when(count > 0)  # blocks of padding have no tokens
        def _block():
            place = first_slot[0] + slot
            if gated:
                # Tokens without an adapter have a slot that is none, out of the arrays' bounds.
                true_rank = ranks[jnp.minimum(slot, num_slots - 1)]
                true_rank = jnp.where(slot < num_slots, true_rank, 0)
                place = jnp.where(slot < num_slots, place, a.shape[0])
            else:
                true_rank = ranks[slot]

            def part_row(row, first, past_end):
                # What is one part only is read whole: the address does not wait for the rank.
                if rank <= part:
                    return row
                return jnp.where(first < true_rank, row, past_end)

            def fetch_k(i):
                stage, k = lax.rem(i, stages_k), (cta + i * config.cluster) * config.tile_k
                for row, to, first, length in a_parts:
                    source = pl.ds(part_row(row, first, members * rank), length)
                    plgpu.copy_gmem_to_smem(
                        a.at[place, source, pl.ds(k, config.tile_k)],
                        a_smem.at[stage, to : to + length],
                        k_barrier.at[stage],
                    )
                for j in range(lanes_k):
                    plgpu.copy_gmem_to_smem(
                        x.at[pl.ds(start, tokens), pl.ds(k + j * LANES, LANES)],
                        x_copied.at[stage, j],
                        k_barrier.at[stage],
                    )

            def shrink(acc):
                @pl.loop(0, steps_k)
                def _step(i):
                    stage = lax.rem(i, stages_k)
                    plgpu.barrier_wait(k_barrier.at[stage])
                    for j in range(lanes_k):
                        plgpu.wgmma(
                            acc,
                            a_smem.at[stage, :, j * LANES : (j + 1) * LANES],
                            x_smem.at[stage, j].transpose((1, 0)),
                        )
                    plgpu.wgmma_wait(0)
                    pl.when(i + stages_k < steps_k)(lambda: fetch_k(i + stages_k))

                return acc[...]

            def exchange(partial):
                partial_smem[...] = partial
                plgpu.barrier_arrive(cluster_barrier)
                plgpu.barrier_wait(cluster_barrier)
                return sum(
                    plgpu.cluster_ref(partial_smem, {"cta": jnp.int32(peer)})[...]
                    for peer in range(config.cluster)
                )

            def n_slot(i):
                stage = lax.rem(i, stages_n)
                column = (worker + i * workers) * config.tile_n
                return stage, n_barrier.at[warpgroup * stages_n + stage], column

            def fetch_n(i):
                stage, barrier, first = n_slot(i)
                for p in range(parts):
                    column = first + p * columns
                    for row, length in b_parts:
                        source = pl.ds(part_row(row, row, rank), length)
                        plgpu.copy_gmem_to_smem(
                            b.at[place, source, pl.ds(column, config.tile_n)],
                            b_smem.at[warpgroup, stage, p, row : row + length],
                            barrier,
                        )
                    for j in range(lanes_n if gated else 0):
                        plgpu.copy_gmem_to_smem(
                            y.at[pl.ds(start, tokens), pl.ds(column + j * LANES, LANES)],
                            y_views[0].at[warpgroup, stage, p, j],
                            barrier,
                        )

            def product(stage, p, member):
                """The LoRA product in a tile of y, ``[tile_n, tokens]``."""
                weight = plgpu.layout_cast(
                    b_smem.at[warpgroup, stage, p].transpose((1, 0))[...],
                    plgpu.Layout.WGMMA_TRANSPOSED,
                )
                weight = plgpu.layout_cast(weight, plgpu.Layout.WGMMA)
                k = plgpu.broadcasted_iota(
                    jnp.int32, (config.tile_n, pitch), 1, layout=plgpu.Layout.WGMMA
                )
                weight = jnp.where(k < true_rank, weight, jnp.zeros_like(weight))

                def expand(acc):
                    plgpu.wgmma(
                        acc,
                        weight,
                        hidden_smem.at[:, pl.ds(member * pitch, pitch)].transpose((1, 0)),
                    )
                    return acc[...]

                delta = pl.run_scoped(expand, plgpu.ACC((config.tile_n, tokens))).astype(dtype)
                return plgpu.layout_cast(delta, plgpu.Layout.WGMMA_TRANSPOSED)

            def gate_and_up(stage, j, deltas):
                """64 columns of the result, ``[64, tokens]``."""
                sums = []
                for p, delta in enumerate(deltas):
                    before = plgpu.layout_cast(
                        y_views[1].at[warpgroup, stage, p, j].transpose((1, 0))[...],
                        plgpu.Layout.WGMMA_TRANSPOSED,
                    )
                    sums.append((before + delta).astype(jnp.float32))
                gate, up = sums
                # Its square is the sigmoid: an instruction where a division takes many.
                root = lax.rsqrt(1.0 + jnp.exp2(gate * -math.log2(math.e)))
                return (gate * root * root * up).astype(dtype)

            def store_rows(at, column, first, length):
                for j in range(lanes_n):
                    rows_out = pl.ds(start + first, length), pl.ds(column + j * LANES, LANES)
                    plgpu.copy_smem_to_gmem(
                        out_copied.at[warpgroup, at, j, pl.ds(first, length)],
                        out.at[rows_out] if gated else y.at[rows_out],
                        commit_group=False,
                        reduction_op=None if gated else "add",
                    )

            my_tiles = lax.div(tiles_n - worker + workers - 1, workers)

            @pl.when(warpgroup == 0)
            def _fetch_first():
                for i in range(min(stages_k, steps_k)):
                    fetch_k(jnp.int32(i))

            for i in range(stages_n):
                pl.when(i < my_tiles)(functools.partial(fetch_n, jnp.int32(i)))

            @pl.when(warpgroup == 0)
            def _shrink():
                hidden = pl.run_scoped(shrink, plgpu.ACC((rows, tokens)))
                if config.cluster > 1:
                    hidden = exchange(hidden)
                row = plgpu.broadcasted_iota(
                    jnp.int32, (rows, tokens), 0, layout=plgpu.Layout.WGMMA
                )
                hidden = jnp.where(lax.rem(row, pitch) < true_rank, hidden, 0.0).astype(dtype)
                hidden_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                    hidden, plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                plgpu.barrier_arrive(hidden_barrier)
                if config.cluster > 1:
                    plgpu.barrier_arrive(cluster_barrier)

            plgpu.barrier_wait(hidden_barrier)

            @pl.loop(0, my_tiles)
            def _tile(i):
                stage, barrier, column = n_slot(i)
                member = sum((column >= edge).astype(jnp.int32) for edge in edges[:-1])
                plgpu.barrier_wait(barrier)
                if gated:
                    deltas = [product(stage, p, p) for p in range(parts)]
                else:
                    deltas = [product(stage, 0, member)]
                tile = []
                for j in range(lanes_n):
                    lane = [delta[j * LANES : (j + 1) * LANES] for delta in deltas]
                    tile.append(gate_and_up(stage, j, lane) if gated else lane[0])
                at = lax.rem(i, out_slots)
                plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
                for j, values in enumerate(tile):
                    out_smem.at[warpgroup, at, j].transpose((1, 0))[...] = values
                plgpu.commit_smem()
                # Exactly the block's rows: a copy's size is fixed, so one for each power of two.
                done: Any = 0
                for length in _powers(tokens):
                    present = lax.bitwise_and(count, length)
                    pl.when(present > 0)(functools.partial(store_rows, at, column, done, length))
                    done += present
                plgpu.commit_smem_to_gmem_group()
                pl.when(i + stages_n < my_tiles)(lambda: fetch_n(i + stages_n))

            plgpu.wait_smem_to_gmem(0)
            if config.cluster > 1:
                # A peer may still read partial_smem.
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(cluster_barrier))

    def body(*refs):
        kernel = functools.partial(lora_matmul_kernel, *refs)
        pl.run_scoped(kernel, collective_axes="warpgroup", **scratch)

    # pl.kernel, not plgpu.kernel: only it takes y as a Ref, which is updated in place.
    return pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_tokens, columns), dtype) if gated else (),
        mesh=plgpu.Mesh(
            grid=(blocks, config.groups),
            grid_names=("block", "group"),
            cluster=(config.cluster,),
            cluster_names=("cta",),
            num_threads=config.warpgroups,
            thread_name="warpgroup",
        ),
        # Warpgroup semantics are the default from JAX 0.11 on.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        name="gated_lora_matmul" if gated else "lora_matmul",
    )


def _powers(limit: int) -> list[int]:
    """Powers of two from the largest that is at most ``limit`` down to 1."""
    return [1 << e for e in reversed(range(limit.bit_length()))]
