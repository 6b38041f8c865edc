"""How the Hopper kernel cuts a decode step's linear, chosen from measurements."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from kernels_pallas.lora_matmul.gpu_config import LANES, block_tokens_of, round_up
from kernels_pallas.lora_matmul.op import max_blocks

PART = 16
"""What ``wgmma`` contracts at a time; adapters are contracted in parts of so many ranks."""
SIZES = (8, 16, 32, 64, 128)
"""Tokens of the steps that are served. A cluster deals them out in equal parts of whole tiles;
beyond 128 the sums do not fit in registers, and XLA's matmuls are as good."""
MULTIPROCESSORS = 132
"""Of an H100 or H200."""
CLUSTERS = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS // 2, 4: 29, 8: 13}
"""Size of a cluster -> how many run at once. Thread blocks wait for each other, so no more may be
started. A cluster lies within one of the 8 GPCs, each of which has at most 18 multiprocessors: how
many it has differs from card to card, so this is for the worst of them."""
_SHARED_BYTES = 225 * 1024
"""Shared memory a thread block may have on compute capability 9.0, less its barriers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work is cut."""

    consumers: int
    """Warpgroups that multiply with W."""
    parts: int
    """Tiles of 64 rows of W for each (with a gate two: one of the gate's, one of the other's)."""
    cluster: int
    """Thread blocks that share a contraction."""
    stages: int
    """Depth of the pipeline of W and x."""
    ring: int = 4
    """Depth of the pipeline of adapters."""
    shrinks: int = 4
    """Parts of d_in that a shrink is cut into."""
    shrink_stages: int = 4
    """Depth of the pipeline of a shrink."""


def heuristic(
    tokens: int,
    d_in: int,
    splits: tuple[int, ...],
    *,
    gated: bool,
    rank: int = 0,
    blocks: int = 0,
    block_tokens: int = 0,
) -> Config:
    """The configuration for a shape: the first of those worth trying that fits.

    ``rank`` is the bank's capacity, ``blocks`` the batch's bound on its blocks, both 0 without
    adapters. Raises ValueError if none fits.
    """
    if d_in % LANES or rank % PART:
        raise ValueError(
            f"d_in {d_in} must be a multiple of {LANES} and rank capacity {rank} of {PART}"
        )
    candidates = _candidates(tokens, d_in, splits, gated=gated, blocks=blocks)
    for config in candidates:
        if shared_bytes(config, tokens, splits, gated, rank, block_tokens) <= _SHARED_BYTES:
            return config
    raise ValueError(
        f"no configuration for {tokens} tokens, d_in {d_in}, splits {splits}, gated={gated}, rank "
        f"{rank}: every split must be a multiple of {LANES} and a tile of it fit in shared memory"
    )


def _candidates(
    tokens: int, d_in: int, splits: tuple[int, ...], *, gated: bool, blocks: int
) -> Iterator[Config]:
    """What is worth trying, the best first."""
    columns = sum(splits) // (2 if gated else 1)
    tilings = ((1, 2), (2, 2)) if gated else ((1, 1), (2, 1), (2, 2))
    if not gated and tokens > 64 and columns > 64 * LANES:
        # Each tile reads all of x: fewer, larger ones read it less often.
        tilings = ((2, 1), (2, 2))
    # Where blocks are many, or W takes long, a shrink need not be cut.
    cuts = 1 if gated else 4 if blocks <= 24 else 2
    while d_in % (cuts * LANES):
        cuts //= 2
    # What is cut less needs less room, too.
    less = [cuts >> i for i in range(cuts.bit_length())]
    for shrinks, (consumers, parts) in itertools.product(less, tilings):
        tile = consumers * LANES * (1 if gated else parts)
        if any(width % tile for width in splits) or columns // tile > MULTIPROCESSORS:
            continue
        cluster = 1
        while columns // tile <= CLUSTERS.get(2 * cluster, 0) and d_in % (2 * cluster * LANES) == 0:
            cluster *= 2
        steps = d_in // (cluster * LANES)
        depths = ((4, 3), (4, 2), (2, 3), (2, 2), (2, 1), (1, 1))
        for least, (ring, shrink_stages) in itertools.product(
            (4, 3, 2) if parts * consumers > 2 else (5, 3, 2), depths
        ):
            for stages in range(min(7, steps), min(least, steps) - 1, -1):
                yield Config(
                    consumers=consumers,
                    parts=parts,
                    cluster=cluster,
                    stages=stages,
                    ring=ring,
                    shrinks=shrinks,
                    shrink_stages=shrink_stages,
                )


def problem(
    d_in: int, splits: tuple[int, ...], *, gated: bool, rank: int, slots: int
) -> str | None:
    """Why a linear cannot be served in some step, None if it can in all of :data:`SIZES`.

    ``rank`` and ``slots`` are those of the bank, 0 without one.
    """
    for tokens in SIZES:
        try:
            heuristic(tokens, d_in, splits, gated=gated)
            if rank:
                block_tokens = block_tokens_of(tokens)
                heuristic(
                    tokens,
                    d_in,
                    splits,
                    gated=gated,
                    rank=rank,
                    blocks=max_blocks(tokens, slots, block_tokens),
                    block_tokens=block_tokens,
                )
        except ValueError as error:
            return str(error)
    return None


def shared_bytes(
    config: Config,
    tokens: int,
    splits: tuple[int, ...],
    gated: bool,
    rank: int,
    block_tokens: int,
) -> int:
    """Shared memory of one thread block (the buffers of :mod:`.gpu`'s kernel)."""
    tiles = config.parts * config.consumers
    share = max(8, tokens // config.cluster)
    pipeline = config.stages * (tiles * LANES + tokens) * LANES * 2
    out = tiles // (2 if gated else 1) * share * LANES * 2
    partial = tiles * LANES * tokens * 4 if config.cluster > 1 else 0
    total = max(pipeline, out + partial) + (0 if gated else out) + 2 * 1024
    if rank:
        members = len(splits)
        parts_k = -(-rank // PART)
        rows = round_up(members * rank, LANES)
        hidden = (2 if gated else 1) * config.shrinks * parts_k * tokens * PART * 2
        b = tiles * parts_k * PART * LANES * 2
        shrink = config.shrink_stages * 2 * (rows + block_tokens) * LANES * 2
        total += config.ring * (hidden + b) + shrink + block_tokens * rows * 2
    return total
