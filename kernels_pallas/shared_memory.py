"""How matrices lie in the shared memory of a Hopper GPU, for Mosaic GPU kernels."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(lanes: int, itemsize: int) -> tuple[Any, ...]:
    """Transforms of a matrix with rows of so many elements of so many bytes, as ``wgmma`` wants
    it: tiles of 8 rows, of at most 128 swizzled bytes each."""
    swizzle = min(lanes * itemsize, 128)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def two_views(shape: tuple[int, ...], dtype: Any) -> plgpu.RefUnion:
    """One buffer as the copy engine sees it and as ``wgmma`` does; its last dimension is 16, 32 or
    64 elements of a 16-bit type.

    Where rows start anywhere, the copy engine cannot address a tile of 8 of them. A single column
    of tiles is the same bytes as plain rows, swizzled by their address.
    """
    lanes = shape[-1]
    rows = (plgpu.TilingTransform((1, lanes)), plgpu.SwizzleTransform(2 * lanes))
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=rows),
        plgpu.SMEM(shape, dtype, transforms=tiled(lanes, 2)),
    )
