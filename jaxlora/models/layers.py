"""The Llama family's small parts: linear, normalization, rotary positions."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxlora.config import ModelConfig, RopeScaling
from jaxlora.parallel import own_ids

_FEW_ROWS = 64
"""Up to this many rows ``weight_first`` is faster; measured, see benchmarks/NOTES.md."""


def matmul(
    x: Float[Array, "T d_in"],
    weight: Float[Array, "d_out d_in"],
    preferred_element_type: jnp.dtype | None = None,
    *,
    weight_first: bool = False,
) -> Float[Array, "T d_out"]:
    """``x @ weight.T``; exact float32 on every platform (TPUs and GPUs would round it).

    With ``weight_first`` a step of few rows computes the transpose of ``weight @ x.T``: on a CPU
    XLA multiplies faster when the matrix on the left is the one with many rows.
    """
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=preferred_element_type or x.dtype,
    )
    if weight_first and 1 < len(x) <= _FEW_ROWS:
        # Without the barrier XLA turns it round again.
        return lax.optimization_barrier(product(weight, x)).T
    return product(x, weight)


class Linear(nnx.Module):
    """``y = x W^T + bias`` with ``W[d_out, d_in]``, the layout checkpoints have; ``weight_first``
    is :func:`matmul`'s."""

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool, dtype: jnp.dtype, weight_first: bool = False
    ) -> None:
        self.weight = nnx.Param(jnp.zeros((d_out, d_in), dtype))
        self.bias = nnx.Param(jnp.zeros((d_out,), dtype)) if bias else None
        self.weight_first = weight_first

    def __call__(self, x: Float[Array, "T d_in"]) -> Float[Array, "T d_out"]:
        """Applies the map to ``T`` rows."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias[...]

    def product(self, x: Float[Array, "T d_in"]) -> Float[Array, "T d_out"]:
        """What there is before the bias."""
        return matmul(x, self.weight[...], weight_first=self.weight_first)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, computed in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalizes each row."""
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * wide.astype(x.dtype)


def rope_tables(
    positions: Int32[Array, " T"], config: ModelConfig
) -> tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]]:
    """Cosine and sine of every token's angles, to broadcast over heads, times YaRN's factor of
    attention where there is one; float32."""
    angle = positions[:, None].astype(jnp.float32) * _rope_frequencies(config)[None, :]
    scaling: RopeScaling | None = config.rope_scaling
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle)[:, None, :] * factor, jnp.sin(angle)[:, None, :] * factor


def _rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Angle per position of each pair of a head's dimensions, scaling applied; float32.

    RoPE (arXiv:2104.09864); "llama3" scaling as published with Llama 3.1: wavelengths longer than
    ``original_max_len / low_freq_factor`` are stretched by ``factor``, those shorter than
    ``original_max_len / high_freq_factor`` kept, the ones between interpolated. "yarn"
    (arXiv:2309.00071, section 3.2) interpolates between two dimensions: those that turn
    ``beta_fast`` and ``beta_slow`` times.
    """
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponent)
    scaling: RopeScaling | None = config.rope_scaling
    if scaling is None:
        return frequency
    stretched = frequency / scaling.factor
    if scaling.kind == "linear":
        return stretched
    if scaling.kind == "yarn":
        first, last = _yarn_dimensions(config, scaling)
        keep = 1 - (jnp.arange(len(frequency)) - first) / (last - first)
    else:
        wavelength = 2 * math.pi / frequency
        turns = scaling.original_max_len / wavelength
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = (turns - low) / (high - low)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * frequency + (1 - keep) * stretched


def _yarn_dimensions(config: ModelConfig, scaling: RopeScaling) -> tuple[float, float]:
    """The last pair of dimensions that is kept, and the first that is stretched."""

    def turning(turns: float) -> float:
        wavelength = scaling.original_max_len / (turns * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    # As transformers keeps a ramp from having no length.
    return first, last + 0.001 * (first == last)


def rotate(
    x: Float[Array, "T heads D"],
    tables: tuple[Float[Array, "T 1 half"], Float[Array, "T 1 half"]],
) -> Float[Array, "T heads D"]:
    """Turns dimension i and i + D/2 of each head by the token's angle (half-split layout)."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def look_up(
    table: Float[Array, "*S V d"],
    token_ids: Int32[Array, " T"],
    num_devices: int,
    *,
    slots: Int32[Array, " T"] | None = None,
) -> Float[Array, "T d"]:
    """Rows of a table, or with ``slots`` each of its token's own; ids are in range by the engine's
    validation.

    Of several devices each has a part of the table, and gives zeros for the rows of others: their
    sum is the row.
    """
    own = own_ids(token_ids, table.shape[-2], num_devices)
    at = (own,) if slots is None else (slots, own)
    mode = "clip" if num_devices == 1 else "fill"
    return table.at[at].get(mode=mode, fill_value=0, wrap_negative_indices=False)
