"""What is looked at in every byte of an adapter: that it is finite, and its hash."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from jax.typing import DTypeLike

from jaxlora.adapters.pieces import PIECE_BYTES, num_threads


def largest(array: np.ndarray) -> float:
    """Magnitude of the largest element of a contiguous array of float32, float16 or bfloat16; Inf
    if any is NaN or Inf."""
    flat, size = array.reshape(-1), array.itemsize
    if not flat.size:
        return 0.0
    # As integers: magnitudes are in order, NaN above infinity, and a sign is the highest bit. So
    # as signed ones all positive numbers are above the negative ones, else below. Two passes over
    # what a cache holds take less than one that masks the signs.
    positive, negative = int(flat.view(f"i{size}").max()), int(flat.view(f"u{size}").max())
    bits = max(positive, negative - (1 << (8 * size - 1)), 0)
    value = float(np.asarray([bits], f"u{size}").view(array.dtype)[0])
    return value if math.isfinite(value) else math.inf


def largest_of(dtype: DTypeLike) -> float:
    """The largest number that a dtype has."""
    return float(jnp.finfo(dtype).max)  # type: ignore[no-untyped-call]


def digest(description: str, arrays: Sequence[np.ndarray]) -> str:
    """BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) of a text without NUL, NUL, and the
    bytes of contiguous arrays, in hexadecimal; several threads share large ones, without Python's
    lock."""
    is_large = sum(array.nbytes for array in arrays) > PIECE_BYTES
    found = blake3(f"{description}\0".encode(), max_threads=num_threads() if is_large else 1)
    for array in arrays:
        # Bytes: it takes no bfloat16.
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()
