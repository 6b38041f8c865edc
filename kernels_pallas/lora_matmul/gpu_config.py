"""How the Hopper kernel cuts its work, and what is chosen for a shape without a tuned entry."""

from __future__ import annotations

import dataclasses
import functools
import itertools

from kernels_pallas import tuning

LANES = 64
"""Elements in a swizzled row of shared memory (128 bytes of a 16-bit type)."""
_SHARED_BYTES = 227 * 1024
"""Shared memory a thread block may have on compute capability 9.0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How the work of one block of tokens is cut."""

    cluster: int
    """Thread blocks that share a block's shrink, at most 8 (the portable cluster size)."""
    groups: int
    """Clusters per block of tokens: each repeats the shrink and fills its part of d_out."""
    warpgroups: int
    """Warpgroups of a thread block: the first one does the shrink, all of them the expand."""
    tile_k: int
    """Columns of x and A in one stage of the shrink, a multiple of 64."""
    stages_k: int
    tile_n: int
    """Columns of B and y in one stage of the expand, a multiple of 64 that divides every split."""
    stages_n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a configuration is chosen for."""

    d_in: int
    splits: tuple[int, ...]
    rank: int
    """The bank's capacity."""
    block_tokens: int
    blocks: int
    """The bound on a batch's blocks, those of tokens without an adapter included if there is a
    gate."""


_TRIED = {
    "cluster": (1, 2, 4, 8),
    "groups": (1, 2, 3, 4),
    "warpgroups": (1, 2, 3, 4),
    "tile_k": (64, 128, 256),
    "stages_k": (2, 3, 4),
    "tile_n": (64, 128, 256),
    "stages_n": (2, 3, 4),
}
"""What :func:`neighbours` chooses from."""
KERNELS = ("lora_matmul", "gated_lora_matmul")
"""What files of measured configurations call the kernel, without a gate and with it."""


