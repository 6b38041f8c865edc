"""KV pages as arrays: one pool per layer, all of the same shape, addressed by one page table."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlora.config import ModelConfig


def page_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, int, int, int]:
    """Shape of one layer's pool: ``[pages, page_size, 2 * kv_heads, head_dim]``."""
    return (num_pages, page_size, 2 * config.num_kv_heads, config.head_dim)


def page_bytes(config: ModelConfig, page_size: int, dtype: jnp.dtype) -> int:
    """Bytes of one page over all layers."""
    _, *page = page_shape(config, 1, page_size)
    size = config.num_layers * jnp.dtype(dtype).itemsize
    for extent in page:
        size *= extent
    return size


def make_cache(
    config: ModelConfig, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> list[jax.Array]:
    """Empty pools, one array a layer: a stacked array would be copied where a layer is sliced."""
    shape = page_shape(config, num_pages, page_size)
    return [jnp.zeros(shape, dtype) for _ in range(config.num_layers)]
