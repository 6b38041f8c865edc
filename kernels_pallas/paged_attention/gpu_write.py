"""A step's keys and values on NVIDIA Hopper: put in their places in the pool, which stays where it
is."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from kernels_pallas.dependent_launch import wait_for_previous
from kernels_pallas.paged_attention.op import PagedBatch, token_rows

_WRITTEN = 8
"""Tokens whose keys and values a thread block writes."""


def write_kv(
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
) -> Float[Array, "P page_size KV2 D"]:
    """The pool with every new token's keys and values in place; padding writes nothing."""
    num_pages, page_size, kv2, head_dim = pages.shape
    num_tokens = k.shape[0]
    place = places(pages, batch, num_tokens)
    pool = jax.new_ref(pages.reshape(num_pages * page_size, kv2 // 2, 2 * head_dim))
    k, v = k.astype(pages.dtype), v.astype(pages.dtype)
    kernel = _write_kernel(num_tokens, kv2 // 2, head_dim, pages.dtype)
    kernel(pool, k, v, place)
    return jax.freeze(pool).reshape(pages.shape)


def places(
    pages: Float[Array, "P page_size KV2 D"], batch: PagedBatch, num_tokens: int
) -> Int32[Array, " T"]:
    """Where in the pool each new token's keys and values belong, -1 for padding."""
    page_size = pages.shape[1]
    row, position, valid = token_rows(batch, num_tokens)
    page = batch.page_table[row, position // page_size]
    return jnp.where(valid, page * page_size + position % page_size, -1)


def _write_kernel(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: Any) -> Any:
    """Builds the kernel: (pool_ref, k, v, place) -> nothing."""
    width = min(_WRITTEN, num_tokens)
    shape = (width, num_kv_heads, head_dim)

    def write_kernel(
        pool,  # [P * page_size, KV, 2 * D]
        k,  # [T, KV, D]
        v,  # [T, KV, D]
        place,  # [T]
        *,
        k_smem,
        v_smem,
        barrier,
    ):
        first = lax.axis_index("block") * width
        wait_for_previous()
        for source, buffer in ((k, k_smem), (v, v_smem)):
            plgpu.copy_gmem_to_smem(source.at[pl.ds(first, width)], buffer, barrier)
        tokens = [first + i for i in range(width)]
        places = [place[jnp.minimum(token, num_tokens - 1)] for token in tokens]
        plgpu.barrier_wait(barrier)
        for i, (token, to) in enumerate(zip(tokens, places, strict=True)):
            wanted = jnp.logical_and(token < num_tokens, to >= 0)
            for buffer, column in ((k_smem, 0), (v_smem, head_dim)):
                plgpu.copy_smem_to_gmem(
                    buffer.at[i],
                    pool.at[to, :, pl.ds(column, head_dim)],
                    predicate=wanted,
                )
        plgpu.wait_smem_to_gmem(0)

    def write_kv(*refs):
        pl.run_scoped(
            functools.partial(write_kernel, *refs),
            k_smem=plgpu.SMEM(shape, dtype),
            v_smem=plgpu.SMEM(shape, dtype),
            barrier=plgpu.Barrier(num_arrivals=2),
        )

    # pl.kernel, not plgpu.kernel: only it takes the pool as a Ref, which is updated in place.
    return pl.kernel(
        write_kv,
        mesh=plgpu.Mesh(grid=(-(-num_tokens // width),), grid_names=("block",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="write_kv",
    )
