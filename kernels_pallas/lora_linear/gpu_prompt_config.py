"""How the Hopper kernel cuts a prompt step's linear."""

from __future__ import annotations

from kernels_pallas.lora_linear.gpu_config import MULTIPROCESSORS, PART
from kernels_pallas.lora_matmul.gpu_config import LANES

PARTS = 2
"""Tiles of 64 rows of W for each warpgroup that multiplies: with a gate one of the gate's and one
of the other's."""
CONSUMERS = 2
"""Warpgroups that multiply."""
ROWS = PARTS * CONSUMERS * LANES
"""Of W in a tile."""
STAGES = 4
"""Depth of the pipelines."""
WIDTH = 4
"""Tiles of columns that are taken side by side, for what they share in the cache."""
TILE_TOKENS = 128
"""Tokens of a tile. Each piece costs as much, however few tokens it has: an engine whose bank has
more slots than a step has tiles leaves that step's adapters to the LoRA kernel, which was measured
to be faster where most pieces are single tokens."""
SHRINK_LANES = 2
"""Blocks of 64 columns of x and A in one step of a shrink."""
LEAST_TOKENS = 1024
"""With fewer XLA is faster, and with fewer than _LEAST_TILES, which leave multiprocessors idle."""
_LEAST_TILES = 128
_MOST_RANKS = 64
"""Of a bank: that more are worth a pipeline step for each sixteen of a piece was not measured."""
_MOST_CUTS = 4
"""Each is one more step of the pipeline for every piece of a tile, and 8 were slower."""


def shrinks_of(tokens: int, d_in: int, splits: tuple[int, ...], rank: int, *, gated: bool) -> int:
    """Parts of d_in that the shrinks of a step are cut into; ``rank`` is the bank's capacity."""
    # Most steps are of long prompts, whose pieces are not many more than tiles.
    uncut = -(-tokens // TILE_TOKENS) * -(-len(splits) * rank // LANES)
    # With a gate the parts of two members are contracted, two and two.
    cuts = _MOST_CUTS // (2 if gated else 1)
    while cuts > 1 and (uncut * cuts > MULTIPROCESSORS or d_in % (cuts * SHRINK_LANES * LANES)):
        cuts //= 2
    return cuts


def least_tokens(splits: tuple[int, ...], *, gated: bool) -> int:
    """From how many tokens on a linear is to be served."""
    columns = sum(splits) // (2 if gated else 1)
    tiles = columns // (ROWS // (2 if gated else 1))
    return max(LEAST_TOKENS, -(-_LEAST_TILES // tiles) * TILE_TOKENS)


def problem(d_in: int, splits: tuple[int, ...], rank: int, *, gated: bool) -> str | None:
    """Why a linear cannot be served, None if it can; ``rank`` is the bank's capacity, 0 without."""
    tile, lanes = ROWS // (2 if gated else 1), SHRINK_LANES * LANES
    if rank > _MOST_RANKS:
        return f"the rank capacity {rank} must be at most {_MOST_RANKS}"
    if d_in % lanes or any(split % tile for split in splits) or rank % PART:
        return (
            f"d_in {d_in} must be a multiple of {lanes}, the splits {splits} of {tile} and the "
            f"rank capacity {rank} of {PART}"
        )
    return None
