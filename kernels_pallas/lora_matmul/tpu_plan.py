"""A step's LoRA work for the TPU kernel: its tiles, their items, and what brings A and B."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from kernels_pallas.lora_matmul.op import LoraBatch
from kernels_pallas.lora_matmul.tpu_config import GROUP


class Work(NamedTuple):
    """What the kernel reads to know what to do, as scalars.

    An item is one block of tokens and ``item_rank`` rank rows of its adapter. I is the most items a
    batch can have, W the most blocks; what lies past the counts means nothing.
    """

    tiles: Int32[Array, " W"]
    """The tiles of y that have items, in order."""
    tile_items: Int32[Array, " W+1"]
    """The first item of each, and after the last of them the number of items."""
    item_fetches: Int32[Array, " I"]
    """Which fetch brings an item's A and B: neighbours in different tiles may share one, so those
    of a tile are consecutive."""
    item_starts: Int32[Array, " I"]
    """First of an item's rows in its tile."""
    item_ends: Int32[Array, " I"]
    fetch_slots: Int32[Array, " I"]
    fetch_parts: Int32[Array, " I"]
    """Which ``item_rank`` rows of the adapter."""
    fetch_ranks: Int32[Array, " I"]
    """How many of them, or more, are below the adapter's true rank; 0 past the last fetch."""
    num_tiles: Int32[Array, " 1"]
    """At least 1: a batch without a served token visits a tile that has no item."""
    num_fetches: Int32[Array, " 1"]


def list_work(batch: LoraBatch, rank: int, item_rank: int, rows: int) -> Work:
    """The batch's blocks, each times the items its adapter has; ``rank`` is the bank's, a tile has
    ``rows`` tokens.

    Some operations on a few hundred integers. They are the same in every layer and in groups of
    one rank capacity, so that XLA keeps one copy of them in a step.
    """
    batch = jax.tree.map(jnp.asarray, batch)
    num_blocks = len(batch.block_slots)
    block = jnp.arange(num_blocks, dtype=jnp.int32)
    block_ranks = jnp.where(block < batch.num_blocks[0], batch.ranks[batch.block_slots], 0)
    parts = lax.div(block_ranks + (item_rank - 1), np.int32(item_rank))
    ends = jnp.cumsum(parts)
    num_items = ends[-1]

    # As many more as a group may reach past the last item.
    most = num_blocks * pl.cdiv(rank, item_rank) + GROUP - 1
    item = jnp.arange(most, dtype=jnp.int32)
    of = jnp.minimum(_count(ends[None, :] <= item[:, None]), num_blocks - 1)
    slot, part = batch.block_slots[of], item - (ends - parts)[of]
    tile = lax.div(batch.block_starts[of], np.int32(rows))
    start = batch.block_starts[of] - tile * rows

    def runs(*keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which run of equal keys each item is in, and the first item of each run."""
        changes = [jnp.diff(key, prepend=-1) != 0 for key in keys]
        run = jnp.cumsum(functools.reduce(jnp.logical_or, changes) & (item < num_items)) - 1
        first = jnp.minimum(_count(run[None, :] < item[:, None]), num_items)
        return jnp.maximum(run, 0), first

    _, tile_items = runs(tile)
    fetch, fetch_items = runs(slot, part)
    tile_items = jnp.append(tile_items, num_items)[: num_blocks + 1]
    fetched = jnp.minimum(fetch_items, most - 1)
    ranks = batch.ranks[slot[fetched]] - part[fetched] * item_rank
    return Work(
        tiles=tile[tile_items[:-1]],
        tile_items=tile_items,
        item_fetches=fetch,
        item_starts=start,
        item_ends=start + batch.block_counts[of],
        fetch_slots=slot[fetched],
        fetch_parts=part[fetched],
        fetch_ranks=jnp.where(fetch_items < num_items, ranks, 0),
        num_tiles=jnp.maximum(_count(tile_items < num_items), 1)[None],
        num_fetches=_count(fetch_items < num_items)[None],
    )


def _count(condition: jax.Array) -> jax.Array:
    return jnp.sum(condition, axis=-1, dtype=jnp.int32)
