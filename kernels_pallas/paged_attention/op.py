"""The op: write the step's keys and values into their pages, then attend over each row's context.

A step holds R rows (one per running sequence) whose new tokens lie flat, one row after another.
Row ``i`` owns tokens ``cu_q_lens[i] ... cu_q_lens[i + 1]`` and, once they are written, has
``kv_lens[i]`` tokens of context, the last of which are those new tokens. Token ``j`` of the context
lies in page ``page_table[i, j // page_size]`` at offset ``j % page_size``::

    out[t] = softmax(scale * q[t] K[: position(t) + 1]^T) V[: position(t) + 1]

with ``position(t) = kv_lens[i] - (cu_q_lens[i + 1] - t)``. A sliding window of w keeps the last w
of those keys. One op serves decode (one token a row), chunks of a prompt, and any mixture.

A layer's pool is one array ``pages[P, page_size, 2 * KV, D]``, a key head at even and its value
head at odd indices, so that a token's keys and values are written by one contiguous copy. An
implementation may pad the last two dimensions; :attr:`Implementation.pool_shape` says so, and
nothing outside it looks into a page.

Shape letters: T tokens (padded), R rows (padded), P pages, H query heads, KV key/value heads,
D head size.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


@typing.no_type_check  # leaves are numpy on the host, tracers in a program, shapes in between
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Which tokens belong to which row, and where each row's context lies."""

    cu_q_lens: Int32[Array, " R+1"]
    """First token of each row; rows past ``num_rows`` repeat the end."""
    kv_lens: Int32[Array, " R"]
    """Context of each row including its new tokens; 0 past ``num_rows``."""
    page_table: Int32[Array, "R pages_per_row"]
    num_rows: Int32[Array, " 1"]
    max_q_len: int = dataclasses.field(metadata={"static": True})
    """Most new tokens in a row: 1 promises a decode step, where token i is row i's."""
    shared: Any = None
    """What an implementation made of it for all layers (:attr:`Implementation.share`)."""


class Implementation(NamedTuple):
    """One way to compute the op, and the pool it reads."""

    name: str
    function: Callable[..., tuple[jax.Array, jax.Array]]
    """``(q, k, v, pages, batch, *, scale, sliding_window) -> (out, pages)``: the output of every
    new token, zero for padding, and the pool with the new keys and values."""
    pool_shape: Callable[[int, int, int, int], tuple[int, int, int, int]]
    """``(pages, page_size, kv_heads, head_dim)`` to the shape of a layer's pool."""
    of_qkv: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    """``(qkv, tables, pages, batch, *, scale) -> (out, pages)``: the same of ``qkv[T, H + 2 * KV,
    D]`` whose queries and keys are to be turned first, by the cosines and sines ``[T, 1, D / 2]``
    of ``tables``; None where nothing is gained by it."""
    share: Callable[..., tuple[Any, jax.Array]] | None = None
    """``(batch, x, *, num_heads, num_kv_heads)``: what the calls of a program share, as
    :attr:`PagedBatch.shared`, and ``x``, something of each token that all of them come after and
    that comes after what they share; None if they share nothing."""


def pool_shape(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """The pool without padding: ``[pages, page_size, 2 * kv_heads, head_dim]``."""
    return (num_pages, page_size, 2 * num_kv_heads, head_dim)


def token_rows(batch: PagedBatch, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and position of every token, and whether it is one (not padding); each ``[T]``."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if batch.max_q_len == 1:
        row = token
    else:
        row = jnp.searchsorted(batch.cu_q_lens, token, side="right", method="compare_all") - 1
        row = jnp.clip(row, 0, batch.kv_lens.shape[0] - 1).astype(jnp.int32)
    valid = token < batch.cu_q_lens[batch.num_rows[0]]
    position = batch.kv_lens[row] - (batch.cu_q_lens[row + 1] - token)
    return row, jnp.where(valid, position, 0), valid
