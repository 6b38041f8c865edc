"""The op on NVIDIA Hopper: what the Mosaic GPU kernel of :mod:`.gpu_kernel` can serve, and how it
is called. A group's gate comes with it if wanted: prompts' outputs are large, and are then read and
written less often.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lora_matmul.gpu_config import (
    LANES,
    Config,
    block_tokens_of,
    heuristic,
    round_up,
)
from kernels_pallas.lora_matmul.gpu_kernel import build
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, check, cover

_MAX_TOKENS = 64
"""Most tokens in a block: the shrink's accumulator is [members * rank, tokens] in registers."""
_MAX_RANKS = 256
"""Most rows of A (members * padded rank), for the same reason."""


def lora_matmul(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "LS Mr d_in"],
    b: Float[Array, "LS r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
    config: Config | None = None,
) -> Float[Array, "T d_out"]:
    """``y`` plus every token's LoRA product (formula and shapes: :mod:`.op`).

    bfloat16 or float16, float32 accumulation; the rank-sized intermediate and the product are
    rounded to the dtype before they are used, as PEFT does. Raises ValueError for shapes and
    dtypes it cannot serve.
    """
    kernel = _checked_kernel(
        y, x, a, b, batch, splits, config, blocks=batch.block_slots.shape[0], gated=False
    )
    y_ref = jax.new_ref(y)
    blocks = batch.block_slots, batch.block_starts, batch.block_counts
    kernel(y_ref, x, a, b, batch.first, batch.ranks, *blocks)
    return jax.freeze(y_ref)


def gated_lora_matmul(
    y: Float[Array, "T d_out"],
    x: Float[Array, "T d_in"],
    a: Float[Array, "LS Mr d_in"],
    b: Float[Array, "LS r d_out"],
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
    config: Config | None = None,
) -> Float[Array, "T d_half"]:
    """``silu(z[:, :half]) * z[:, half:]`` of what :func:`lora_matmul` makes of y, here called z,
    which is never in device memory: y is read once and half as much written.

    The splits are two of equal width. z is rounded to the dtype as there, all that follows is
    float32 up to the result. Raises ValueError as there.
    """
    if len(splits) != 2 or splits[0] != splits[1]:
        raise ValueError(f"a gate needs two members of equal width, not {splits}")
    slots, starts, counts = cover(batch.token_slots, batch.ranks.shape[0], batch.block_tokens)
    kernel = _checked_kernel(y, x, a, b, batch, splits, config, blocks=slots.shape[0], gated=True)
    return kernel(y, x, a, b, batch.first, batch.ranks, slots, starts, counts)


def _checked_kernel(
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    batch: LoraBatch,
    splits: tuple[int, ...],
    config: Config | None,
    *,
    blocks: int,
    gated: bool,
) -> Any:
    """The kernel for these arrays and so many blocks. ValueError where it cannot serve them."""
    rank = check(y, x, a, b, batch, splits)
    d_in = x.shape[1]
    tokens = batch.block_tokens
    if x.dtype not in (jnp.bfloat16, jnp.float16) or {y.dtype, a.dtype, b.dtype} != {x.dtype}:
        raise ValueError(
            f"y, x, a and b must all be bfloat16 or all float16, got {y.dtype}, {x.dtype}, "
            f"{a.dtype} and {b.dtype}; the reference implementation serves other dtypes"
        )
    if d_in % LANES or any(width % LANES for width in splits):
        raise ValueError(f"d_in {d_in} and every split of {splits} must be multiples of {LANES}")
    if rank % 8:
        raise ValueError(f"rank capacity {rank} must be a multiple of 8 (true ranks may be any)")
    if tokens % 8 or tokens > _MAX_TOKENS:
        raise ValueError(f"block_tokens {tokens} must be a multiple of 8, at most {_MAX_TOKENS}")
    if len(splits) * round_up(rank, 16) > _MAX_RANKS:
        raise ValueError(
            f"{len(splits)} members of rank capacity {rank} need more than {_MAX_RANKS} rows"
        )
    if config is None:
        config = heuristic(d_in, splits, rank, tokens, blocks, gated=gated)
    if config.cluster * LANES > d_in or any(width % config.tile_n for width in splits):
        raise ValueError(
            f"{config} needs d_in of at least {config.cluster * LANES}, not {d_in}, and splits "
            f"that are multiples of {config.tile_n}, not {splits}"
        )
    return build(
        config,
        dtype=x.dtype,
        num_tokens=x.shape[0],
        num_slots=batch.ranks.shape[0],
        d_in=d_in,
        splits=splits,
        rank=rank,
        tokens=tokens,
        blocks=blocks,
        gated=gated,
    )


IMPLEMENTATION = Implementation(
    name="mosaic_gpu",
    function=lora_matmul,
    block_tokens=block_tokens_of,
    aligned=False,
    gated=gated_lora_matmul,
)
