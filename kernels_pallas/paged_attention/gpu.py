"""The op on NVIDIA Hopper: one Mosaic GPU kernel over pages, for decode steps and chunks alike.

A thread block serves the query heads that share a key head, for one token (decode) or for as many
consecutive tokens of a row as fill the 64 rows of ``wgmma``. It walks the row's pages in tiles of
keys, each page one copy: a key head and its value head lie side by side. Scores stay in registers,
softmax runs along (FlashAttention-2, arXiv:2307.08691) and its weights are the left operand of the
product with the values. Long contexts are cut into parts (:mod:`.gpu_plan`), and the thread block
of the last puts together what they found (:mod:`.gpu_merge`).

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
from jaxtyping import Array, Float

from kernels_pallas.dependent_launch import wait_for_previous
from kernels_pallas.paged_attention.gpu_merge import LANES as PART_LANES
from kernels_pallas.paged_attention.gpu_merge import Merge, Slots
from kernels_pallas.paged_attention.gpu_plan import (
    ROWS,
    Config,
    Plan,
    check,
    heuristic,
    is_decode,
    plan,
    planned,
)
from kernels_pallas.paged_attention.gpu_rotate import rotate_and_write
from kernels_pallas.paged_attention.gpu_write import write_kv
from kernels_pallas.paged_attention.op import Implementation, PagedBatch, pool_shape
from kernels_pallas.shared_memory import tiled, two_views, views

_LANES = 64
"""Elements in a swizzled row of shared memory (128 bytes of a 16-bit type)."""
_MASKED = -1e30
"""A score that no query sees: finite, so that differences of two are not NaN."""


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    config: Config | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """Writes ``k`` and ``v`` into the pool and attends (formula: :mod:`.op`).

    bfloat16 or float16; scores, softmax and sums in float32, weights rounded to the dtype before
    they meet the values. Raises ValueError for what it cannot serve.
    """
    if sliding_window is not None:
        raise ValueError("no sliding window; the reference implementation serves it")
    check(q.shape[1], q.dtype, pages)
    (num_tokens, num_heads, _), num_kv_heads = q.shape, k.shape[1]
    config = config or heuristic(num_kv_heads)
    batch = planned(batch, num_tokens, num_heads, num_kv_heads, config)
    pages = write_kv(k, v, pages, batch)
    return _attend(q, pages, batch, config, scale=scale), pages


def attention_of_qkv(
    qkv: Float[Array, "T HKV2 D"],
    tables: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """The same of what the linear yields, queries and keys not turned yet (:mod:`.gpu_rotate`)."""
    kv2 = pages.shape[2]
    num_tokens, num_heads = qkv.shape[0], qkv.shape[1] - kv2
    check(num_heads, pages.dtype, pages)
    config = heuristic(kv2 // 2)
    batch = planned(batch, num_tokens, num_heads, kv2 // 2, config)
    q, pages = rotate_and_write(qkv, tables, pages, batch)
    return _attend(q, pages, batch, config, scale=scale), pages


def share(batch: PagedBatch, *, num_tokens: int, num_heads: int, num_kv_heads: int) -> Plan:
    """What a program's calls share (:attr:`PagedBatch.shared`); a call without makes its own."""
    return plan(batch, num_tokens, num_heads, num_kv_heads, heuristic(num_kv_heads))