def heuristic(
    d_in: int,
    splits: tuple[int, ...],
    rank: int,
    block_tokens: int,
    blocks: int,
    *,
    gated: bool = False,
) -> Config:
    """The configuration for a shape that no tuned table names: of those worth trying, the first
    that fits in shared memory. Raises ValueError if none does.

    ``blocks`` is the batch's bound on its blocks, as :func:`.op.max_blocks` gives it, or that of
    :func:`.op.cover` for the kernel with a gate. The choices come from one H200
    (benchmarks/NOTES.md): a decode step is short of thread blocks, so it takes the largest cluster;
    where blocks are many, a smaller one leaves less of the exchange.
    """
    groups = 1
    if block_tokens > 16:  # prefill: many blocks
        cluster, warpgroups, tile_k, tile_n = 2, 3, 128, 128
    elif blocks > 64:  # perhaps many adapters: blocks alone fill the machine
        cluster, warpgroups, tile_k, tile_n = 4, 2, 64, 128
    else:
        groups = 4 if blocks <= 5 else 3 if sum(splits) > 16384 else 1
        cluster, warpgroups, tile_k, tile_n = 8, 1, 256 if groups == 1 else 128, 256
    cluster = min(cluster, 1 << ((d_in // LANES).bit_length() - 1))
    tile_k = min(tile_k, max(LANES, d_in // cluster // LANES * LANES))
    depths = [(warpgroups, 3), (1, 3), (warpgroups, 2), (1, 2)]
    if gated:
        # Tiles of y lie in shared memory, too: they are small, and there is less of other things
        # before there are fewer warpgroups, which have more to compute.
        tile_n, warpgroups = LANES, max(2, warpgroups)
        if block_tokens > 16 and blocks <= 52:  # clusters of one a block would leave half idle
            groups = 2
        depths = [(warps, depth) for warps in range(warpgroups, 0, -1) for depth in (3, 2)]
        depths.append((1, 1))
    while any(width % tile_n for width in splits):
        tile_n //= 2
    for (warps, stages), n, k in itertools.product(depths, (tile_n, LANES), (tile_k, 128, LANES)):
        config = Config(
            cluster=cluster,
            groups=groups,
            warpgroups=warps,
            tile_k=min(tile_k, k),
            stages_k=2 if k == 256 else stages,
            tile_n=n,
            stages_n=stages,
        )
        used = _shared_bytes(config, len(splits), rank, block_tokens, gated=gated)
        if used <= _SHARED_BYTES:
            return config
    raise ValueError(
        f"{len(splits)} members of rank {rank} and blocks of {block_tokens} tokens do not fit in "
        f"{_SHARED_BYTES} bytes of shared memory"
    )


def tuned(device_kind: str, *, gated: bool = False) -> dict[Case, Config]:
    """What was measured on devices of this kind (:mod:`kernels_pallas.tuning`)."""
    check = functools.partial(check_config, gated=gated)
    return tuning.load(device_kind, KERNELS[gated], Case, Config, check)


def check_config(config: Config, case: Case, *, gated: bool = False) -> None:
    """Raises ValueError unless the kernel can run so."""
    if min(vars(config).values()) < 1:
        raise ValueError(f"all of {config} must be positive")
    used = _shared_bytes(config, len(case.splits), case.rank, case.block_tokens, gated=gated)
    right = {
        "clusters must be of 1, 2, 4 or 8": config.cluster in (1, 2, 4, 8),
        "warpgroups may be 1 to 4": config.warpgroups <= 4,
        f"tile_k and tile_n must be multiples of {LANES}, at most 256": (
            {config.tile_k, config.tile_n} <= {LANES, 2 * LANES, 3 * LANES, 4 * LANES}
        ),
        f"every split must be a multiple of {config.tile_n}": (
            not any(width % config.tile_n for width in case.splits)
        ),
        "a cluster must not be more than d_in is divided into": (
            config.cluster * config.tile_k <= case.d_in
        ),
        f"{used} bytes of shared memory must be at most {_SHARED_BYTES}": used <= _SHARED_BYTES,
    }
    wrong = [rule for rule, holds in right.items() if not holds]
    if wrong:
        raise ValueError(f"{config} cannot serve {case}: {'; '.join(wrong)}")


def neighbours(config: Config, case: Case, *, gated: bool = False) -> list[Config]:
    """What differs from a configuration in one choice and can run: for a tuner to try."""
    found = []
    for other in tuning.near(config, _TRIED):
        try:
            check_config(other, case, gated=gated)
        except ValueError:
            continue
        found.append(other)
    return found


def block_tokens_of(num_tokens: int) -> int:
    """Most tokens in a block, for a step of so many."""
    for most, tokens in ((64, 8), (256, 16), (2048, 32)):
        if num_tokens <= most:
            return tokens
    return 64


def _shared_bytes(
    config: Config, members: int, rank: int, tokens: int, *, gated: bool = False
) -> int:
    """Shared memory of one thread block (the buffers of :mod:`.gpu_kernel`, rounded up)."""
    pitch = round_up(rank, 16)
    rows = round_up(members * pitch, 64)
    a_and_x = config.stages_k * (rows + tokens) * config.tile_k * 2
    b = config.stages_n * pitch * config.tile_n * 2
    partial = rows * tokens * 4
    hidden = rows * tokens * 2
    out = out_tiles(tokens, gated=gated) * config.tile_n * tokens * 2
    if gated:
        b = 2 * (b + config.stages_n * tokens * config.tile_n * 2)  # with y, of both members
    return a_and_x + config.warpgroups * (b + out) + partial + hidden + 8 * 1024


def out_tiles(tokens: int, *, gated: bool = False) -> int:
    """Tiles of the result that a warpgroup may have on their way to device memory."""
    return 2 if tokens <= (32 if gated else 16) else 1


def round_up(value: int, multiple: int) -> int:
    """The next multiple at or above the value."""
    return -(-value // multiple) * multiple
