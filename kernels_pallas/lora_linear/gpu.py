"""Decode's linear on NVIDIA Hopper, in one kernel (:mod:`.gpu_kernel`): what it serves, and how it
is called."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.lora_linear import gpu_counter, gpu_kernel
from kernels_pallas.lora_linear.gpu_config import BASE_SIZES, SIZES, Config, heuristic
from kernels_pallas.lora_linear.op import Implementation, check
from kernels_pallas.lora_matmul.op import LoraBatch


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
    counter: Any = None,
    config: Config | None = None,
) -> Float[Array, "T columns"]:
    """The op (formula and shapes: :mod:`.op`) in bfloat16 or float16, accumulated in float32.

    What the shrink yields is rounded to the dtype, as PEFT rounds it; nothing else is until the
    end. d_in and every split are multiples of 64, the rank capacity one of 16, and T is one of
    :data:`.gpu_config.SIZES`. ``counter`` is a Ref that :func:`.gpu_counter.new` made: calls that
    follow one another share it, and a call without makes its own. Raises ValueError for shapes and
    dtypes it cannot serve.
    """
    rank = check(x, weight, splits, a, b, batch, residual, gated=gated)
    tokens, d_in = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"x must be bfloat16 or float16, not {x.dtype}")
    if tokens not in SIZES:
        raise ValueError(f"{tokens} tokens: a step must be padded to one of {SIZES}")
    blocks = 0 if batch is None else batch.block_slots.shape[0]
    block_tokens = 0 if batch is None else batch.block_tokens
    if config is None:
        config = heuristic(
            tokens, d_in, splits, gated=gated, rank=rank, blocks=blocks, block_tokens=block_tokens
        )
    arguments: list[Any] = [x, weight]
    if residual is not None:
        arguments.append(residual)
    if batch is not None:
        arguments += [a, b, batch.first, batch.ranks, batch.num_blocks]
        arguments += [batch.block_slots, batch.block_starts, batch.block_counts]
        arguments.append(gpu_counter.new() if counter is None else counter)
    return gpu_kernel.build(
        config,
        dtype=x.dtype,
        tokens=tokens,
        d_in=d_in,
        splits=splits,
        rank=rank,
        blocks=blocks,
        block_tokens=block_tokens,
        has_residual=residual is not None,
        gated=gated,
    )(*arguments)[0]


IMPLEMENTATION = Implementation(
    name="mosaic_gpu",
    function=lora_linear,
    sizes=SIZES,
    base_sizes=BASE_SIZES,
    new_counter=gpu_counter.new,
)
