"""The norm before a decode step's linear on NVIDIA Hopper: the linear begins while it runs.

XLA's own takes as long, but the kernel after it could not fetch its first weights meanwhile.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from kernels_pallas.dependent_launch import wait_for_previous

_THREADS = 128


def serves(size: int) -> bool:
    """Whether rows of so many elements can be normalized: each thread has as many."""
    return size % _THREADS == 0


def rms_norm(
    x: Float[Array, "T d"], weight: Float[Array, " d"], *, eps: float
) -> Float[Array, "T d"]:
    """``x / sqrt(mean(x^2) + eps)`` of each row, in float32, then in x's dtype times ``weight``."""
    tokens, size = x.shape
    vector = next(n for n in (8, 4, 2, 1) if size % (n * _THREADS) == 0)
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=vector)

    def rms_norm_kernel(x: Any, weight: Any, y: Any) -> None:
        # A thread block for each row.
        token = lax.axis_index("token")
        wait_for_previous()
        row = plgpu.layout_cast(x[token, ...], layout).astype(jnp.float32)
        row = row * lax.rsqrt(jnp.sum(row * row) / size + eps)
        y[token, ...] = plgpu.layout_cast(weight[...], layout) * row.astype(y.dtype)

    kernel = plgpu.kernel(
        rms_norm_kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(tokens,),
        grid_names=("token",),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    return kernel(x, weight)
