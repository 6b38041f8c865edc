"""How matrices lie in the shared memory of a Hopper GPU, for Mosaic GPU kernels."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(lanes: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of a matrix with rows of so many elements of so many bytes, as ``wgmma`` wants
    it: tiles of 8 rows, of at most 128 swizzled bytes each."""
    swizzle = min(lanes * itemsize, 128)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def rows(lanes: int, itemsize: int = 2) -> tuple[Any, ...]:
    """Transforms of rows that the copy engine is to put anywhere: it cannot address a tile of 8
    that does not start at a multiple of 8. A single column of tiles is the same bytes, swizzled by
    their address."""
    return plgpu.TilingTransform((1, lanes)), plgpu.SwizzleTransform(itemsize * lanes)


def views(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """One buffer as the copy engine sees it and as ``wgmma`` does, to be put in a union; its last
    dimension is 32, 64 or 128 bytes."""
    lanes, itemsize = shape[-1], jnp.dtype(dtype).itemsize
    return (
        plgpu.SMEM(shape, dtype, transforms=rows(lanes, itemsize)),
        plgpu.SMEM(shape, dtype, transforms=tiled(lanes, itemsize)),
    )


def two_views(shape: tuple[int, ...], dtype: Any) -> plgpu.RefUnion:
    """The union of just the :func:`views`."""
    return plgpu.RefUnion(*views(shape, dtype))
