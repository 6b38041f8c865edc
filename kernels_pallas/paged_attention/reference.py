"""The op in plain jnp: exact on every platform, and what a CPU runs.

Queries are cut into blocks of one row each; their contexts are walked in spans of keys with the
running softmax of Milakov & Gimelshein (arXiv:1805.02867), so memory stays bounded and a loop ends
with the longest context of the blocks it holds instead of at the table's width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.op import PagedBatch, token_rows

_MASKED = -1e30


class Config(NamedTuple):
    """How the work is cut."""

    span: int
    """Keys in one step of a loop; rounded up to whole pages."""
    query_block: int
    """Most queries in a block."""
    blocks: int | None
    """Blocks that share a loop, and so a trip count; None is all of them."""


WIDE = Config(span=128, query_block=32, blocks=None)
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
    num_tokens, num_heads, head_dim = q.shape
    num_kv = pages.shape[2] // 2
    row, position, valid = token_rows(batch, num_tokens)
    block, place, block_row, width = _query_blocks(batch, row, num_tokens, config.query_block)
    size = min(config.blocks or len(block_row), len(block_row))
    block_row = jnp.pad(block_row, (0, -len(block_row) % size))
    num_blocks = len(block_row)
    # Padding tokens must not land in a real block: theirs is past the end.
    block = jnp.where(valid, block, num_blocks)

    q_blocks = jnp.zeros((num_blocks, width, num_heads, head_dim), q.dtype)
    q_blocks = q_blocks.at[block, place].set(q, mode="drop")
    q_blocks = q_blocks.reshape(num_blocks, width, num_kv, num_heads // num_kv, head_dim)
    q_blocks = q_blocks.transpose(0, 2, 3, 1, 4)
    q_position = jnp.full((num_blocks, width), -1, jnp.int32)
    q_position = q_position.at[block, place].set(position, mode="drop")

    def attend_group(group: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return _attend_blocks(
            *group, pages, scale=scale, sliding_window=sliding_window, span=config.span
        )

    blocks = (q_blocks, q_position, batch.page_table[block_row])
    groups = [whole.reshape(-1, size, *whole.shape[1:]) for whole in blocks]
    out = lax.map(attend_group, tuple(groups))
    out = out.reshape(q_blocks.shape).transpose(0, 3, 1, 2, 4)
    out = out.reshape(num_blocks, width, num_heads, head_dim)
    return out.at[block, place].get(mode="fill", fill_value=0)


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
    batch: PagedBatch, row: jax.Array, num_tokens: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Cuts the queries into blocks of one row and at most ``most`` tokens each: block and place in
    it of every token ``[T]``, row of every block, and a block's width."""
    token = jnp.arange(num_tokens)
    if batch.max_q_len == 1:
        return token, jnp.zeros_like(token), token, 1
    num_rows = batch.kv_lens.shape[0]
    width = min(most, num_tokens)
    blocks_of_row = (jnp.diff(batch.cu_q_lens) + width - 1) // width
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(blocks_of_row)])
    blocks = jnp.arange(num_tokens // width + num_rows)
    block_row = jnp.searchsorted(first_block, blocks, side="right", method="compare_all") - 1
    offset = token - batch.cu_q_lens[row]
    block = first_block[row] + offset // width
    return block, offset % width, jnp.clip(block_row, 0, num_rows - 1), width
