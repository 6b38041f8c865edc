"""The kernel of attention on NVIDIA Hopper, for decode steps and chunks alike.

A thread block serves the query heads that share a key head, for one token (decode) or for as many
consecutive tokens of a row as fill the 64 rows of ``wgmma``. It walks the row's pages, or a part of
them (:mod:`.gpu_plan`), in tiles of keys, each page one copy: a key head and its value head lie
side by side. Scores stay in registers, softmax runs along (FlashAttention-2, arXiv:2307.08691) and
its weights are the left operand of the product with the values.

What a page holds beyond the context is masked, and pages beyond it are requested out of the
array's bounds, where the copy engine writes zeros without reading.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.dependent_launch import wait_for_previous
from kernels_pallas.paged_attention.gpu_merge import LANES as PART_LANES
from kernels_pallas.paged_attention.gpu_merge import NOTHING, Merge, Slots
from kernels_pallas.paged_attention.gpu_new import NewToken
from kernels_pallas.paged_attention.gpu_plan import ROWS, Config
from kernels_pallas.shared_memory import tiled, two_views, views

_LANES = 64
"""Elements in a swizzled row of shared memory (128 bytes of a 16-bit type)."""


def build(
    config: Config,
    *,
    dtype: Any,
    scale: float,
    num_parts: int,
    decode: bool,
    early: bool,
    fresh: bool,
    width: int,
    num_tokens: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    pages_per_row: int,
) -> Any:
    """Builds the kernel: (q, kv, page_table, parts, cos?, sin?, counters) -> (out, outputs and
    levels of the parts).

    ``early`` promises that page table and parts may be read before the kernel in front has ended,
    and pages without new tokens. Where a decode step's new tokens are ``fresh``, ``q`` is all of
    the qkv, whose queries and keys are turned here (:mod:`.gpu_new`), and ``kv`` a Ref, in which
    keys and values are put in their places; else they are there already.
    """
    tile, stages = config.tile, config.stages
    num_heads = num_kv_heads * group
    chunks = head_dim // _LANES
    copy_rows = min(page_size, tile)
    copies = tile // copy_rows
    factor = scale * math.log2(math.e)
    # Of each token, where q comes from.
    heads_there = num_heads + 2 * num_kv_heads if fresh else num_heads
    merge = Merge(
        dtype=dtype,
        slots=config.slots,
        num_kv_heads=num_kv_heads,
        width=width,
        group=group,
        head_dim=head_dim,
    )

    kv_shape = stages, tile, 2 * head_dim
    # A part's level is one more tile of columns.
    part_shape = head_dim // PART_LANES + 1, ROWS, PART_LANES
    scratch = {
        # The output takes the place of q, and a part's that of keys and values.
        "q_views": two_views((chunks, ROWS, _LANES), dtype),
        "kv_views": plgpu.RefUnion(
            plgpu.SMEM(kv_shape, dtype, transforms=tiled(2 * head_dim, 2)),
            *views(part_shape, jnp.float32),
            merge.result,
        ),
        "q_barrier": plgpu.Barrier(num_arrivals=width * chunks),
        "kv_barrier": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
    }
    if fresh:
        scratch["new_smem"] = plgpu.SMEM((2 * head_dim,), dtype)

    def paged_attention_kernel(
        q,  # [T * H, D]; fresh: [T * (H + 2 * KV), D]
        kv,  # [P * page_size, 2 * KV * D]
        page_table,  # [R, pages_per_row]
        parts,  # [N, 7]
        *refs,
        q_views,  # [D / 64, 64, 64]
        kv_views,  # [stages, tile, 2 * D]; [D / 32 + 1, 64, 32]; [group, D]
        q_barrier,
        kv_barrier,
        new_smem=None,  # [2 * D]
    ):
        # angles: two of [T, D / 2], counters: [slots * KV], out: [T * H, D],
        # outputs: [slots * KV * width, group, D], levels: the same
        *angles, counters, out, outputs, levels = refs
        if not early:
            wait_for_previous()
        index, head = lax.axis_index("part"), lax.axis_index("head")
        q_copied, q_smem = q_views
        kv_smem, *part_views, result_smem = kv_views
        row, first, count, end, part, of_parts, first_slot = (parts[index, i] for i in range(7))

        def rows_of(token, heads=num_heads):
            return (first + token) * heads + head * group

        def page_numbers(i):
            """Page of each copy of tile i. Loaded long before it is needed: to wait for memory
            between tiles would double the time of each."""
            last = pages_per_row - 1
            positions = [i * tile + j * copy_rows for j in range(copies)]
            return [page_table[row, jnp.minimum(lax.div(p, page_size), last)] for p in positions]

        def fetch(i, pages):
            stage = lax.rem(i, stages)
            for j, page in enumerate(pages):
                position = i * tile + j * copy_rows
                seen = jnp.where(position < end, page, num_pages)
                start = seen * page_size + lax.rem(position, page_size)
                plgpu.copy_gmem_to_smem(
                    kv.at[pl.ds(start, copy_rows), pl.ds(head * 2 * head_dim, 2 * head_dim)],
                    kv_smem.at[stage, j * copy_rows : (j + 1) * copy_rows],
                    kv_barrier.at[stage],
                )

        num_tiles = lax.div(end + tile - 1, tile)
        # Of what is not needed there are no parts.
        divisor = jnp.maximum(of_parts, 1)
        first_tile = lax.div(num_tiles * part, divisor)
        last_tile = lax.div(num_tiles * (part + 1), divisor)
        first_pages = [page_numbers(first_tile + i) for i in range(stages)]

        def fetch_first(has_new=None):
            """Tiles that have a new token's key, or that have none, or all."""
            for i, pages in enumerate(first_pages):
                number = first_tile + i
                wanted = number < last_tile
                if has_new is not None:
                    wanted &= ((number + 1) * tile > end - count) == has_new
                pl.when(wanted)(functools.partial(fetch, number, pages))

        if early:
            # What this kernel writes itself it puts into the tile, too.
            fetch_first(None if fresh else False)
            wait_for_previous()

        @pl.when(count > 0)
        def _block():
            if not early:
                fetch_first()
            elif not fresh:
                fetch_first(has_new=True)

            @pl.loop(0, width)
            def _fetch_q(token):
                for j in range(chunks):
                    plgpu.copy_gmem_to_smem(
                        q.at[pl.ds(rows_of(token, heads_there), group), pl.ds(j * _LANES, _LANES)],
                        q_copied.at[j, pl.ds(token * group, group)],
                        q_barrier,
                    )

            if fresh:
                new = NewToken(q, angles, first, head, num_heads, num_kv_heads, new_smem)
                new.turn_key()

                @pl.when((end > 0) & (part == of_parts - 1))
                def _write():
                    page = page_table[row, lax.div(end - 1, page_size)]
                    place = page * page_size + lax.rem(end - 1, page_size)
                    new.write(kv.at[place, pl.ds(head * 2 * head_dim, 2 * head_dim)])

            plgpu.barrier_wait(q_barrier)
            if fresh:
                new.turn_queries(q_smem)

            def add_tile(i, carry, *, masked):
                acc, high, total = carry
                stage = lax.rem(i, stages)
                later_pages = page_numbers(i + stages - 1)
                plgpu.barrier_wait(kv_barrier.at[stage])
                if fresh and masked:
                    pl.when(end <= (i + 1) * tile)(
                        lambda: new.put(kv_smem.at[stage], end - 1 - i * tile)
                    )

                def multiply_keys(ref):
                    for j in range(chunks):
                        keys = kv_smem.at[stage, :, j * _LANES : (j + 1) * _LANES]
                        plgpu.wgmma(ref, q_smem.at[j], keys.transpose((1, 0)))
                    # Meanwhile, the tile before has left its place to one that comes later.
                    later = i + stages - 1
                    wanted = jnp.logical_and(i > first_tile, later < last_tile)
                    pl.when(wanted)(lambda: fetch(later, later_pages))
                    return ref[...]

                scores = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, tile)))
                still_to_scale = factor
                if masked:
                    # Scaled first: a product with NOTHING, fused into the subtraction below and
                    # rounded there only, would not cancel where a query sees nothing.
                    still_to_scale = 1.0
                    key = i * tile + _iota((ROWS, tile), 1)
                    token = lax.div(_iota((ROWS, tile), 0), group) if width > 1 else 0
                    scores = jnp.where(key - token <= end - count, scores * factor, NOTHING)

                    def clear_values():
                        values = kv_smem.at[stage, :, head_dim : 2 * head_dim]
                        key = i * tile + _iota((tile, head_dim), 0)
                        loaded = values[...]
                        values[...] = jnp.where(key < end, loaded, jnp.zeros_like(loaded))
                        plgpu.commit_smem()

                    if not fresh:
                        pl.when(end < (i + 1) * tile)(clear_values)

                new_high = jnp.maximum(high, scores.max(axis=1) * still_to_scale)
                decay = jnp.exp2(high - new_high)
                scores = scores * still_to_scale - _along_rows(new_high, scores.shape)
                weights = jnp.exp2(scores)
                total = total * decay + weights.sum(axis=1)
                acc *= _along_rows(decay, acc.shape)
                weights = weights.astype(dtype)

                def add_values(ref):
                    plgpu.wgmma(ref, weights, kv_smem.at[stage, :, head_dim : 2 * head_dim])

                acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
                return acc, new_high, total

            carry = (
                _full((ROWS, head_dim), 0.0, plgpu.Layout.WGMMA),
                _full((ROWS,), NOTHING, plgpu.Layout.WGMMA.reduce(1)),
                _full((ROWS,), 0.0, plgpu.Layout.WGMMA.reduce(1)),
            )
            # Every query of the block sees the whole of these tiles.
            seen_by_all = end - count + (0 if fresh else 1)
            full = jnp.clip(lax.div(seen_by_all, tile), first_tile, last_tile)
            for start, stop, masked in ((first_tile, full, False), (full, last_tile, True)):
                carry = lax.fori_loop(
                    start, stop, functools.partial(add_tile, masked=masked), carry
                )
            acc, high, total = carry

            sum_or_one = jnp.where(total == 0.0, 1.0, total)
            result = acc / _along_rows(sum_or_one, acc.shape)

            @pl.when(of_parts == 1)
            def _store_whole():
                for j in range(chunks):
                    q_smem[j] = result[:, j * _LANES : (j + 1) * _LANES].astype(dtype)
                plgpu.commit_smem()

                @pl.loop(0, count)
                def _store(token):
                    for j in range(chunks):
                        plgpu.copy_smem_to_gmem(
                            q_copied.at[j, pl.ds(token * group, group)],
                            out.at[pl.ds(rows_of(token), group), pl.ds(j * _LANES, _LANES)],
                        )

                plgpu.wait_smem_to_gmem(0)

            @pl.when(of_parts > 1)
            def _store_part():
                level = jnp.where(total == 0.0, NOTHING, high + jnp.log(sum_or_one) / math.log(2))
                slots = Slots(merge, outputs, levels, counters, first_slot, head)
                slots.write(result, level, part, count, part_views)
                is_last = part == of_parts - 1
                pl.when(~is_last)(slots.count_up)

                def place_of(token):
                    return out.at[pl.ds(rows_of(token), group)]

                @pl.when(is_last)
                def _merge():
                    slots.merge(of_parts, count, result_smem, place_of)

    def paged_attention(*refs):
        pl.run_scoped(functools.partial(paged_attention_kernel, *refs), **scratch)

    # pl.kernel, not plgpu.kernel: only it takes the counters as a Ref, which is updated in place.
    return pl.kernel(
        paged_attention,
        out_type=[
            jax.ShapeDtypeStruct((num_tokens * num_heads, head_dim), dtype),
            *merge.out_type,
        ],
        mesh=plgpu.Mesh(grid=(num_parts, num_kv_heads), grid_names=("part", "head")),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Reductions along rows of a wgmma result stay within a warp.
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        name="paged_attention",
    )


def _iota(shape: tuple[int, int], dimension: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def _along_rows(vector: Any, shape: tuple[int, int]) -> Any:
    return lax.broadcast_in_dim(vector, shape, [0])


def _full(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
