"""The op on NVIDIA Hopper: one Mosaic GPU kernel over pages, for decode steps and chunks alike.

A thread block serves the query heads that share a key head, for one token (decode) or for as many
consecutive tokens of a row as fill the 64 rows of ``wgmma``. It walks the row's pages in tiles of
keys, each page one copy: a key head and its value head lie side by side. Scores stay in registers,
softmax runs along (FlashAttention-2, arXiv:2307.08691) and its weights are the left operand of the
product with the values. Where there are fewer of these than the chip runs at once, several share a
context and what they found is combined afterwards.

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
from kernels_pallas.paged_attention.gpu_plan import (
    Config,
    chunk_blocks,
    combine,
    heuristic,
)
from kernels_pallas.paged_attention.gpu_rotate import rotate_and_write
from kernels_pallas.paged_attention.gpu_write import write_kv
from kernels_pallas.paged_attention.op import Implementation, PagedBatch, pool_shape

HEAD_DIMS = (64, 128)
_ROWS = 64
"""Rows of ``wgmma``: (token, query head) pairs of a thread block."""
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
    pages = write_kv(k, v, pages, batch)
    return attend(q, pages, batch, scale=scale, config=config), pages


def attention_of_qkv(
    qkv: Float[Array, "T HKV2 D"],
    tables: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """The same of what the linear yields, queries and keys not turned yet (:mod:`.gpu_rotate`)."""
    q, pages = rotate_and_write(qkv, tables, pages, batch)
    return attend(q, pages, batch, scale=scale), pages


def attend(
    q: Float[Array, "T H D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
    config: Config | None = None,
) -> Float[Array, "T H D"]:
    """Attention of every new token over its row's pages; padding comes back as zeros.

    Of a decode step the batch is read, and pages without new tokens, before what the device was
    given last has ended: that must not write them.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, page_size, kv2, _ = pages.shape
    group, rest = divmod(num_heads, kv2 // 2)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or pages.dtype != q.dtype:
        raise ValueError(
            f"q and pages must both be bfloat16 or both float16, got {q.dtype} and {pages.dtype}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head size {head_dim} must be one of {HEAD_DIMS}")
    if rest or group > _ROWS:
        raise ValueError(
            f"{num_heads} query heads must be 1 to {_ROWS} for each of {kv2 // 2} key heads"
        )
    if not serves_page_size(page_size):
        raise ValueError(f"page size {page_size} must be 8, 16, 32 or a multiple of 64")
    decode = batch.max_q_len == 1 and batch.kv_lens.shape[0] == num_tokens
    blocks = batch.kv_lens if decode else chunk_blocks(batch, num_tokens, _ROWS // group)
    if config is None:
        config = heuristic(len(blocks) * kv2 // 2)
    out = _kernel(
        config,
        dtype=q.dtype,
        scale=scale,
        num_blocks=len(blocks),
        decode=decode,
        width=1 if decode else _ROWS // group,
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
        blocks,
    )
    if config.splits > 1:
        out = combine(out.reshape(config.splits, -1, out.shape[1]), head_dim, q.dtype)
    return out.reshape(q.shape)


def serves_page_size(page_size: int) -> bool:
    """Whether pages of this many tokens can be copied in whole tiles of 8 rows."""
    return page_size in (8, 16, 32) or page_size % _ROWS == 0


def _kernel(
    config: Config,
    *,
    dtype: Any,
    scale: float,
    num_blocks: int,
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
    """Builds the kernel: (q, kv, page_table, blocks) -> out. A decode step's blocks are the rows'
    contexts."""
    splits, tile, stages = config.splits, config.tile, config.stages
    num_heads = num_kv_heads * group
    chunks = head_dim // _LANES
    copy_rows = min(page_size, tile)
    copies = tile // copy_rows
    out_dtype = dtype if splits == 1 else jnp.float32
    lanes = 128 // jnp.dtype(out_dtype).itemsize
    # Parts of the context carry what their weight is computed from in columns of their own.
    out_columns = head_dim if splits == 1 else head_dim + lanes
    factor = scale * math.log2(math.e)

    def two_views(columns: int, lanes: int, dtype: Any) -> Any:
        # A token's heads start at any row, but the copy engine cannot start inside a tile of 8
        # rows: it sees the same bytes untiled, since one column of tiles is plain rows.
        shape = (columns // lanes, _ROWS, lanes)
        swizzle = plgpu.SwizzleTransform(128)
        return plgpu.RefUnion(
            *(
                plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((rows, lanes)), swizzle))
                for rows in (1, 8)
            )
        )

    scratch = {
        "q_views": two_views(head_dim, _LANES, dtype),
        "kv_smem": plgpu.SMEM(
            (stages, tile, 2 * head_dim),
            dtype,
            transforms=(plgpu.TilingTransform((8, _LANES)), plgpu.SwizzleTransform(128)),
        ),
        "q_barrier": plgpu.Barrier(num_arrivals=width * chunks),
        "kv_barrier": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
    }
    if splits > 1:  # else the output takes the place of q
        scratch |= {"out_views": two_views(out_columns, lanes, out_dtype)}

    def paged_attention_kernel(
        q,  # [T * H, D]
        kv,  # [P * page_size, 2 * KV * D]
        page_table,  # [R, pages_per_row]
        blocks,  # [N, 4], or [R]
        out,  # [T * H, D], or [splits * T * H, D + 32]
        *,
        q_views,  # [D / 64, 64, 64]
        kv_smem,  # [stages, tile, 2 * D]
        q_barrier,
        kv_barrier,
        out_views=None,  # [out columns / lanes, 64, lanes]
    ):
        if not decode:
            wait_for_previous()
        block, head = lax.axis_index("block"), lax.axis_index("head")
        split = lax.axis_index("split") if splits > 1 else 0
        q_copied, q_smem = q_views
        out_copied, out_smem = q_views if out_views is None else out_views
        if decode:
            row, first, count, end = block, block, 1, blocks[block]
        else:
            row, first, count, end = (blocks[block, i] for i in range(4))

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
        first_tile = lax.div(num_tiles * split, splits)
        last_tile = lax.div(num_tiles * (split + 1), splits)
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

                scores = pl.run_scoped(multiply_keys, plgpu.ACC((_ROWS, tile)))
                still_to_scale = factor
                if masked:
                    # Scaled first: a product with _MASKED, fused into the subtraction below and
                    # rounded there only, would not cancel where a query sees nothing.
                    still_to_scale = 1.0
                    key = i * tile + _iota((_ROWS, tile), 1)
                    token = lax.div(_iota((_ROWS, tile), 0), group) if width > 1 else 0
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
                _full((_ROWS, head_dim), 0.0, plgpu.Layout.WGMMA),
                _full((_ROWS,), _MASKED, plgpu.Layout.WGMMA.reduce(1)),
                _full((_ROWS,), 0.0, plgpu.Layout.WGMMA.reduce(1)),
            )
            # Every query of the block sees the whole of these tiles.
            full = jnp.clip(lax.div(end - count + 1, tile), first_tile, last_tile)
            for start, stop, masked in ((first_tile, full, False), (full, last_tile, True)):
                carry = lax.fori_loop(
                    start, stop, functools.partial(add_tile, masked=masked), carry
                )
            acc, high, total = carry

            sum_or_one = jnp.where(total == 0.0, 1.0, total)
            result = (acc / _along_rows(sum_or_one, acc.shape)).astype(out_dtype)
            for j in range(head_dim // lanes):
                out_smem[j] = result[:, j * lanes : (j + 1) * lanes]
            if splits > 1:
                level = jnp.where(total == 0.0, _MASKED, high + jnp.log(sum_or_one) / math.log(2))
                out_smem[head_dim // lanes] = _along_rows(level, (_ROWS, lanes))
            plgpu.commit_smem()

            @pl.loop(0, count)
            def _store(token):
                start = split * num_tokens * num_heads + rows_of(token)
                for j in range(out_columns // lanes):
                    plgpu.copy_smem_to_gmem(
                        out_copied.at[j, pl.ds(token * group, group)],
                        out.at[pl.ds(start, group), pl.ds(j * lanes, lanes)],
                    )

            plgpu.wait_smem_to_gmem(0)

    def paged_attention(*refs):
        pl.run_scoped(functools.partial(paged_attention_kernel, *refs), **scratch)

    return plgpu.kernel(
        paged_attention,
        out_type=jax.ShapeDtypeStruct((splits * num_tokens * num_heads, out_columns), out_dtype),
        grid=(num_blocks, num_kv_heads, *((splits,) if splits > 1 else ())),
        grid_names=("block", "head", *(("split",) if splits > 1 else ())),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Reductions along rows of a wgmma result stay within a warp.
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
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
)
