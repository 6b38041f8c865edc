"""A linear with its adapters on NVIDIA Hopper, in one kernel: what is served, and how it is called.

Steps of few tokens, which wait for weights, and steps of many, which multiply, are cut differently
(:mod:`.gpu_kernel`, :mod:`.gpu_prompt_kernel`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import gpu_counter
from kernels_pallas.dependent_launch import OPTIONS
from kernels_pallas.lora_linear import (
    gpu_kernel,
    gpu_norm,
    gpu_pieces,
    gpu_prompt_kernel,
    gpu_prompt_shrink,
)
from kernels_pallas.lora_linear import gpu_prompt_config as prompt_config
from kernels_pallas.lora_linear.gpu_config import (
    BASE_SIZES,
    SIZES,
    Case,
    Config,
    check_config,
    heuristic,
)
from kernels_pallas.lora_linear.op import EarlyKernels, Implementation, check
from kernels_pallas.lora_matmul.op import LoraBatch


class Shared(NamedTuple):
    """What the calls of a program share."""

    counter: Any
    """A Ref that every call leaves as it finds it."""
    pieces: gpu_pieces.Pieces | None
    """Of a step of many tokens."""


def share(batch: LoraBatch) -> Shared:
    """For the program that is being traced."""
    (tokens,), (slots,) = batch.token_slots.shape, batch.ranks.shape
    pieces = None
    if tokens > SIZES[-1]:
        token_slots = jnp.asarray(batch.token_slots)
        pieces = gpu_pieces.cut(token_slots, slots)
    return Shared(gpu_counter.new(), pieces)


def lora_linear(
    x: Float[Array, "T d_in"],
    weight: Float[Array, "d_out d_in"],
    *,
    splits: tuple[int, ...],
    a: Float[Array, "LS Mr d_in"] | None = None,
    b: Float[Array, "LS r d_out"] | None = None,
    batch: LoraBatch | None = None,
    residual: Float[Array, "T d_out"] | None = None,
    gated: bool = False,
    shared: Shared | None = None,
    early: bool = False,
    config: Config | None = None,
) -> Float[Array, "T columns"]:
    """The op (formula and shapes: :mod:`.op`) in bfloat16 or float16, accumulated in float32.

    What the shrink yields is rounded to the dtype, as PEFT rounds it; nothing else is until the
    end. T is one of :data:`.gpu_config.SIZES` or a larger multiple of 8. d_in and every split are
    multiples of 64 and the rank capacity one of 16; for larger steps
    :func:`.gpu_prompt_config.problem` says of what. ``shared`` is what :func:`share` made: calls
    that follow one another share it, and a call without makes its own. ``config`` is for T of
    SIZES. Raises ValueError for shapes and dtypes it cannot serve, and for a config that cannot
    serve them.
    """
    rank = check(x, weight, splits, a, b, batch, residual, gated=gated)
    tokens, d_in = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"x must be bfloat16 or float16, not {x.dtype}")
    if tokens not in SIZES and (tokens < SIZES[-1] or tokens % 8):
        raise ValueError(
            f"{tokens} tokens: a step must be padded to one of {SIZES} or a larger multiple of 8"
        )
    if batch is not None and shared is None:
        shared = share(batch)
    arguments: list[Any] = [x, weight] if residual is None else [x, weight, residual]
    options: dict[str, Any] = {
        "dtype": x.dtype,
        "tokens": tokens,
        "d_in": d_in,
        "splits": splits,
        "rank": rank,
        "has_residual": residual is not None,
        "gated": gated,
    }
    if tokens > SIZES[-1]:
        problem = prompt_config.problem(d_in, splits, rank, gated=gated)
        if problem is not None:
            raise ValueError(problem)
        if batch is not None:
            assert shared is not None
            assert shared.pieces is not None
            pieces = shared.pieces
            shrink = gpu_prompt_shrink.build(
                dtype=x.dtype,
                tokens=tokens,
                d_in=d_in,
                members=len(splits),
                rank=rank,
                shrinks=prompt_config.shrinks_of(tokens, d_in, splits, rank),
                groups=pieces.slots.shape[0],
            )
            hidden = shrink(x, a, batch.first, batch.ranks, *pieces)
            arguments += [b, batch.first, batch.ranks, pieces.slots, pieces.edges, hidden]
        return gpu_prompt_kernel.build(**options)(*arguments)
    blocks = 0 if batch is None else batch.block_slots.shape[0]
    block_tokens = 0 if batch is None else batch.block_tokens
    case = Case(
        tokens=tokens,
        d_in=d_in,
        splits=splits,
        gated=gated,
        rank=rank,
        blocks=blocks,
        block_tokens=block_tokens,
    )
    if config is None:
        config = heuristic(**vars(case))
    else:
        # What does not fit its case may wait for ever.
        check_config(config, case)
    if batch is not None:
        assert shared is not None
        arguments += [a, b, batch.first, batch.ranks, batch.num_blocks]
        arguments += [batch.block_slots, batch.block_starts, batch.block_counts, shared.counter]
    kernel = gpu_kernel.build(
        config, blocks=blocks, block_tokens=block_tokens, early=early, **options
    )
    return kernel(*arguments)[0]


IMPLEMENTATION = Implementation(
    name="mosaic_gpu",
    function=lora_linear,
    sizes=SIZES,
    base_sizes=BASE_SIZES,
    share=share,
    prompt_tokens=None,
    lora_prompt_tokens=None,
    early=EarlyKernels(gpu_norm.rms_norm, OPTIONS),
)
