"""How the Mosaic GPU kernel's work is cut: into query blocks, and these into parts of a context.

A thread block walks a context tile by tile, so one long context among short ones would be all that
a step waits for. Contexts that are longer than a thread block's share of the step's tiles, were
all of them dealt out to those that run at once, are cut into parts of at most that many.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int32

from kernels_pallas import gpu_counter
from kernels_pallas.paged_attention.op import PagedBatch

HEAD_DIMS = (64, 128)
ROWS = 64
"""Rows of ``wgmma``: (token, query head) pairs of a thread block."""
_AT_ONCE = 2 * 132
"""Thread blocks that run at once on an H100 or H200: two on a multiprocessor."""
_LEAST_TILES = 2
"""Of a part: to put parts together takes as long as a tile or two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How thread blocks walk the contexts."""

    more: int
    """Thread blocks for parts, for each key head, beside one for each query block; at least 1."""
    tile: int = 64
    """Keys in one pipeline stage, a multiple of 64."""
    stages: int = 2
    """Depth of the pipeline, at least 2."""

    @property
    def slots(self) -> int:
        """Places for what parts found, for each key head: of ``n`` query blocks that are cut, each
        in two at least, there are no more than ``n + more`` parts."""
        return 2 * self.more


class Plan(NamedTuple):
    """What the calls of a program share."""

    parts: Int32[Array, "N 7"]
    """Row, first token, tokens, keys that the last sees, which part of how many, and the first
    part's slot (:func:`cut`)."""
    counters: Any
    """A Ref, of each slot and key head, that every call leaves as it finds it."""


def check(num_heads: int, dtype: DTypeLike, pages: Array) -> None:
    """Raises ValueError for queries and pages that the kernel cannot serve."""
    _, page_size, kv2, head_dim = pages.shape
    group, rest = divmod(num_heads, kv2 // 2)
    if dtype not in (jnp.bfloat16, jnp.float16) or pages.dtype != dtype:
        raise ValueError(
            f"q and pages must both be bfloat16 or both float16, got {dtype} and {pages.dtype}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head size {head_dim} must be one of {HEAD_DIMS}")
    if rest or group > ROWS:
        raise ValueError(
            f"{num_heads} query heads must be 1 to {ROWS} for each of {kv2 // 2} key heads"
        )
    if not serves_page_size(page_size):
        raise ValueError(f"page size {page_size} must be 8, 16, 32 or a multiple of 64")


def serves_page_size(page_size: int) -> bool:
    """Whether pages of this many tokens can be copied in whole tiles of 8 rows."""
    return page_size in (8, 16, 32) or page_size % ROWS == 0


def heuristic(num_kv_heads: int) -> Config:
    """The configuration for so many key heads."""
    return Config(more=-(-_AT_ONCE // num_kv_heads))


def is_decode(batch: PagedBatch, num_tokens: int) -> bool:
    """Whether token i is row i's, so that a query block is a row."""
    return batch.max_q_len == 1 and batch.kv_lens.shape[0] == num_tokens


def plan(
    batch: PagedBatch, num_tokens: int, num_heads: int, num_kv_heads: int, config: Config
) -> Plan:
    """For the program that is being traced."""
    if is_decode(batch, num_tokens):
        row = jnp.arange(num_tokens, dtype=jnp.int32)
        blocks = jnp.stack([row, row, jnp.ones_like(row), batch.kv_lens], axis=1)
    else:
        blocks = chunk_blocks(batch, num_tokens, ROWS // (num_heads // num_kv_heads))
    counters = gpu_counter.new(config.slots * num_kv_heads)
    return Plan(cut(blocks, config), counters)


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


def cut(blocks: Int32[Array, "N 4"], config: Config) -> Int32[Array, "N_and_more 7"]:
    """The blocks' parts, the longest first, a block's one after the other: it is the last that
    waits for the others. What is not needed has no tokens."""
    count, end = blocks[:, 2], blocks[:, 3]
    tiles = jnp.where(count > 0, (end + config.tile - 1) // config.tile, 0)
    longest = jnp.maximum(_LEAST_TILES, -(-jnp.sum(tiles) // config.more))
    parts = jnp.maximum(1, -(-tiles // longest))
    size = -(-tiles // parts)
    index = jnp.arange(len(blocks), dtype=jnp.int32)
    is_before = (size > size[:, None]) | (size == size[:, None]) & (index < index[:, None])
    # Columns side by side: a reduction is a kernel of its own.
    before, slots = _sums(is_before, [parts, jnp.where(parts > 1, parts, 0)]).T
    place = jnp.arange(len(blocks) + config.more, dtype=jnp.int32)
    is_mine = (before <= place[:, None]) & (place[:, None] < before + parts)
    *of_block, begin, of_parts, slots = _sums(is_mine, [*blocks.T, before, parts, slots]).T
    part = jnp.where(of_parts > 0, place - begin, 0)
    return jnp.stack([*of_block, part, of_parts, slots], axis=1)


def _sums(
    chosen: Bool[Array, "M N"], columns: list[Int32[Array, " N"]]
) -> Int32[Array, "M columns"]:
    """Of each column, what is chosen."""
    values = jnp.stack(columns, axis=1)
    return jnp.sum(jnp.where(chosen[:, :, None], values, 0), axis=1, dtype=jnp.int32)
