"""How matrices lie in the shared memory of a Hopper GPU, for Mosaic GPU kernels."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(lanes: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of a matrix with rows of so many elements of so many bytes, as ``wgmma`` wants
    it: tiles of 8 rows, of at most 128 swizzled bytes each."""
    swizzle = min(lanes * itemsize, 128)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def rows(lanes: int) -> tuple[Any, ...]:
    """Transforms of rows that the copy engine is to put anywhere: it cannot address a tile of 8
    that does not start at a multiple of 8. A single column of tiles is the same bytes, swizzled by
    their address."""
    return plgpu.TilingTransform((1, lanes)), plgpu.SwizzleTransform(2 * lanes)


def two_views(shape: tuple[int, ...], dtype: Any) -> plgpu.RefUnion:
    """One buffer as the copy engine sees it and as ``wgmma`` does; its last dimension is 16, 32 or
    64 elements of a 16-bit type."""
    lanes = shape[-1]
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=rows(lanes)),
        plgpu.SMEM(shape, dtype, transforms=tiled(lanes, 2)),
    )
