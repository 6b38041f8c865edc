"""How the TPU kernel cuts its operands, and where it is not the faster way."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8

VMEM_BUDGET = 24 * 2**20
"""Bytes of the kernel's buffers. A core has 64 MiB or more, which XLA uses too."""
BYTES_AHEAD = 4 * 2**20
"""Bytes of A and B to be on their way at any time: what 4 TB/s bring in a microsecond."""
DEPTHS = (2, 4, 8)
GROUP = 4
"""Rank chunks that are multiplied together, of one adapter or of several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the kernel cuts its operands."""

    rank_chunk: int
    """Rank rows that are copied together."""
    columns: int
    """Columns of y in a tile: all of them, or a multiple of 128 that divides every member's."""
    chunks: int
    """Chunks of an item; a power of two."""
    items: int
    """Items multiplied together; a power of two, and 1 where the columns are cut."""
    depth: int
    """Groups of items whose A and B are in VMEM or on their way; a power of two."""


def choose_config(
    num_tokens: int,
    block_tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    dtype: DTypeLike,
) -> Config:
    """The widest tiles of y with which all buffers fit the budget.

    Raises ValueError where no tile of y fits.
    """
    size = jnp.dtype(dtype).itemsize
    tile_rows = SUBLANES * 4 // size
    rank_chunk = math.gcd(rank, tile_rows)
    # Rows of A and B lie one below the other only if chunks fill the tiles of memory.
    most = GROUP if rank_chunk == tile_rows else 1
    chunks = min(most, 1 << ((rank // rank_chunk).bit_length() - 1))
    members, d_out = len(splits), sum(splits)
    tiles, parts = pl.cdiv(num_tokens, block_tokens), pl.cdiv(rank, rank_chunk * chunks)

    def config(columns: int, items: int) -> tuple[Config, int]:
        """With the depth for those columns; and the bytes of all buffers."""
        rank_rows = rank_chunk * chunks * items
        group = rank_rows * (members * d_in + columns) * size
        depth = next(d for d in DEPTHS if (d - 1) * group >= BYTES_AHEAD or d == DEPTHS[-1])
        # x and y have two buffers each way: one in use, one in flight.
        taken = depth * group + block_tokens * (2 * d_in * size + columns * (4 * size + 4))
        if columns < d_out:
            kept = block_tokens * pl.cdiv(members * rank_rows, LANES) * LANES * size
            taken += tiles * parts * kept
        made = Config(
            rank_chunk=rank_chunk, columns=columns, chunks=chunks, items=items, depth=depth
        )
        return made, taken

    common = math.gcd(*splits)
    widths = [w for w in range(common // LANES * LANES, 0, -LANES) if common % w == 0]
    for columns, items in [(d_out, most // chunks), *((w, 1) for w in widths)]:
        made, taken = config(columns, items)
        if taken <= VMEM_BUDGET:
            return made
    raise ValueError(
        f"a step of {num_tokens} tokens in blocks of {block_tokens}, {d_in} inputs, outputs "
        f"{splits} and rank {rank} does not fit {VMEM_BUDGET} bytes of VMEM, and no multiple "
        f"of {LANES} columns that does divides every output; use fewer tokens a step"
    )


def choose_block_tokens(num_tokens: int) -> int:
    """Tokens of a block: at most eight tiles a step until blocks reach 128 tokens.

    An item works on all rows of its tile, its own or not, so decode, with a token or two an
    adapter, wants small tiles; long runs want few, because each may fetch its adapter again.
    """
    return min(128, max(SUBLANES, num_tokens // 8 // SUBLANES * SUBLANES))


DENSE_TOKENS = range(64, 257)
DENSE_ROWS = 128


def dense_pays(num_tokens: int, num_slots: int, rank: int) -> bool:
    """Whether two matmuls over all slots take less time than the kernel, on paper.

    With slots * rank of 128 all slots of an 8B model are 0.67 GB a step, 0.18 to 0.82 ms on a 7x to
    a v5e. The kernel's tiles are 0.4 to 0.6 ms of instructions at 64 tokens (benchmarks/NOTES.md),
    however few adapters are active. A smaller step has fewer tiles; a larger one waits for
    arithmetic, of which dense does more.
    """
    return num_tokens in DENSE_TOKENS and num_slots * rank <= DENSE_ROWS
