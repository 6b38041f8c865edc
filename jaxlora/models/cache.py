"""KV pages as arrays: one pool per layer, all of the same shape, addressed by one page table.

``config`` is the model of one device throughout, whose pools hold its own heads.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from jaxlora.config import ModelConfig
from jaxlora.parallel import Devices
from kernels_pallas.paged_attention.op import Implementation


def page_bytes(
    config: ModelConfig, attention: Implementation, page_size: int, dtype: jnp.dtype
) -> int:
    """Bytes of one page over all layers, padding included."""
    shape = attention.pool_shape(1, page_size, config.num_kv_heads, config.head_dim)
    return config.num_layers * math.prod(shape) * jnp.dtype(dtype).itemsize


def make_cache(
    config: ModelConfig,
    attention: Implementation,
    devices: Devices,
    *,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
) -> list[Any]:
    """Empty pools, one array a layer: a stacked array would be copied where a layer is sliced."""
    shape = attention.pool_shape(num_pages, page_size, config.num_kv_heads, config.head_dim)
    axes = (None, None, "kv_heads", None)
    return [devices.zeros(shape, dtype, axes) for _ in range(config.num_layers)]
