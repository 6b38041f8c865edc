"""How the Hopper kernel cuts a prompt step's linear."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from kernels_pallas.lora_linear.gpu_config import MULTIPROCESSORS, PART
from kernels_pallas.lora_matmul.gpu_config import LANES

CONSUMERS = 2
"""Warpgroups that multiply."""
MOST_PARTS = 2
"""Tiles of 64 rows of W for each of them (:func:`parts_of`)."""
WIDTH = 4
"""Tiles of columns that are taken side by side, for what they share in the cache."""
TILE_TOKENS = 128
"""Tokens of a tile."""
HALF_TILE = TILE_TOKENS // 2
"""Tokens of a large piece that a thread block shrinks: a ``wgmma``'s."""
WINDOW = 32
"""Tokens that a shrink copies of a small piece, which lies among them (:func:`window_of`)."""
UNITS = LANES // PART
"""Hidden rows that are contracted in one step of the pipeline, sixteen ranks of each."""
FEW_PIECES = MULTIPROCESSORS // UNITS
"""Of a step with no more all are treated as large, since there are multiprocessors for all cuts."""
SHRINK_LANES = 128
"""Least columns of x and A in one step of a shrink (:func:`shrink_pipeline`)."""
_SHRINK_BYTES = 192 * 1024
"""What the stages of a shrink take of a multiprocessor's shared memory."""
_LEAST_TOKENS = 1024
"""With fewer, and no adapters, XLA is faster."""
_LEAST_TILES = 128
"""With fewer XLA and the LoRA kernel are faster, too: they leave multiprocessors idle."""
_MOST_RANKS = 64
"""Of a bank: that more are worth a pipeline step for each sixteen of a piece was not measured."""


def parts_of(tokens: int, splits: tuple[int, ...], *, gated: bool) -> int:
    """Tiles of 64 rows of W for each warpgroup that multiplies: with a gate one of the gate's and
    one of the other's, else those with which the multiprocessors are done first."""
    if gated:
        return 2
    if any(split % (2 * CONSUMERS * LANES) for split in splits):
        return 1

    def turns(parts: int) -> int:
        tiles = sum(splits) // (parts * CONSUMERS * LANES) * -(-tokens // TILE_TOKENS)
        return -(-tiles // MULTIPROCESSORS) * parts

    return 1 if turns(1) < turns(2) else 2


def stages_of(parts: int) -> int:
    """Depth of the pipeline: what fits in shared memory beside the results."""
    return 4 if parts == MOST_PARTS else 6


def window_of(place: Any) -> Any:
    """Where in its tile the window of a piece begins whose first token is at ``place`` of it, a
    number or an array."""
    return jnp.minimum(place & -8, TILE_TOKENS - WINDOW)


def shrinks_of(tokens: int, d_in: int, splits: tuple[int, ...], rank: int) -> int:
    """Parts of d_in that the shrinks of large pieces are cut into; ``rank`` is the bank's
    capacity."""
    # Most steps are of long prompts, whose pieces are not many more than tiles.
    uncut = -(-tokens // HALF_TILE) * -(-len(splits) * rank // LANES)
    cuts = UNITS
    while cuts > 1 and (uncut * cuts > MULTIPROCESSORS or d_in % (cuts * SHRINK_LANES)):
        cuts //= 2
    return cuts


def shrink_bytes(tokens: int, groups: int, cuts: int) -> int:
    """What the stages of a shrink take of shared memory, in a step of at most so many groups, and
    with so many thread blocks for half a tile of a large piece. Where these may be more than there
    are multiprocessors, two share one, unless pieces may be small: those are not cut."""
    # A piece that begins or ends within a half tile shares that with another.
    halves = groups + -(-tokens // TILE_TOKENS)
    shared = groups <= FEW_PIECES and halves * cuts > MULTIPROCESSORS
    return _SHRINK_BYTES // 2 if shared else _SHRINK_BYTES


def shrink_pipeline(columns: int, rows: int, tokens: int, room: int) -> tuple[int, int]:
    """Columns of x and A in one step of a shrink over so many, and how many steps fit in ``room``
    bytes, for so many rows of A and of x. A step takes as long for few columns as for many, but
    three of them should fit."""

    def stages(lanes: int) -> int:
        # Behind x there are the rows that ``wgmma`` multiplies beyond those.
        return (room // (2 * lanes) - max(0, LANES - tokens)) // (rows + tokens)

    wide = (4 * SHRINK_LANES, 2 * SHRINK_LANES)
    fitting = (lanes for lanes in wide if columns % lanes == 0 and stages(lanes) >= 3)
    lanes = next(fitting, SHRINK_LANES)
    return lanes, stages(lanes)


def least_tokens(splits: tuple[int, ...], *, gated: bool, with_lora: bool) -> int:
    """From how many tokens on a linear is to be served.

    With adapters tiles may be half as large, and no faster than XLA's product, after which comes
    the LoRA kernel.
    """
    parts = 1 if with_lora and not gated else MOST_PARTS
    tiles = sum(splits) // (parts * CONSUMERS * LANES)
    least = -(-_LEAST_TILES // tiles) * TILE_TOKENS
    # Steps of a single tile of tokens are small ones, which the other kernel may serve or not.
    return max(2 * TILE_TOKENS if with_lora else _LEAST_TOKENS, least)


def problem(d_in: int, splits: tuple[int, ...], rank: int, *, gated: bool) -> str | None:
    """Why a linear cannot be served, None if it can; ``rank`` is the bank's capacity, 0 without."""
    tile = CONSUMERS * LANES
    if rank > _MOST_RANKS:
        return f"the rank capacity {rank} must be at most {_MOST_RANKS}"
    if d_in % SHRINK_LANES or any(split % tile for split in splits) or rank % PART:
        return (
            f"d_in {d_in} must be a multiple of {SHRINK_LANES}, the splits {splits} of {tile} and "
            f"the rank capacity {rank} of {PART}"
        )
    return None
