"""How the Mosaic GPU kernel's work is cut: query blocks, parts of a context, and their sum."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from kernels_pallas.paged_attention.op import PagedBatch

_MULTIPROCESSORS = 132
"""Of an H100 or H200."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How a thread block walks the context."""

    splits: int
    """Thread blocks that share a query block's context."""
    tile: int
    """Keys in one pipeline stage, a multiple of 64."""
    stages: int
    """Depth of the pipeline, at least 2."""


def heuristic(num_blocks: int) -> Config:
    """The configuration for this many pairs of query block and key head."""
    splits = 1
    while splits < 16 and 2 * splits * num_blocks <= _MULTIPROCESSORS:
        splits *= 2
    return Config(splits=splits, tile=64, stages=2)


def chunk_blocks(batch: PagedBatch, num_tokens: int, width: int) -> Int32[Array, "N 4"]:
    """Query blocks of up to ``width`` tokens of one row each: row, first token, tokens, and keys
    that the last sees.

    Padding tokens are a last row, without context. Blocks that are not needed have no tokens.
    """
    num_rows = batch.kv_lens.shape[0]
    starts = jnp.append(batch.cu_q_lens, num_tokens)
    lengths = jnp.diff(starts)
    last = jnp.cumsum((lengths + width - 1) // width)
    block = jnp.arange(num_tokens // width + num_rows + 1, dtype=jnp.int32)
    row = jnp.searchsorted(last, block, side="right", method="compare_all")
    row = jnp.minimum(row, num_rows)
    offset = (block - last[row]) * width + (lengths[row] + width - 1) // width * width
    count = jnp.clip(lengths[row] - offset, 0, width)
    end = jnp.append(batch.kv_lens, 0)[row] - (lengths[row] - offset - count)
    end = jnp.where(row < num_rows, end, 0)
    row_in_table = jnp.minimum(row, num_rows - 1)
    columns = (row_in_table, starts[row] + offset, count, end)
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)


def combine(
    partial: Float[Array, "splits rows columns"], head_dim: int, dtype: DTypeLike
) -> Float[Array, "rows D"]:
    """The output from its parts, weighted by what is in their columns after ``head_dim``: the
    base-2 logarithm of the part's sum of exponentials."""
    parts = [(part[:, :head_dim], part[:, head_dim : head_dim + 1]) for part in partial]
    high = functools.reduce(jnp.maximum, (level for _, level in parts))
    weights = [jnp.exp2(level - high) for _, level in parts]
    out = sum(weight * part for weight, (part, _) in zip(weights, parts, strict=True))
    return (out / sum(weights)).astype(dtype)
