"""The kernel of a decode step's linear on NVIDIA Hopper: base product, adapters, residual or gate.

A decode step waits for weights, so the kernel is a pump: one warpgroup keeps the copy engine busy
with tiles of W and x, others multiply. W is the M side of ``wgmma`` (64 rows at a time) and the
step's tokens its N side. Where W has too few rows to fill the chip, a cluster of thread blocks
shares the contraction and adds up its sums through distributed shared memory, in a fixed order.

An adapter is more of the same contraction. While W streams, one warpgroup of some thread blocks
computes ``x a^T`` of a block of tokens (the shrink), writes it to device memory and signals. It
fills a strip of 16 columns there for every 16 ranks, with zeros for the step's other tokens: no
token meets another's adapter. When all have, every thread block contracts its columns of ``b`` with
them, four strips at a time, whosever they are: after W, through the same pipeline, as if they were
more of W and x. A shrink may be cut along d_in; each part has strips, which adds them up.

Thread blocks wait for each other's shrinks, so all of them must fit on the device at once. The
counter of shrinks goes on to count the thread blocks that have waited; one of them then resets it.
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

from kernels_pallas import gpu_counter
from kernels_pallas.dependent_launch import wait_for_previous
from kernels_pallas.lora_linear.gpu_config import PART, Config, computed_tokens, idle_bytes
from kernels_pallas.lora_linear.gpu_ending import Ending
from kernels_pallas.lora_linear.gpu_pipeline import contract, free_stage
from kernels_pallas.lora_linear.gpu_shrink import STRIPS, Adapters, Shrinker, Shrinks
from kernels_pallas.lora_matmul.gpu_config import LANES
from kernels_pallas.shared_memory import tiled

_AHEAD = 2
"""Groups of strips whose slots are loaded before they are needed: device memory takes as long to
answer as the copies of several to be issued."""


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
    early: bool,
) -> Any:
    """Builds the kernel: (x, w, residual?, a, b, the batch's arrays and a counter's Ref?) -> (y,
    hidden?)."""
    # From here on those that are computed.
    given_tokens, tokens = tokens, computed_tokens(tokens)
    consumers, parts, cluster = config.consumers, config.parts, config.cluster
    stages, together = config.stages, config.together
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

    shrinks = Shrinks(
        dtype=dtype,
        tokens=tokens,
        d_in=d_in,
        members=len(splits),
        rank=rank,
        blocks=blocks,
        block_tokens=block_tokens,
        cuts=config.shrinks,
        stages=config.shrink_stages,
    )
    # A gate's two members have strips of their own, contracted in turn.
    turns = parts if gated else 1

    wide = tiled(LANES, 2)
    pipeline = [
        plgpu.SMEM((stages, parts, consumers, LANES, LANES), dtype, transforms=wide),
        plgpu.SMEM((stages, tokens, LANES), dtype, transforms=wide),
    ]
    results = plgpu.SMEM((consumers, out_parts, share, LANES), dtype, transforms=wide)
    afterwards = [results]
    if cluster > 1:
        partial = (shares, parts, consumers, LANES, share)
        afterwards.append(plgpu.SMEM(partial, jnp.float32, transforms=tiled(share, 4)))
    scratch: dict[str, Any] = {
        "smem": plgpu.RefUnion(pipeline, afterwards),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=parts * consumers + 1),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        "drained": plgpu.Barrier(num_arrivals=consumers),
    }
    if cluster > 1:
        scratch["summed"] = plgpu.ClusterBarrier(collective_axes=("cta",), num_barriers=consumers)
    if has_residual:
        scratch["residual_smem"] = results
        scratch["residual_full"] = plgpu.Barrier(num_arrivals=consumers * out_parts)
    if with_lora:
        copies = STRIPS * consumers * (parts // turns) + 1
        scratch["lora_full"] = plgpu.Barrier(num_barriers=stages, num_arrivals=copies)
        scratch |= shrinks.scratch()

    idle = idle_bytes(config, tokens, splits, gated, rank, block_tokens, has_residual=has_residual)
    if idle:
        scratch["alone"] = plgpu.SMEM((idle,), jnp.int8)

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
        lora_full=None,
        alone=None,
        **shrink_smem,  # as Shrinks.scratch names it
    ):
        rest = list(refs)
        residual: Any = rest.pop(0) if has_residual else None  # [T, d_out]
        if with_lora:
            *of_adapters, shrunk, y, hidden = rest
            adapters = Adapters(*of_adapters)
            # shrunk: [1], hidden: [members, groups, T, 64]
        else:
            (y,) = rest
        # w_smem: [stages, parts, consumers, 64, 64], x_smem: [stages, T, 64]
        (w_smem, x_smem), (out_smem, *partial_smem) = smem
        index = lax.axis_index("tile")
        cta = lax.axis_index("cta") if cluster > 1 else 0
        me = lax.axis_index("warpgroup")
        ends: Any = {"stages": stages, "empty": empty}

        def tokens_from(start, count):
            """So many rows of x, the residual or y. Past the last, which JAX lets only a start
            be that it does not know, the copy engine reads zeros and writes nothing."""
            return pl.ds(jnp.int32(start), count)

        def row(part, consumer):
            """First row of W, and column of b, of a consumer's part of the tile."""
            if gated:
                return part * columns + index * part_rows + consumer * LANES
            return index * tile + part * part_rows + consumer * LANES

        def lanes_of(step):
            """Of d_in, those of W and x that a step contracts."""
            turn, of_turn = lax.div(step, together), lax.rem(step, together)
            return pl.ds(((turn * cluster + cta) * together + of_turn) * LANES, LANES)

        if not early:
            wait_for_previous()
        if with_lora:
            first = adapters.first_slot[0]
            units_there, units = shrinks.units(adapters)
            # Groups are dealt to the thread blocks of a cluster.
            my_groups = lax.div(
                lax.div(units * shrinks.ranks_k, STRIPS) - cta + cluster - 1, jnp.int32(cluster)
            )

        def strips(i):
            """The slots of a group's strips, and where their rows of b begin."""
            return [
                shrinks.origin((cta + i * cluster) * STRIPS + k, units_there, adapters)
                for k in range(STRIPS)
            ]

        def step_of(i, turn):
            return steps + i * turns + turn

        def fetch_b(turn, stage, group_strips):
            of_turn = (turn,) if gated else range(parts)
            for part, consumer in itertools.product(of_turn, range(consumers)):
                for k, (slot, begin) in enumerate(group_strips):
                    plgpu.copy_gmem_to_smem(
                        adapters.b.at[
                            first + slot, pl.ds(begin, PART), pl.ds(row(part, consumer), LANES)
                        ],
                        w_smem.at[stage, part, consumer, pl.ds(k * PART, PART)],
                        lora_full.at[stage],
                    )

        def fetch_hidden(i, turn, stage):
            column = row(turn, 0)
            member = sum(jnp.where(column >= edge, 1, 0) for edge in edges[:-1])
            plgpu.copy_gmem_to_smem(
                hidden.at[member, cta + i * cluster], x_smem.at[stage], lora_full.at[stage]
            )

        # Sums that fill most of a thread's share of registers take some of those that only copy.
        sums_overflow = with_lora and parts * tokens // 2 > 64

        @pl.when(me == producer)
        def _produce():
            if sums_overflow:
                plgpu.set_max_registers(56, action="decrease")

            def fetch_w(steps_and_stages):
                for part, consumer in itertools.product(range(parts), range(consumers)):
                    for i, stage in steps_and_stages:
                        plgpu.copy_gmem_to_smem(
                            w.at[pl.ds(row(part, consumer), LANES), lanes_of(i)],
                            w_smem.at[stage, part, consumer],
                            full.at[stage],
                        )

            def fetch_x(i, stage):
                source = x.at[tokens_from(0, tokens), lanes_of(i)]
                plgpu.copy_gmem_to_smem(source, x_smem.at[stage], full.at[stage])

            at_once = min(stages, steps) // together * together if early else 0
            for i in range(0, at_once, together):
                fetch_w([(i + k, i + k) for k in range(together)])
            if early:
                wait_for_previous()
            for i in range(at_once):
                fetch_x(i, i)
            if with_lora:
                coming = [strips(i) for i in range(_AHEAD)]
            if has_residual:
                for part, consumer in itertools.product(range(out_parts), range(consumers)):
                    plgpu.copy_gmem_to_smem(
                        residual.at[
                            tokens_from(cta * share, share), pl.ds(row(part, consumer), LANES)
                        ],
                        residual_smem.at[consumer, part],
                        residual_full,
                    )

            @pl.loop(at_once // together, steps // together)
            def _step(turn):
                of_turn = [turn * together + k for k in range(together)]
                free = [(i, free_stage(i, **ends)) for i in of_turn]
                fetch_w(free)
                for i, stage in free:
                    fetch_x(i, stage)

            if with_lora:

                def wait_for_shrinks():
                    gpu_counter.wait_for(shrunk, units)
                    gpu_counter.add_one(shrunk)

                # What need not wait for them: b, of as many groups as there is room for.
                at_first = jnp.clip(my_groups, 1, max(1, stages // turns))

                def add_group(i, coming):
                    now, *rest = coming
                    later = strips(i + _AHEAD)
                    for turn in range(turns):
                        stage = free_stage(step_of(i, turn), **ends)
                        fetch_b(turn, stage, now)
                        # Of two stages the other is free when this one is full.
                        pl.when(i >= at_first)(functools.partial(fetch_hidden, i, turn, stage))

                    @pl.when(i == at_first - 1)
                    def _early_hidden():
                        wait_for_shrinks()

                        @pl.loop(0, at_first)
                        def _of_group(at):
                            for turn in range(turns):
                                fetch_hidden(at, turn, lax.rem(step_of(at, turn), stages))

                    return [*rest, later]

                lax.fori_loop(0, my_groups, add_group, coming)
                pl.when(my_groups == 0)(wait_for_shrinks)

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
            flat = index * cluster + cta
            mine = Shrinker(shrinks, x, adapters, first, hidden, **shrink_smem)
            mine.prepare()
            if early:
                wait_for_previous()

            @pl.loop(0, lax.div(units - flat + tiles * cluster - 1, tiles * cluster))
            def _unit(turn):
                unit = flat + turn * tiles * cluster
                pl.when(unit < units_there)(lambda: mine.shrink(unit, turn))
                pl.when(unit >= units_there)(lambda: mine.clear(unit))
                plgpu.wait_smem_to_gmem(0)
                gpu_counter.add_one(shrunk)

        @pl.when(me < consumers)
        def _consume():
            if sums_overflow:
                plgpu.set_max_registers(200, action="increase")
            if early:
                wait_for_previous()

            def multiply(*accs):
                def product(_turn, stage):
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(
                            acc, w_smem.at[stage, part, me], x_smem.at[stage].transpose((1, 0))
                        )

                def expand(turn, stage):
                    for part, acc in ((turn, accs[turn]),) if gated else enumerate(accs):
                        plgpu.wgmma(
                            acc,
                            w_smem.at[stage, part, me].transpose((1, 0)),
                            x_smem.at[stage].transpose((1, 0)),
                        )

                contract(0, steps, product, full=full, products=parts, **ends)
                if with_lora:
                    contract(
                        steps,
                        my_groups,
                        expand,
                        full=lora_full,
                        products=parts // turns,
                        turns=turns,
                        **ends,
                    )
                return tuple(acc[...] for acc in accs)

            sums = pl.run_scoped(multiply, *[plgpu.ACC((LANES, tokens)) for _ in range(parts)])
            # What follows lies where the pipeline did.
            plgpu.barrier_arrive(drained)
            plgpu.barrier_wait(drained)

            def target(part):
                return y.at[tokens_from(cta * share, share), pl.ds(row(part, me), LANES)]

            ending = Ending(
                dtype=dtype,
                gated=gated,
                cluster=cluster,
                shares=shares,
                me=me,
                cta=cta,
                out_smem=out_smem,
                partial_sums=partial_smem[0] if partial_smem else None,
                summed=summed,
                residual_smem=residual_smem,
                residual_full=residual_full,
            )
            ending.end(sums, target)

    def lora_linear(*refs):
        kernel = functools.partial(lora_linear_kernel, *refs)
        pl.run_scoped(kernel, collective_axes="warpgroup", **scratch)

    out_type = [jax.ShapeDtypeStruct((given_tokens, columns), dtype)]
    if with_lora:
        out_type.append(jax.ShapeDtypeStruct(shrinks.hidden_shape, dtype))
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
