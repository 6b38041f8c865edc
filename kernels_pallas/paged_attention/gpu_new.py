"""A decode step's new token in the kernel of attention on NVIDIA Hopper: its queries and key are
turned by its position, key and value put in their place in the pool.

A kernel of its own would do that (:mod:`.gpu_rotate`) while the memory waits. For heads of 128,
whose halves are a row of swizzled shared memory each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEAD_DIM = 128
_HALF = HEAD_DIM // 2
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)
_WHOLE: Any = () if jax.__version_info__ >= (0, 11) else (None,)
"""The index of a load, which JAX 0.11 no longer takes."""


@dataclasses.dataclass(frozen=True)
class NewToken:
    """One of a step's, and one key head of it."""

    qkv: Any
    """``[T * (H + 2 * KV), D]``"""
    angles: Sequence[Any]
    """Cosines and sines ``[T, D / 2]``."""
    token: Any
    head: Any
    num_heads: int
    num_kv_heads: int
    smem: Any
    """``[2 * D]``: the key and its value."""

    def turn_key(self) -> None:
        """Leaves the key, turned, and the value in shared memory."""
        heads = self.num_heads + 2 * self.num_kv_heads
        key = self.token * heads + self.num_heads + self.head
        dtype = self.qkv.dtype
        first, second = (self._columns(self.qkv, key, half) for half in range(2))
        turned = _turned(first, second, *self._angles())
        values = (self._columns(self.qkv, key + self.num_kv_heads, half) for half in range(2))
        for half, columns in enumerate((*turned, *values)):
            self.smem[pl.ds(half * _HALF, _HALF)] = columns.astype(dtype)
        plgpu.commit_smem()

    def write(self, place: Any) -> None:
        """Copies key and value to their ``place`` ``[2 * D]``; the copy is not waited for."""
        plgpu.copy_smem_to_gmem(self.smem, place)

    def turn_queries(self, q_smem: Any) -> None:
        """In their place ``[2, 64, 64]``, as halves of dimensions."""
        first, second = (q_smem[half].astype(jnp.float32) for half in range(2))
        angles = (lax.broadcast_in_dim(x, first.shape, [1]) for x in self._angles())
        for half, turned in enumerate(_turned(first, second, *angles)):
            q_smem[half] = turned.astype(self.qkv.dtype)
        plgpu.commit_smem()

    def put(self, tile: Any, at: Any) -> None:
        """Key and value into a tile ``[keys, 2 * D]``, as the last of its context; what comes after
        them becomes zero."""
        for half in range(4):
            columns = pl.ds(half * _HALF, _HALF)
            there = tile.at[:, half * _HALF : (half + 1) * _HALF]
            loaded = there[...]
            new = _load(self.smem.at[columns])
            new = lax.broadcast_in_dim(new, loaded.shape, [1])
            key = plgpu.broadcasted_iota(jnp.int32, loaded.shape, 0, layout=plgpu.Layout.WGMMA)
            new = jnp.where(key == at, new, jnp.zeros_like(loaded))
            there[...] = jnp.where(key < at, loaded, new)
        plgpu.commit_smem()

    def _columns(self, ref: Any, row: Any, half: int) -> Any:
        columns = pl.ds(half * _HALF, _HALF)
        loaded = _load(ref.at[row, columns])
        return loaded.astype(jnp.float32)

    def _angles(self) -> list[Any]:
        return [self._columns(table, self.token, 0) for table in self.angles]


def _load(columns: Any) -> Any:
    # Not optimized: many threads fetch the same, but little.
    return plgpu.load(columns, *_WHOLE, layout=_COLUMNS, optimized=False)


def _turned(first: Any, second: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """Dimensions i and i + D/2 by the i-th angle."""
    return first * cos - second * sin, second * cos + first * sin
