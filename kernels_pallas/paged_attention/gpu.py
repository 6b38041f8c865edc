"""The op on NVIDIA Hopper: what is served, and how its kernels are called.

A step's keys and values are written (:mod:`.gpu_write`, :mod:`.gpu_rotate`), then contexts are
walked (:mod:`.gpu_kernel`), which writes a decode step's itself where it can (:mod:`.gpu_new`).
Long contexts are cut into parts (:mod:`.gpu_plan`), and the thread block of the last puts together
what they found (:mod:`.gpu_merge`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.paged_attention import gpu_kernel, gpu_new
from kernels_pallas.paged_attention.gpu_plan import (
    ROWS,
    Config,
    Plan,
    check,
    heuristic,
    is_decode,
    plan,
)
from kernels_pallas.paged_attention.gpu_rotate import rotate_and_write
from kernels_pallas.paged_attention.gpu_write import write_kv
from kernels_pallas.paged_attention.op import Implementation, PagedBatch, pool_shape

Tables = tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]


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
    config = config or heuristic(k.shape[1])
    return _attend(q, write_kv(k, v, pages, batch), batch, config, scale=scale)


def attention_of_qkv(
    qkv: Float[Array, "T HKV2 D"],
    tables: Tables,
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """The same of what the linear yields, queries and keys not turned yet: by ``tables``, cosine
    and sine of each token's angles, dimensions i and i + D/2 are turned, in float32."""
    num_tokens, (_, _, kv2, head_dim) = qkv.shape[0], pages.shape
    check(qkv.shape[1] - kv2, pages.dtype, pages)
    config = heuristic(kv2 // 2)
    qkv = qkv.astype(pages.dtype)
    if is_decode(batch, num_tokens) and head_dim == gpu_new.HEAD_DIM:
        return _attend(qkv, pages, batch, config, scale=scale, tables=tables)
    q, pages = rotate_and_write(qkv, tables, pages, batch)
    return _attend(q, pages, batch, config, scale=scale)


def share(
    batch: PagedBatch, x: jax.Array, *, num_heads: int, num_kv_heads: int
) -> tuple[Plan, jax.Array]:
    """What a program's calls share (:attr:`PagedBatch.shared`; a call without makes its own), and
    ``x`` of its tokens, which is there no sooner: attention reads the plan early."""
    shared = plan(batch, len(x), num_heads, num_kv_heads, heuristic(num_kv_heads))
    # No number of tokens is negative, but XLA does not know.
    return shared, jnp.where(shared.parts[0, 2] < 0, jnp.zeros_like(x), x)


def _attend(
    q: Float[Array, "T heads D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    config: Config,
    *,
    scale: float,
    tables: Tables | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """Attention of every new token over its row's pages; padding comes back as zeros. With
    ``tables`` q is a decode step's qkv, which is turned and written, too.

    Of a decode step with a plan that is shared, that and the batch are read, and pages without new
    tokens, before what the device was given last has ended: it must not write them.
    """
    num_pages, page_size, kv2, head_dim = pages.shape
    num_tokens, num_kv_heads = q.shape[0], kv2 // 2
    num_heads = q.shape[1] - (0 if tables is None else kv2)
    group, decode = num_heads // num_kv_heads, is_decode(batch, num_tokens)
    shared = batch.shared or plan(batch, num_tokens, num_heads, num_kv_heads, config)
    if shared.counters.shape != (config.slots * num_kv_heads,):
        raise ValueError(f"the plan that is shared is not for {config}")
    kernel = gpu_kernel.build(
        config,
        dtype=q.dtype,
        scale=scale,
        num_parts=len(shared.parts),
        decode=decode,
        early=decode and batch.shared is not None,
        fresh=tables is not None,
        width=1 if decode else ROWS // group,
        num_tokens=num_tokens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_row=batch.page_table.shape[1],
    )
    pool: Any = pages.reshape(num_pages * page_size, kv2 * head_dim)
    angles = []
    if tables is not None:
        pool = jax.new_ref(pool)
        angles = [table.reshape(num_tokens, head_dim // 2) for table in tables]
    out, *_ = kernel(
        q.reshape(-1, head_dim), pool, batch.page_table, shared.parts, *angles, shared.counters
    )
    if tables is not None:
        pages = jax.freeze(pool).reshape(pages.shape)
    return out.reshape(num_tokens, num_heads, head_dim), pages


IMPLEMENTATION = Implementation(
    name="mosaic_gpu",
    function=paged_attention,
    pool_shape=pool_shape,
    of_qkv=attention_of_qkv,
    share=share,
)
