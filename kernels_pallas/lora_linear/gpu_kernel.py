"""The kernel of a decode step's linear on NVIDIA Hopper: base product, adapters, residual or gate.

A decode step waits for weights, so the kernel is a pump: one warpgroup keeps the copy engine busy
with tiles of W and x, others multiply. W is the M side of ``wgmma`` (64 rows at a time) and the
step's tokens its N side. Where W has too few rows to fill the chip, a cluster of thread blocks
shares the contraction and adds up its sums through distributed shared memory, in a fixed order.

An adapter is more of the same contraction. While W streams, one warpgroup of some thread blocks
computes ``x a^T`` of a block of tokens (the shrink), writes it to device memory and signals. When
all have, every thread block contracts, after W, its columns of each block's ``b`` with that block's
rows. The copy engine puts those rows in their place among the step's tokens and fills the rest,
which lies outside the array, with zeros: no token meets another's adapter, and nothing is masked.
A shrink may be cut along d_in; its parts are then contracted one by one, which adds them up.

Thread blocks wait for each other's shrinks, so all of them must fit on the device at once. The
counter of shrinks goes on to count the thread blocks that have waited; one of them then resets it.
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

from kernels_pallas.lora_linear import gpu_counter
from kernels_pallas.lora_linear.gpu_config import PART, Config, computed_tokens
from kernels_pallas.lora_matmul.gpu_config import LANES, round_up
from kernels_pallas.shared_memory import tiled, two_views

_AHEAD = 4
"""Blocks whose slots and starts are loaded before they are needed: device memory takes as long to
answer as the copies of several blocks to be issued."""


def build(
    config: Config,
    *,
    dtype: Any,
    tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    blocks: int,
    block_tokens: int,
    has_residual: bool,
    gated: bool,
) -> Any:
    """Builds the kernel: (x, w, residual?, a, b, the batch's arrays and a counter's Ref?) -> (y,
    hidden?)."""
    # From here on those that are computed.
    given_tokens, tokens = tokens, computed_tokens(tokens)
    consumers, parts, cluster = config.consumers, config.parts, config.cluster
    stages, ring, shrinks = config.stages, config.ring, config.shrinks
    with_lora = blocks > 0
    producer, shrinker = consumers, consumers + 1
    part_rows = consumers * LANES
    columns = sum(splits) // (2 if gated else 1)
    tile = part_rows if gated else parts * part_rows
    tiles = columns // tile
    steps = d_in // (cluster * LANES)
    out_parts = 1 if gated else parts
    # Tokens whose sums one thread block of a cluster adds up.
    share = max(8, tokens // cluster)
    shares = tokens // share
    edges = tuple(itertools.accumulate(splits))

    members = len(splits)
    ranks_k = rank // PART
    hidden_parts = parts if gated else 1
    a_rows = round_up(members * rank, LANES)
    shrink_lanes = math.gcd(2, d_in // (shrinks * LANES))
    shrink_steps = d_in // (shrinks * shrink_lanes * LANES)
    # Rows of A that are copied alone, as (row in the slot, its first rank, length): true ranks
    # decide which are read.
    a_parts = [(m * rank + j, j, PART) for m in range(members) for j in range(0, rank, PART)]
    if ranks_k == 1:
        a_parts = [(0, 0, members * rank)]

    wide = tiled(LANES, 2)
    pipeline = [
        plgpu.SMEM((stages, parts, consumers, LANES, LANES), dtype, transforms=wide),
        plgpu.SMEM((stages, tokens, LANES), dtype, transforms=wide),
    ]
    ending = [plgpu.SMEM((consumers, out_parts, share, LANES), dtype, transforms=wide)]
    if cluster > 1:
        partial = (shares, parts, consumers, LANES, share)
        ending.append(plgpu.SMEM(partial, jnp.float32, transforms=tiled(share, 4)))
    scratch: dict[str, Any] = {
        "smem": plgpu.RefUnion(pipeline, ending),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=parts * consumers + 1),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        "drained": plgpu.Barrier(num_arrivals=consumers),
    }
    if cluster > 1:
        scratch["summed"] = plgpu.ClusterBarrier(collective_axes=("cta",), num_barriers=consumers)
    if has_residual:
        shape = (consumers, out_parts, share, LANES)
        scratch["residual_smem"] = plgpu.SMEM(shape, dtype, transforms=wide)
        scratch["residual_full"] = plgpu.Barrier(num_arrivals=consumers * out_parts)
    if with_lora:
        copies = ranks_k * (parts * consumers + hidden_parts * shrinks)
        shape = (config.shrink_stages, shrink_lanes, block_tokens, LANES)
        scratch |= {
            "b_smem": plgpu.SMEM(
                (ring, parts, consumers, ranks_k, PART, LANES), dtype, transforms=tiled(PART, 2)
            ),
            "hidden_views": two_views((ring, hidden_parts, shrinks, ranks_k, tokens, PART), dtype),
            "lora_full": plgpu.Barrier(num_barriers=ring, num_arrivals=copies),
            "lora_empty": plgpu.Barrier(num_barriers=ring, num_arrivals=consumers),
            "a_smem": plgpu.SMEM(
                (config.shrink_stages, shrink_lanes, a_rows, LANES), dtype, transforms=wide
            ),
            "shrink_x_views": two_views(shape, dtype),
            "shrink_full": plgpu.Barrier(
                num_barriers=config.shrink_stages, num_arrivals=shrink_lanes * (len(a_parts) + 1)
            ),
            "shrunk_smem": plgpu.SMEM((block_tokens, a_rows), dtype, transforms=tiled(PART, 2)),
        }

    def lora_linear_kernel(
        x,  # [T, d_in]
        w,  # [d_out, d_in]
        *refs,
        smem,
        full,
        empty,
        drained,
        summed=None,
        residual_smem=None,  # [consumers, parts, share, 64]
        residual_full=None,
        b_smem=None,  # [ring, parts, consumers, rank / 16, 16, 64]
        hidden_views=None,  # [ring, parts, shrinks, rank / 16, tokens, 16]
        lora_full=None,
        lora_empty=None,
        a_smem=None,  # [stages, lanes, members * rank, 64]
        shrink_x_views=None,  # [stages, lanes, block_tokens, 64]
        shrink_full=None,
        shrunk_smem=None,  # [block_tokens, members * rank]
    ):
        rest = list(refs)
        residual: Any = rest.pop(0) if has_residual else None  # [T, d_out]
        if with_lora:
            a, b, first_slot, ranks, num_blocks, *blocks_of, shrunk, y, hidden = rest
            block_slots, block_starts, block_counts = blocks_of
            # shrunk: [1], hidden: [W, shrinks, block_tokens, members * rank]
        else:
            (y,) = rest
        # w_smem: [stages, parts, consumers, 64, 64], x_smem: [stages, T, 64]
        (w_smem, x_smem), (out_smem, *partial_smem) = smem
        index = lax.axis_index("tile")
        cta = lax.axis_index("cta") if cluster > 1 else 0
        me = lax.axis_index("warpgroup")

        def tokens_from(start, count):
            """So many rows of x, the residual or y. Past the last, which JAX lets only a start
            be that it does not know, the copy engine reads zeros and writes nothing."""
            return pl.ds(jnp.int32(start), count)

        def row(part, consumer):
            """First row of W, and column of b, of a consumer's part of the tile."""
            if gated:
                return part * columns + index * part_rows + consumer * LANES
            return index * tile + part * part_rows + consumer * LANES

        def first_rank(j, true_rank):
            # Beyond the true rank: out of the array's bounds, where the copy engine writes zeros
            # without reading.
            return jnp.where(j < true_rank, j, rank) if ranks_k > 1 else j

        if with_lora:
            count_blocks, first = num_blocks[0], first_slot[0]
            # The blocks of a step are dealt to the thread blocks of a cluster.
            my_blocks = lax.div(count_blocks - cta + cluster - 1, cluster)
            units = count_blocks * shrinks

        def slot_and_start(i):
            block = jnp.minimum(cta + i * cluster, blocks - 1)
            return block_slots[block], block_starts[block]

        def fetch_b(i, slot):
            at = lax.rem(i, ring)
            true_rank = ranks[slot] if ranks_k > 1 else None
            for j in range(ranks_k):
                source = pl.ds(first_rank(j * PART, true_rank), PART)
                for part, consumer in itertools.product(range(parts), range(consumers)):
                    plgpu.copy_gmem_to_smem(
                        b.at[first + slot, source, pl.ds(row(part, consumer), LANES)],
                        b_smem.at[at, part, consumer, j],
                        lora_full.at[at],
                    )

        def fetch_hidden(i, start):
            at, block = lax.rem(i, ring), cta + i * cluster
            # Token t of the step is row t - start of the block.
            source = pl.ds(0 - start, tokens)
            for part in range(hidden_parts):
                column = row(part, 0)
                member = sum(jnp.where(column >= edge, 1, 0) for edge in edges[:-1])
                for cut, j in itertools.product(range(shrinks), range(ranks_k)):
                    plgpu.copy_gmem_to_smem(
                        hidden.at[block, cut, source, pl.ds(member * rank + j * PART, PART)],
                        hidden_views[0].at[at, part, cut, j],
                        lora_full.at[at],
                    )

        # Sums that fill most of a thread's share of registers take some of those that only copy.
        sums_overflow = with_lora and parts * tokens // 2 > 64

        @pl.when(me == producer)
        def _produce():
            if sums_overflow:
                plgpu.set_max_registers(56, action="decrease")
            if with_lora:
                coming = [slot_and_start(i) for i in range(_AHEAD)]
            if has_residual:
                for part, consumer in itertools.product(range(out_parts), range(consumers)):
                    plgpu.copy_gmem_to_smem(
                        residual.at[
                            tokens_from(cta * share, share), pl.ds(row(part, consumer), LANES)
                        ],
                        residual_smem.at[consumer, part],
                        residual_full,
                    )

            @pl.loop(0, steps)
            def _step(i):
                stage, k = lax.rem(i, stages), (i * cluster + cta) * LANES
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                for part, consumer in itertools.product(range(parts), range(consumers)):
                    plgpu.copy_gmem_to_smem(
                        w.at[pl.ds(row(part, consumer), LANES), pl.ds(k, LANES)],
                        w_smem.at[stage, part, consumer],
                        full.at[stage],
                    )
                plgpu.copy_gmem_to_smem(
                    x.at[tokens_from(0, tokens), pl.ds(k, LANES)],
                    x_smem.at[stage],
                    full.at[stage],
                )

            if with_lora:

                @pl.loop(0, jnp.minimum(my_blocks, ring))
                def _early(i):
                    fetch_b(i, slot_and_start(i)[0])

                gpu_counter.wait_for(shrunk, units)
                gpu_counter.add_one(shrunk)

                def add_block(i, coming):
                    (slot, start), *rest = coming
                    later = slot_and_start(i + _AHEAD)

                    @pl.when(i >= ring)
                    def _refill():
                        plgpu.barrier_wait(lora_empty.at[lax.rem(i, ring)])
                        fetch_b(i, slot)

                    fetch_hidden(i, start)
                    return [*rest, later]

                lax.fori_loop(0, my_blocks, add_block, coming)

                @pl.when(index * cluster + cta == 0)
                def _reset():
                    # For the next kernel, when nobody waits any longer.
                    gpu_counter.wait_for(shrunk, units + tiles * cluster, take=True)

        @pl.when(me == shrinker)
        def _shrink():
            if not with_lora:
                return
            if sums_overflow:
                plgpu.set_max_registers(56, action="decrease")
            x_copied, shrink_x = shrink_x_views
            flat = index * cluster + cta

            @pl.loop(0, lax.div(units - flat + tiles * cluster - 1, tiles * cluster))
            def _unit(turn):
                unit = flat + turn * tiles * cluster
                block, cut = lax.div(unit, shrinks), lax.rem(unit, shrinks)
                slot, start, count = block_slots[block], block_starts[block], block_counts[block]
                true_rank = ranks[slot] if ranks_k > 1 else None

                def stage_of(i):
                    return lax.rem(turn * shrink_steps + i, config.shrink_stages)

                def fetch(i):
                    stage = stage_of(i)
                    for lane in range(shrink_lanes):
                        k = ((cut * shrink_steps + i) * shrink_lanes + lane) * LANES
                        for to, j, length in a_parts:
                            source: Any = to
                            if true_rank is not None:
                                source = jnp.where(j < true_rank, to, members * rank)
                            plgpu.copy_gmem_to_smem(
                                a.at[first + slot, pl.ds(source, length), pl.ds(k, LANES)],
                                a_smem.at[stage, lane, to : to + length],
                                shrink_full.at[stage],
                            )
                        plgpu.copy_gmem_to_smem(
                            x.at[pl.ds(start, block_tokens), pl.ds(k, LANES)],
                            x_copied.at[stage, lane],
                            shrink_full.at[stage],
                        )

                def multiply(acc):
                    for i in range(min(config.shrink_stages, shrink_steps)):
                        fetch(jnp.int32(i))

                    @pl.loop(0, shrink_steps)
                    def _step(i):
                        stage = stage_of(i)
                        plgpu.barrier_wait(shrink_full.at[stage])
                        for lane in range(shrink_lanes):
                            plgpu.wgmma(
                                acc,
                                a_smem.at[stage, lane],
                                shrink_x.at[stage, lane].transpose((1, 0)),
                            )
                        plgpu.wgmma_wait(0)
                        later = i + config.shrink_stages
                        pl.when(later < shrink_steps)(lambda: fetch(later))

                    return acc[...]

                total = pl.run_scoped(multiply, plgpu.ACC((a_rows, block_tokens)))
                token = plgpu.broadcasted_iota(
                    jnp.int32, (a_rows, block_tokens), 1, layout=plgpu.Layout.WGMMA
                )
                # Other blocks' tokens, or padding, NaN perhaps.
                total = jnp.where(token < count, total, 0.0).astype(dtype)
                shrunk_smem.transpose((1, 0))[...] = plgpu.layout_cast(
                    total, plgpu.Layout.WGMMA_TRANSPOSED
                )
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(shrunk_smem, hidden.at[block, cut])
                plgpu.wait_smem_to_gmem(0)
                gpu_counter.add_one(shrunk)

        @pl.when(me < consumers)
        def _consume():
            if sums_overflow:
                plgpu.set_max_registers(200, action="increase")

            def multiply(*accs):
                @pl.loop(0, steps)
                def _step(i):
                    stage = lax.rem(i, stages)
                    plgpu.barrier_wait(full.at[stage])
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(
                            acc, w_smem.at[stage, part, me], x_smem.at[stage].transpose((1, 0))
                        )
                    # All but this step's are done.
                    plgpu.wgmma_wait(parts)
                    before = lax.rem(i + stages - 1, stages)
                    pl.when(i > 0)(lambda: plgpu.barrier_arrive(empty.at[before]))

                if with_lora:

                    @pl.loop(0, my_blocks)
                    def _block(i):
                        at = lax.rem(i, ring)
                        plgpu.barrier_wait(lora_full.at[at])
                        for (part, acc), cut, j in itertools.product(
                            enumerate(accs), range(shrinks), range(ranks_k)
                        ):
                            rows = hidden_views[1].at[at, part if gated else 0, cut, j]
                            plgpu.wgmma(
                                acc,
                                b_smem.at[at, part, me, j].transpose((1, 0)),
                                rows.transpose((1, 0)),
                            )
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(lora_empty.at[at])

                plgpu.wgmma_wait(0)
                return tuple(acc[...] for acc in accs)

            sums = pl.run_scoped(multiply, *[plgpu.ACC((LANES, tokens)) for _ in range(parts)])
            # What follows lies where the pipeline did.
            plgpu.barrier_arrive(drained)
            plgpu.barrier_wait(drained)

            def finish(values):
                if gated:
                    gate, up = values
                    values = [gate / (1.0 + jnp.exp(-gate)) * up]
                if has_residual:
                    plgpu.barrier_wait(residual_full)
                for part, value in enumerate(values):
                    if has_residual:
                        before = residual_smem.at[me, part].transpose((1, 0))[...]
                        before = plgpu.layout_cast(before, plgpu.Layout.WGMMA_TRANSPOSED)
                        before = plgpu.layout_cast(before, plgpu.Layout.WGMMA)
                        value = value + before.astype(jnp.float32)  # noqa: PLW2901
                    out_smem.at[me, part].transpose((1, 0))[...] = plgpu.layout_cast(
                        value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                plgpu.commit_smem()
                for part in range(out_parts):
                    plgpu.copy_smem_to_gmem(
                        out_smem.at[me, part],
                        y.at[tokens_from(cta * share, share), pl.ds(row(part, me), LANES)],
                    )
                plgpu.wait_smem_to_gmem(0)

            if cluster == 1:
                finish(sums)
                return
            (partial_sums,) = partial_smem
            for part, value in enumerate(sums):
                for j in range(shares):
                    partial_sums.at[j, part, me][...] = value[:, j * share : (j + 1) * share]
            plgpu.barrier_arrive(summed.at[me])
            plgpu.barrier_wait(summed.at[me])

            @pl.when(cta < shares)
            def _mine():
                mine = jnp.minimum(cta, shares - 1)
                peers = [
                    plgpu.cluster_ref(partial_sums, {"cta": jnp.int32(peer)})
                    for peer in range(cluster)
                ]
                finish(
                    [sum(peer.at[mine, part, me][...] for peer in peers) for part in range(parts)]
                )

            # A peer may still read.
            plgpu.barrier_arrive(summed.at[me])
            plgpu.barrier_wait(summed.at[me])

    def lora_linear(*refs):
        kernel = functools.partial(lora_linear_kernel, *refs)
        pl.run_scoped(kernel, collective_axes="warpgroup", **scratch)

    out_type = [jax.ShapeDtypeStruct((given_tokens, columns), dtype)]
    if with_lora:
        out_type.append(jax.ShapeDtypeStruct((blocks, shrinks, block_tokens, a_rows), dtype))
    # pl.kernel, not plgpu.kernel: only it takes the counter as a Ref, which is updated in place.
    return pl.kernel(
        lora_linear,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(tiles,),
            grid_names=("tile",),
            cluster=(cluster,) if cluster > 1 else (),
            cluster_names=("cta",) if cluster > 1 else (),
            num_threads=consumers + 1 + with_lora,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name="lora_linear",
    )