def _attend(
    q: Float[Array, "T H D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    config: Config,
    *,
    scale: float,
) -> Float[Array, "T H D"]:
    """Attention of every new token over its row's pages; padding comes back as zeros.

    Of a decode step the batch and its plan are read, and pages without new tokens, before what the
    device was given last has ended: that must not write them.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, kv2, _ = pages.shape
    group, shared = num_heads // (kv2 // 2), batch.shared
    if shared.counters.shape != (config.slots * kv2 // 2,):
        raise ValueError(f"the plan that is shared is not for {config}")
    decode = is_decode(batch, num_tokens)
    out, *_ = _kernel(
        config,
        dtype=q.dtype,
        scale=scale,
        num_parts=len(shared.parts),
        decode=decode,
        width=1 if decode else ROWS // group,
        num_tokens=num_tokens,
        num_kv_heads=kv2 // 2,
        group=group,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_row=batch.page_table.shape[1],
    )(
        q.reshape(num_tokens * num_heads, head_dim),
        pages.reshape(num_pages * page_size, kv2 * head_dim),
        batch.page_table,
        shared.parts,
        shared.counters,
    )
    return out.reshape(q.shape)


def _kernel(
    config: Config,
    *,
    dtype: Any,
    scale: float,
    num_parts: int,
    decode: bool,
    width: int,
    num_tokens: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    pages_per_row: int,
) -> Any:
    """Builds the kernel: (q, kv, page_table, parts, counters) -> (out, outputs and levels of the
    parts)."""
    tile, stages = config.tile, config.stages
    num_heads = num_kv_heads * group
    chunks = head_dim // _LANES
    copy_rows = min(page_size, tile)
    copies = tile // copy_rows
    factor = scale * math.log2(math.e)
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

    def paged_attention_kernel(
        q,  # [T * H, D]
        kv,  # [P * page_size, 2 * KV * D]
        page_table,  # [R, pages_per_row]
        parts,  # [N, 7]
        counters,  # [slots * KV]
        out,  # [T * H, D]
        outputs,  # [slots * KV * width, group, D]
        levels,  # the same
        *,
        q_views,  # [D / 64, 64, 64]
        kv_views,  # [stages, tile, 2 * D]; [D / 32 + 1, 64, 32]; [group, D]
        q_barrier,
        kv_barrier,
    ):
        if not decode:
            wait_for_previous()
        index, head = lax.axis_index("part"), lax.axis_index("head")
        q_copied, q_smem = q_views
        kv_smem, *part_views, result_smem = kv_views
        row, first, count, end, part, of_parts, first_slot = (parts[index, i] for i in range(7))

        def rows_of(token):
            return (first + token) * num_heads + head * group

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

        def fetch_first(*, has_new):
            for i, pages in enumerate(first_pages):
                number = first_tile + i
                wanted = number < last_tile
                if decode:
                    wanted &= ((number + 1) * tile > end - count) == has_new
                pl.when(wanted)(functools.partial(fetch, number, pages))

        if decode:
            fetch_first(has_new=False)
            wait_for_previous()

        @pl.when(count > 0)
        def _block():
            fetch_first(has_new=True)

            @pl.loop(0, width)
            def _fetch_q(token):
                for j in range(chunks):
                    plgpu.copy_gmem_to_smem(
                        q.at[pl.ds(rows_of(token), group), pl.ds(j * _LANES, _LANES)],
                        q_copied.at[j, pl.ds(token * group, group)],
                        q_barrier,
                    )

            plgpu.barrier_wait(q_barrier)

            def add_tile(i, carry, *, masked):
                acc, high, total = carry
                stage = lax.rem(i, stages)
                later_pages = page_numbers(i + stages - 1)
                plgpu.barrier_wait(kv_barrier.at[stage])

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
                    # Scaled first: a product with _MASKED, fused into the subtraction below and
                    # rounded there only, would not cancel where a query sees nothing.
                    still_to_scale = 1.0
                    key = i * tile + _iota((ROWS, tile), 1)
                    token = lax.div(_iota((ROWS, tile), 0), group) if width > 1 else 0
                    scores = jnp.where(key - token <= end - count, scores * factor, _MASKED)

                    @pl.when(end < (i + 1) * tile)
                    def _clear_values():
                        values = kv_smem.at[stage, :, head_dim : 2 * head_dim]
                        key = i * tile + _iota((tile, head_dim), 0)
                        loaded = values[...]
                        values[...] = jnp.where(key < end, loaded, jnp.zeros_like(loaded))
                        plgpu.commit_smem()

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
                _full((ROWS,), _MASKED, plgpu.Layout.WGMMA.reduce(1)),
                _full((ROWS,), 0.0, plgpu.Layout.WGMMA.reduce(1)),
            )
            # Every query of the block sees the whole of these tiles.
            full = jnp.clip(lax.div(end - count + 1, tile), first_tile, last_tile)
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
                level = jnp.where(total == 0.0, _MASKED, high + jnp.log(sum_or_one) / math.log(2))
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


IMPLEMENTATION = Implementation(
    name="mosaic_gpu",
    function=paged_attention,
    pool_shape=pool_shape,
    of_qkv=attention_of_qkv,
    share=share,
)
