"""A prompt step's tokens, cut into pieces and these put together in groups.

A piece is what one adapter has of one tile of tokens. What a step of the main kernel's pipeline
contracts, a group, has room for the hidden rows of four: of a large piece, whose shrink is cut in
up to four, or of four small ones. Small are those of a few tokens, where pieces are many.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from kernels_pallas.lora_linear.gpu_prompt_config import (
    FEW_PIECES,
    TILE_TOKENS,
    UNITS,
    WINDOW,
    window_of,
)
from kernels_pallas.lora_matmul.op import max_blocks


class Pieces(NamedTuple):
    """Tile by tile, the large pieces of each first and else in the order of their tokens. G is a
    bound on the groups: each has a piece, and of pieces there are no more than
    :func:`kernels_pallas.lora_matmul.op.max_blocks`."""

    slots: Int32[Array, " G units"]
    """A large piece's as often as there are units; -1 for what is padding."""
    starts: Int32[Array, " G units"]
    """First token."""
    counts: Int32[Array, " G units"]
    edges: Int32[Array, " tiles_and_one"]
    """The first group of each tile, and how many there are in all."""
    large: Int32[Array, " G"]
    """1 for the group of a large piece."""


def cut(token_slots: Int32[Array, " T"], num_slots: int) -> Pieces:
    """Cuts a step's tokens, on the device. ``token_slots``: each slot's tokens in one run, -1 for
    those without an adapter, which are in no piece."""
    num_tokens = token_slots.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    begins = (jnp.diff(token_slots, prepend=-1) != 0) | (token % TILE_TOKENS == 0)
    size = max_blocks(num_tokens, num_slots, TILE_TOKENS)
    (found,) = jnp.nonzero(begins & (token_slots >= 0), size=size, fill_value=num_tokens)
    starts = found.astype(jnp.int32)
    slots = token_slots[jnp.minimum(starts, num_tokens - 1)]
    of_piece = (token_slots == slots[:, None]) & (
        token // TILE_TOKENS == starts[:, None] // TILE_TOKENS
    )
    counts = jnp.sum(of_piece, axis=1, dtype=jnp.int32)
    # One more tile is that of the padding.
    num_tiles = -(-num_tokens // TILE_TOKENS)
    tiles = jnp.where(starts < num_tokens, starts // TILE_TOKENS, num_tiles)
    place = starts % TILE_TOKENS
    is_small = place + counts - window_of(place) <= WINDOW
    is_small &= jnp.sum(starts < num_tokens) > FEW_PIECES
    order = jnp.argsort(2 * tiles + is_small)
    starts, slots, counts, tiles, is_small = (
        values[order] for values in (starts, slots, counts, tiles, is_small)
    )

    of_tile = tiles[None, :] == jnp.arange(num_tiles)[:, None]
    large = jnp.sum(of_tile & ~is_small, axis=1, dtype=jnp.int32)
    small = jnp.sum(of_tile & is_small, axis=1, dtype=jnp.int32)
    edges = jnp.cumsum(jnp.append(0, large + (small + UNITS - 1) // UNITS), dtype=jnp.int32)
    before = jnp.cumsum(jnp.append(0, large + small), dtype=jnp.int32)
    index = jnp.arange(size) - before[tiles]
    among_small = index - jnp.append(large, 0)[tiles]
    group = edges[tiles] + jnp.where(is_small, index - among_small + among_small // UNITS, index)
    unit = jnp.where(is_small, among_small % UNITS, 0)

    # Past the last piece: one that has nothing.
    piece = (
        jnp.full((size, UNITS), size)
        .at[jnp.where(tiles < num_tiles, group, size), unit]
        .set(jnp.arange(size), mode="drop")
    )
    is_large = ~jnp.append(is_small, True)[piece[:, 0]]
    piece = jnp.where(is_large[:, None], piece[:, :1], piece)
    return Pieces(
        jnp.append(slots, -1)[piece],
        jnp.append(starts, num_tokens)[piece],
        jnp.append(counts, 0)[piece],
        edges,
        is_large.astype(jnp.int32),
    )
