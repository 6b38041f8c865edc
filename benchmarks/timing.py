"""What the kernels' benchmarks have in common: random arrays, and wall time without gaps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnums=(0, 1))
def normal(shape: tuple[int, ...], scale: float, key: jax.Array) -> jax.Array:
    """Normally distributed bfloat16 on the device."""
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)


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
