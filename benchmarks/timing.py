"""What the kernels' benchmarks have in common: random arrays, wall time, what is a wrong result."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=(0, 1))
def normal(shape: tuple[int, ...], scale: float, key: jax.Array) -> jax.Array:
    """Normally distributed bfloat16 on the device."""
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)


@functools.cache
def arrays(number: int, shape: tuple[int, ...], scale: float) -> list[jax.Array]:
    """So many of them, made once."""
    keys = jax.random.split(jax.random.key(math.prod(shape)), number)
    return [normal(shape, scale, key) for key in keys]


def worst(result: jax.Array, expected: jax.Array) -> jax.Array:
    """The largest error of a bfloat16 result, 1 being what rounding may add up to.

    ``expected`` is float32.
    """
    allowed = 2.0**-6 * jnp.abs(expected) + 0.004 * jnp.max(jnp.abs(expected))
    error = jnp.abs(result.astype(jnp.float32) - expected) / allowed
    # A maximum may pass over NaN.
    return jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))


QUICKLY = {"xla_gpu_autotune_level": "0"}
"""Options of what is compiled for each case and runs for moments."""


def repeated(step: Callable[[], Any], *, repeats: int, seconds: float) -> list[float]:
    """Seconds a call of ``step``, which dispatches a program and returns what it will yield.

    Measured ``repeats`` times, each over about ``seconds`` of back-to-back calls.
    """

    def run(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            out = step()
        jax.block_until_ready(out)
        return time.perf_counter() - start

    run(2)
    times = max(1, round(seconds / run(1)))
    return [run(times) / times for _ in range(repeats)]


def microseconds(
    step: Callable[[], Any], *, calls: int, repeats: int, seconds: float
) -> list[float]:
    """Of one of the ``calls`` that the program of ``step`` chains, measured as by
    :func:`repeated`."""
    taken = repeated(step, repeats=repeats, seconds=seconds)
    return [round(each / calls * 1e6, 3) for each in taken]
