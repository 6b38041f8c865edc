"""The op in plain jnp: exact on every platform, and what a CPU runs.

Queries are cut into blocks of one row each; the context is walked in spans of
``CONTEXT_SPAN`` keys with the running softmax of Milakov & Gimelshein (arXiv:1805.02867), so memory
stays bounded and the loop ends at the step's longest context instead of at the table's width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.paged_attention.op import PagedBatch, token_rows

CONTEXT_SPAN = 128
QUERY_BLOCK = 32
_MASKED = -1e30


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """Writes ``k`` and ``v`` into the pool and attends (formula: :mod:`.op`).

    Softmax and both accumulations are float32. Returns the output in q's dtype and the pool.
    """
    pages = write_kv(k, v, pages, batch)
    out = attend(q, pages, batch, scale=scale, sliding_window=sliding_window)
    return out, pages


def write_kv(
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
) -> Float[Array, "P page_size KV2 D"]:
    """The pool with every new token's keys and values in place; padding writes nothing."""
    num_pages, page_size, kv2, head_dim = pages.shape
    num_tokens = k.shape[0]
    row, position, valid = token_rows(batch, num_tokens)
    page = batch.page_table[row, position // page_size]
    index = jnp.where(valid, page * page_size + position % page_size, num_pages * page_size)
    kv = jnp.stack([k, v], axis=2).reshape(num_tokens, kv2, head_dim).astype(pages.dtype)
    flat = pages.reshape(num_pages * page_size, kv2, head_dim)
    flat = flat.at[index].set(kv, mode="drop")
    return flat.reshape(pages.shape)


def attend(
    q: Float[Array, "T H D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None,
) -> Float[Array, "T H D"]:
    """Attention of every new token over its row's pages; padding rows come back as zeros."""
    num_tokens, num_heads, head_dim = q.shape
    page_size = pages.shape[1]
    row, position, valid = token_rows(batch, num_tokens)

    block, place, block_row, width = _query_blocks(batch, row, num_tokens)
    num_blocks = len(block_row)
    # Padding tokens must not land in a real block: theirs is past the end.
    block = jnp.where(valid, block, num_blocks)

    num_kv = pages.shape[2] // 2
    group = num_heads // num_kv
    q_blocks = jnp.zeros((num_blocks, width, num_heads, head_dim), q.dtype)
    q_blocks = q_blocks.at[block, place].set(q, mode="drop")
    q_blocks = q_blocks.reshape(num_blocks, width, num_kv, group, head_dim)
    q_position = jnp.full((num_blocks, width), -1, jnp.int32)
    q_position = q_position.at[block, place].set(position, mode="drop")

    pages_per_span = -(-CONTEXT_SPAN // page_size)
    span = pages_per_span * page_size
    table = batch.page_table
    short = -table.shape[1] % pages_per_span
    table = jnp.pad(table, ((0, 0), (0, short)))[block_row]
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def add_span(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        high, total, out = carry
        ids = lax.dynamic_slice_in_dim(table, i * pages_per_span, pages_per_span, axis=1)
        kv = pages[ids].reshape(num_blocks, span, num_kv, 2, head_dim)
        key_position = i * span + jnp.arange(span)
        seen = key_position[None, None, :] <= q_position[:, :, None]
        if sliding_window is not None:
            seen &= key_position[None, None, :] > q_position[:, :, None] - sliding_window
        # [n, q, k] -> [n, kv head, group, q, k]
        seen = seen[:, None, None]
        scores = jnp.einsum(
            "nqhgd,nkhd->nhgqk",
            q_blocks,
            kv[:, :, :, 0].astype(q.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(seen, scores * scale, _MASKED)
        new_high = jnp.maximum(high, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_high[..., None]), 0.0)
        decay = jnp.exp(high - new_high)
        # A key nobody sees may lie in a page that holds anything, NaN included.
        values = jnp.where(seen.any(axis=3)[:, 0, 0, :, None, None], kv[:, :, :, 1], 0)
        part = jnp.einsum(
            "nhgqk,nkhd->nhgqd",
            weights.astype(q.dtype),
            values.astype(q.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        total = total * decay + weights.sum(axis=-1)
        return new_high, total, out * decay[..., None] + part

    shape = (num_blocks, num_kv, group, width)
    carry = (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    num_spans = (jnp.max(batch.kv_lens) + span - 1) // span
    _, total, out = lax.fori_loop(0, num_spans, add_span, carry)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    # [n, kv head, group, q, d] -> [n, q, head, d]
    out = out.transpose(0, 3, 1, 2, 4).reshape(num_blocks, width, num_heads, head_dim)
    out = out.at[block, place].get(mode="fill", fill_value=0)
    return out.astype(q.dtype)


def _query_blocks(
    batch: PagedBatch, row: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Cuts the queries into blocks of one row each: block and place in it of every token ``[T]``,
    row of every block, and a block's width."""
    token = jnp.arange(num_tokens)
    if batch.max_q_len == 1:
        return token, jnp.zeros_like(token), token, 1
    num_rows = batch.kv_lens.shape[0]
    width = min(QUERY_BLOCK, num_tokens)
    blocks_of_row = (jnp.diff(batch.cu_q_lens) + width - 1) // width
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks_of_row)])
    blocks = jnp.arange(num_tokens // width + num_rows)
    block_row = jnp.searchsorted(first_block, blocks, side="right", method="compare_all") - 1
    offset = token - batch.cu_q_lens[row]
    block = first_block[row] + offset // width
    return block, offset % width, jnp.clip(block_row, 0, num_rows - 1), width
