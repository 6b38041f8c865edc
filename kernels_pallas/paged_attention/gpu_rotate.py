"""What lies between a step's qkv and its attention on NVIDIA Hopper, in one kernel: queries and
keys are turned by their position, keys and values put in their places in the pool."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.dependent_launch import wait_for_previous
from kernels_pallas.paged_attention.gpu_write import places
from kernels_pallas.paged_attention.op import PagedBatch

_THREADS = 128
_ALIGNMENT = 128
"""Bytes, and so many dimensions of heads whose halves are of a 16-bit type."""


def serves(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the heads can be dealt out to threads, and the key heads' halves lie in shared memory
    where the copy engine can begin."""
    is_aligned = num_heads * head_dim % _ALIGNMENT == 0
    return is_aligned and _width(num_heads + num_kv_heads, head_dim) is not None


def rotate_and_write(
    qkv: Float[Array, "T HKV2 D"],
    tables: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """The queries, and the pool with every new token's keys and values in place.

    ``qkv`` has each token's query heads, key heads and value heads, ``tables`` the cosine and sine
    of its angles: dimension i of a query or key and i + D/2 are turned by the i-th, in float32.
    """
    num_tokens, _, head_dim = qkv.shape
    num_pages, page_size, kv2, _ = pages.shape
    num_kv_heads, half = kv2 // 2, head_dim // 2
    num_heads = qkv.shape[1] - kv2
    width = _width(num_heads + num_kv_heads, head_dim)
    assert width is not None
    cos, sin = (jnp.broadcast_to(table, (num_tokens, width, half)) for table in tables)
    pool = jax.new_ref(pages.reshape(num_pages * page_size, num_kv_heads, 2 * head_dim))
    kernel = _kernel(
        dtype=pages.dtype,
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        width=width,
    )
    place = places(pages, batch, num_tokens)
    q = kernel(pool, qkv, cos, sin, place)
    return q, jax.freeze(pool).reshape(pages.shape)


def _width(turned_heads: int, head_dim: int) -> int | None:
    """Heads that are turned at a time, each thread the same one to four dimensions of them all;
    None if nothing fits."""
    half = head_dim // 2
    for vector in (4, 2, 1):
        width, rest = divmod(_THREADS * vector, half)
        if rest == 0 and turned_heads % width == 0:
            return width
    return None


def _kernel(
    *,
    dtype: Any,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    width: int,
) -> Any:
    """Builds the kernel: (pool_ref, qkv, cos, sin, place) -> q."""
    half, turned_heads = head_dim // 2, num_heads + num_kv_heads
    layout = plgpu.Layout.WG_STRIDED((width, half), vec_size=width * half // _THREADS)

    def rotate_kernel(
        pool,  # [P * page_size, KV, 2 * D]
        qkv,  # [T, H + 2 * KV, D]
        cos,  # [T, width, D / 2]
        sin,  # [T, width, D / 2]
        place,  # [T]
        q,  # [T, H, D]
        *,
        first_smem,  # [H + KV, D / 2]
        second_smem,  # [H + KV, D / 2]
        value_smem,  # [KV, D]
        barrier,
    ):
        # A thread block for each token.
        token = lax.axis_index("token")
        halves = ((first_smem, pl.ds(0, half)), (second_smem, pl.ds(half, half)))
        wait_for_previous()
        for buffer, columns in halves:
            source = qkv.at[token, pl.ds(0, turned_heads), columns]
            plgpu.copy_gmem_to_smem(source, buffer, barrier)
        values = qkv.at[token, pl.ds(turned_heads, num_kv_heads)]
        plgpu.copy_gmem_to_smem(values, value_smem, barrier)
        to = place[token]
        turn = [plgpu.layout_cast(table[token, ...], layout) for table in (cos, sin)]
        plgpu.barrier_wait(barrier)
        for head in range(0, turned_heads, width):
            heads = pl.ds(head, width)
            first, second = (
                plgpu.layout_cast(buffer[heads], layout).astype(jnp.float32) for buffer, _ in halves
            )
            first_smem[heads] = (first * turn[0] - second * turn[1]).astype(dtype)
            second_smem[heads] = (second * turn[0] + first * turn[1]).astype(dtype)
        plgpu.commit_smem()
        for buffer, columns in halves:
            plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, num_heads)], q.at[token, :, columns])
            plgpu.copy_smem_to_gmem(
                buffer.at[pl.ds(num_heads, num_kv_heads)],
                pool.at[to, :, columns],
                predicate=to >= 0,
            )
        plgpu.copy_smem_to_gmem(
            value_smem, pool.at[to, :, pl.ds(head_dim, head_dim)], predicate=to >= 0
        )
        plgpu.wait_smem_to_gmem(0)

    def rotate_and_write(*refs):
        pl.run_scoped(
            functools.partial(rotate_kernel, *refs),
            first_smem=plgpu.SMEM((turned_heads, half), dtype),
            second_smem=plgpu.SMEM((turned_heads, half), dtype),
            value_smem=plgpu.SMEM((num_kv_heads, head_dim), dtype),
            barrier=plgpu.Barrier(num_arrivals=3),
        )

    # pl.kernel, not plgpu.kernel: only it takes the pool as a Ref, which is updated in place.
    return pl.kernel(
        rotate_and_write,
        out_type=jax.ShapeDtypeStruct((num_tokens, num_heads, head_dim), dtype),
        mesh=plgpu.Mesh(grid=(num_tokens,), grid_names=("token",)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        name="rotate_and_write",
    )
