"""The op in plain jnp: exact on every platform, and what a CPU runs.

Queries are cut into blocks of one row each; their contexts are walked in spans of keys with the
running softmax of Milakov & Gimelshein (arXiv:1805.02867), so memory stays bounded and a loop ends
with the longest context of the blocks it holds instead of at the table's width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.op import (
    Implementation,
    PagedBatch,
    pool_shape,
    token_rows,
)

_MASKED = -1e30


class Config(NamedTuple):
    """How the work is cut."""

    span: int
    """Keys in one step of a loop; rounded up to whole pages."""
    query_block: int
    """Most queries in a block."""
    blocks: int | None
    """Blocks that share a loop, and so a trip count; None is all of them."""


WIDE = Config(span=512, query_block=32, blocks=None)
"""For an accelerator: few, large operations."""
NARROW = Config(span=64, query_block=16, blocks=2)
"""For a CPU: a loop's keys stay in the cache, and no row waits for a longer one's context."""


def paged_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T KV D"],
    v: Float[Array, "T KV D"],
    pages: Float[Array, "P page_size KV2 D"],
    batch: PagedBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    config: Config = WIDE,
) -> tuple[Float[Array, "T H D"], Float[Array, "P page_size KV2 D"]]:
    """Writes ``k`` and ``v`` into the pool and attends (formula: :mod:`.op`).

    Softmax and both accumulations are float32. Returns the output in q's dtype and the pool.
    """
    pages = write_kv(k, v, pages, batch)
    out = attend(q, pages, batch, scale=scale, sliding_window=sliding_window, config=config)
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
    config: Config = WIDE,
) -> Float[Array, "T H D"]:
    """Attention of every new token over its row's pages; padding rows come back as zeros."""
    num_heads, head_dim = q.shape[1:]
    num_kv = pages.shape[2] // 2
    row, tokens, places = _query_blocks(batch, len(q), config)
    end = batch.cu_q_lens[row + 1, None]
    positions = jnp.where(tokens < end, batch.kv_lens[row, None] - (end - tokens), -1)
    table = batch.page_table[row]
    blocks = q.at[tokens].get(mode="clip")
    blocks = blocks.reshape(*tokens.shape, num_kv, num_heads // num_kv, head_dim)
    blocks = blocks.transpose(0, 2, 3, 1, 4)
    size = min(config.blocks or len(row), len(row))

    def attend_group(i: jax.Array, blocks: jax.Array) -> jax.Array:
        first = i * size
        out = _attend_blocks(
            lax.dynamic_slice_in_dim(blocks, first, size),
            lax.dynamic_slice_in_dim(positions, first, size),
            lax.dynamic_slice_in_dim(table, first, size),
            pages,
            scale=scale,
            sliding_window=sliding_window,
            span=config.span,
        )
        # Output takes the place of queries.
        return lax.dynamic_update_slice_in_dim(blocks, out, first, axis=0)

    blocks = lax.fori_loop(0, len(row) // size, attend_group, blocks)
    out = blocks.transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, head_dim)
    return out.at[places].get(mode="fill", fill_value=0)


def _attend_blocks(
    q: Float[Array, "N KV group width D"],
    q_position: Int32[Array, "N width"],
    table: Int32[Array, "N pages_per_row"],
    pages: Float[Array, "P page_size KV2 D"],
    *,
    scale: float,
    sliding_window: int | None,
    span: int,
) -> Float[Array, "N KV group width D"]:
    """Attention of N blocks, each over the pages of its ``table``, until the last of their
    positions; what stands at position -1 comes back as zeros."""
    num_blocks, num_kv, _, _, head_dim = q.shape
    page_size = pages.shape[1]
    pages_per_span = -(-span // page_size)
    span = pages_per_span * page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_per_span)))
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def add_span(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        high, total, out = carry
        ids = lax.dynamic_slice_in_dim(table, i * pages_per_span, pages_per_span, axis=1)
        kv = pages[ids].reshape(num_blocks, span, num_kv, 2, head_dim).astype(q.dtype)
        key_position = i * span + jnp.arange(span)
        # [n, q, k]
        seen = key_position <= q_position[:, :, None]
        if sliding_window is not None:
            seen &= key_position > q_position[:, :, None] - sliding_window
        # A key nobody sees may lie in a page that holds anything, NaN included.
        values = jnp.where(seen.any(axis=1)[:, :, None, None], kv[:, :, :, 1], 0)
        # [n, kv head, group, q, k]
        seen = seen[:, None, None]
        scores = jnp.einsum(
            "nhgqd,nkhd->nhgqk",
            q,
            kv[:, :, :, 0],
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(seen, scores * scale, _MASKED)
        new_high = jnp.maximum(high, scores.max(axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - new_high[..., None]), 0.0)
        decay = jnp.exp(high - new_high)
        part = jnp.einsum(
            "nhgqk,nkhd->nhgqd",
            weights.astype(q.dtype),
            values,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        total = total * decay + weights.sum(axis=-1)
        return new_high, total, out * decay[..., None] + part

    carry = (
        jnp.full(q.shape[:-1], _MASKED, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    num_spans = (jnp.max(q_position) + span) // span
    _, total, out = lax.fori_loop(0, num_spans, add_span, carry)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    return out.astype(q.dtype)


def _query_blocks(
    batch: PagedBatch, num_tokens: int, config: Config
) -> tuple[Int32[Array, " N"], Int32[Array, "N width"], Int32[Array, " T"]]:
    """Cuts the queries into N blocks of one row each; N is below ``config.blocks`` or a multiple.

    Returns the row of every block; its tokens, which past the row's end are another's or none; and
    where each token lies among all of those, past the end for padding.
    """
    token_row, _, valid = token_rows(batch, num_tokens)
    num_rows = len(batch.kv_lens)
    width = min(config.query_block, num_tokens, batch.max_q_len)
    # Each row may end in a block that is not full, if a block can be.
    num_blocks = num_tokens // width + (num_rows if width > 1 else 0)
    num_blocks += -num_blocks % min(config.blocks or 1, num_blocks)

    blocks_of_row = (jnp.diff(batch.cu_q_lens) + width - 1) // width
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks_of_row)])
    block = jnp.arange(num_blocks)
    row = jnp.searchsorted(first_block, block, side="right", method="compare_all") - 1
    row = jnp.minimum(row, num_rows - 1)
    start = batch.cu_q_lens[row] + (block - first_block[row]) * width
    tokens = start[:, None] + jnp.arange(width)

    offset = jnp.arange(num_tokens) - batch.cu_q_lens[token_row]
    places = first_block[token_row] * width + offset
    return row, tokens, jnp.where(valid, places, num_blocks * width)


WIDE_IMPLEMENTATION, NARROW_IMPLEMENTATION = (
    Implementation(
        name=f"reference, {name}",
        function=functools.partial(paged_attention, config=config),
        pool_shape=pool_shape,
    )
    for name, config in (("wide", WIDE), ("narrow", NARROW))
)
