"""How the Hopper kernel cuts the linear of a step of few tokens, as decode steps are.

What was measured on a card is in ``kernels_pallas/tuned``; :func:`heuristic` is for all else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

from kernels_pallas import tuning
from kernels_pallas.lora_matmul.gpu_config import LANES, block_tokens_of, round_up
from kernels_pallas.lora_matmul.op import max_blocks

PART = 16
"""What ``wgmma`` contracts at a time; adapters are contracted in parts of so many ranks."""
SIZES = (1, 8, 16, 32, 64, 128)
"""Tokens of the steps that are served. A cluster deals them out in equal parts of whole tiles;
beyond 128 the sums do not fit in registers; large steps have a kernel of their own
(:mod:`.gpu_prompt_config`), and between the two XLA's products are as good."""
BASE_SIZES = SIZES[1:]
"""Those at which linears without adapters should be, too: XLA is faster with a single row."""
MULTIPROCESSORS = 132
"""Of an H100 or H200."""
CLUSTERS = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS // 2, 4: 29, 8: 13}
"""Size of a cluster -> how many run at once. Thread blocks wait for each other, so no more may be
started. A cluster lies within one of the 8 GPCs, each of which has at most 18 multiprocessors: how
many it has differs from card to card, so this is for the worst of them."""
_SHARED_BYTES = 225 * 1024
"""Shared memory a thread block may have on compute capability 9.0, less its barriers."""
_MORE_THAN_HALF = 116 * 1024
"""Shared memory of which a multiprocessor has not twice as much."""
_STAGES = {"stages": (3, 4, 5, 6, 7, 8, 10, 12, 16)}
_TOGETHER = {"together": (1, 2, 4)}
_OF_ADAPTERS = {"shrinks": (1, 2, 4, 8), "shrink_stages": (1, 2, 3, 4, 6)}
"""What :func:`neighbours` chooses from."""


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
    """Depth of the pipeline of W and x, and of adapters after them."""
    together: int = 1
    """Steps of the pipeline whose copies are asked for at once: each has 128 bytes of a row of W,
    and memory answers neighbours faster."""
    shrinks: int = 4
    """Parts of d_in that a shrink is cut into."""
    shrink_stages: int = 4
    """Depth of the pipeline of a shrink."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What a configuration is chosen for."""

    tokens: int
    d_in: int
    splits: tuple[int, ...]
    gated: bool
    rank: int = 0
    """The bank's capacity; 0, as what follows, without adapters."""
    blocks: int = 0
    """The batch's bound on its blocks."""
    block_tokens: int = 0


def cases(
    d_in: int, splits: tuple[int, ...], *, gated: bool, rank: int, slots: int
) -> Iterator[Case]:
    """All that an engine meets of one linear, for a bank of so many slots, or 0 without one."""
    for tokens in SIZES:
        if tokens in BASE_SIZES:
            yield Case(tokens=tokens, d_in=d_in, splits=splits, gated=gated)
        if rank:
            block_tokens = block_tokens_of(tokens)
            yield Case(
                tokens=tokens,
                d_in=d_in,
                splits=splits,
                gated=gated,
                rank=rank,
                blocks=max_blocks(tokens, slots, block_tokens),
                block_tokens=block_tokens,
            )


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
        if _shared_bytes(config, tokens, splits, gated, rank, block_tokens) <= _SHARED_BYTES:
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
    # Where blocks are many, or W takes long, a shrink need not be cut; where members are, each cut
    # is dear.
    cuts = 1 if gated else 2 if blocks > 24 or len(splits) > 1 else 4
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
        for least, shrink_stages in itertools.product(
            (4, 3, 2) if parts * consumers > 2 else (5, 3, 2), (3, 2, 1)
        ):
            most = 7 if blocks else min(7, steps)
            for stages in range(most, min(least, most) - 1, -1):
                # In a cluster neighbours are asked for at about the same time anyhow; of three
                # stages, or with more tokens, too few are under way.
                by_twos = gated and cluster == 1 and tokens <= 64 and stages > 3
                yield Config(
                    consumers=consumers,
                    parts=parts,
                    cluster=cluster,
                    stages=stages,
                    together=2 if by_twos and steps % 2 == 0 else 1,
                    shrinks=shrinks,
                    shrink_stages=shrink_stages,
                )


def problem(
    d_in: int, splits: tuple[int, ...], *, gated: bool, rank: int, slots: int
) -> str | None:
    """Why a linear cannot be served in some step, None if it can in all of :data:`SIZES`.

    ``rank`` and ``slots`` are those of the bank, 0 without one.
    """
    for case in cases(d_in, splits, gated=gated, rank=rank, slots=slots):
        try:
            heuristic(**vars(case))
        except ValueError as error:
            return str(error)
    return None


def computed_tokens(tokens: int) -> int:
    """Tokens that are computed in a step of so many: ``wgmma`` multiplies 8 at least."""
    return max(8, tokens)


def tuned(device_kind: str) -> dict[Case, Config]:
    """What was measured on devices of this kind (:mod:`kernels_pallas.tuning`)."""
    return tuning.load(device_kind, "lora_linear", Case, Config, check_config)


