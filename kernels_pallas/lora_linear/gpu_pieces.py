"""A prompt step's tokens, cut into pieces: those of one adapter in one tile of tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from kernels_pallas.lora_matmul.op import max_blocks


class Pieces(NamedTuple):
    """In the order of their tokens; P is a bound on their number
    (:func:`kernels_pallas.lora_matmul.op.max_blocks`)."""

    slots: Int32[Array, " P"]
    starts: Int32[Array, " P"]
    """First token; T, the step's number of tokens, for what is padding."""
    counts: Int32[Array, " P"]
    edges: Int32[Array, " tiles_and_one"]
    """The first piece of each tile, and how many there are in all."""


def cut(token_slots: Int32[Array, " T"], num_slots: int, tile_tokens: int) -> Pieces:
    """Cuts a step's tokens, on the device. ``token_slots``: each slot's tokens in one run, -1 for
    those without an adapter, which are in no piece."""
    num_tokens = token_slots.shape[0]
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    begins = (jnp.diff(token_slots, prepend=-1) != 0) | (token % tile_tokens == 0)
    size = max_blocks(num_tokens, num_slots, tile_tokens)
    (found,) = jnp.nonzero(begins & (token_slots >= 0), size=size, fill_value=num_tokens)
    starts = found.astype(jnp.int32)
    slots = token_slots[jnp.minimum(starts, num_tokens - 1)]
    of_piece = (token_slots == slots[:, None]) & (
        token // tile_tokens == starts[:, None] // tile_tokens
    )
    counts = jnp.sum(of_piece, axis=1, dtype=jnp.int32)
    tiles = jnp.arange(-(-num_tokens // tile_tokens) + 1, dtype=jnp.int32)
    # Beyond the last tile there is only padding.
    edge = jnp.minimum(tiles * tile_tokens, num_tokens)
    edges = jnp.sum(starts[None, :] < edge[:, None], axis=1, dtype=jnp.int32)
    return Pieces(jnp.maximum(slots, 0), starts, counts, edges)