def check_config(config: Config, case: Case) -> None:
    """Raises ValueError unless the kernel can run so, with all of its thread blocks at once."""
    if min(vars(config).values()) < 1:
        raise ValueError(f"all of {config} must be positive")
    tile = _tile(config, gated=case.gated)
    most = CLUSTERS.get(config.cluster, 0)
    used = _shared_bytes(config, case.tokens, case.splits, case.gated, case.rank, case.block_tokens)
    per_cluster, together = config.cluster * LANES, config.together
    is_one_step = case.d_in == per_cluster and not case.rank
    right = {
        f"tokens must be one of {SIZES}": case.tokens in SIZES,
        f"rank must be a multiple of {PART}": case.rank % PART == 0,
        "rank, blocks and block_tokens go together": (
            (case.rank > 0) == (case.blocks > 0) == (case.block_tokens > 0)
        ),
        # A stage is free when the next one's products are under way.
        "the pipeline needs 2 stages": config.stages > 1 or is_one_step,
        f"{together} steps together need a stage more than that": together < max(2, config.stages),
        f"d_in must be a multiple of {LANES} for each of a cluster and of {together} steps": (
            case.d_in % (per_cluster * together) == 0
        ),
        # More warpgroups, or sums, than there are registers for.
        "consumers and parts may be 1 or 2": config.consumers <= 2 and config.parts <= 2,
        "a gate needs two parts": config.parts == 2 or not case.gated,
        f"every split must be a multiple of {tile}": not any(n % tile for n in case.splits),
        f"clusters must be one of {tuple(CLUSTERS)} and run at once": (
            _columns(case) <= most * tile
        ),
        f"shrinks must cut d_in into multiples of {LANES}": (
            not case.rank or case.d_in % (config.shrinks * LANES) == 0
        ),
        f"{used} bytes of shared memory must be at most {_SHARED_BYTES}": used <= _SHARED_BYTES,
    }
    wrong = [rule for rule, holds in right.items() if not holds]
    if wrong:
        raise ValueError(f"{config} cannot serve {case}: {'; '.join(wrong)}")


def neighbours(config: Config, case: Case) -> list[Config]:
    """What differs from a configuration in one choice and can run: for a tuner to try."""
    found = tuning.near(config, _STAGES, reach=2) + tuning.near(config, _TOGETHER)
    found += tuning.near(config, _OF_ADAPTERS) if case.rank else []
    found += [
        dataclasses.replace(config, consumers=consumers, parts=parts, cluster=cluster)
        for consumers, parts, cluster in itertools.product((1, 2), (1, 2), CLUSTERS)
    ]
    fitting = [fitted for other in found if (fitted := _with_fewer_stages(other, case))]
    # Slower whenever it was tried: fewer multiprocessors ask for fewer bytes.
    most = max(map(functools.partial(_thread_blocks, case=case), (config, *fitting)))
    enough = [other for other in fitting if _thread_blocks(other, case) > 0.7 * most]
    return [other for other in dict.fromkeys(enough) if other != config]


def _with_fewer_stages(config: Config, case: Case) -> Config | None:
    """A configuration that fits: what grows elsewhere takes from the pipeline of W."""
    for stages in range(config.stages, min(config.stages, 3) - 1, -1):
        fewer = dataclasses.replace(config, stages=stages)
        try:
            check_config(fewer, case)
        except ValueError:
            continue
        return fewer
    return None


def _thread_blocks(config: Config, case: Case) -> int:
    return _columns(case) // _tile(config, gated=case.gated) * config.cluster


def _tile(config: Config, *, gated: bool) -> int:
    """Columns of the result that a cluster computes."""
    return config.consumers * LANES * (1 if gated else config.parts)


def _columns(case: Case) -> int:
    return sum(case.splits) // (2 if case.gated else 1)


def idle_bytes(
    config: Config,
    tokens: int,
    splits: tuple[int, ...],
    gated: bool,
    rank: int,
    block_tokens: int,
    *,
    has_residual: bool,
) -> int:
    """Shared memory that a thread block takes and does not use, so that no other has room beside
    it: one multiprocessor could get two of a kernel that begins early, and another none."""
    used = _shared_bytes(
        config, tokens, splits, gated, rank, block_tokens, has_residual=has_residual
    )
    return max(0, _MORE_THAN_HALF - used)


def _shared_bytes(
    config: Config,
    tokens: int,
    splits: tuple[int, ...],
    gated: bool,
    rank: int,
    block_tokens: int,
    *,
    has_residual: bool | None = None,
) -> int:
    """Of one thread block (the buffers of :mod:`.gpu_kernel`). A configuration must have room for a
    residual, unless there is a gate."""
    if has_residual is None:
        has_residual = not gated
    tokens = computed_tokens(tokens)
    tiles = config.parts * config.consumers
    share = max(8, tokens // config.cluster)
    pipeline = config.stages * (tiles * LANES + tokens) * LANES * 2
    out = tiles // (2 if gated else 1) * share * LANES * 2
    partial = tiles * LANES * tokens * 4 if config.cluster > 1 else 0
    total = max(pipeline, out + partial) + (out if has_residual else 0) + 2 * 1024
    if rank:
        members = len(splits)
        rows = round_up(members * rank, LANES)
        shrink = config.shrink_stages * 2 * (rows + block_tokens) * LANES * 2
        total += shrink + block_tokens * rows * 2 + tokens * PART * 2
    return total
