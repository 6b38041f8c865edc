"""What is looked at in every byte of an adapter: that it is finite, and its hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlora.adapters.pieces import in_pieces


class Seen(NamedTuple):
    """What was found in some of an adapter's elements."""

    largest: float
    """Magnitude of the largest; Inf if any is NaN or Inf."""
    digest: bytes
    """SHA-256 of their bytes."""


def look(values: np.ndarray) -> Seen:
    """Looks at a contiguous array of float32, float16 or bfloat16."""
    return Seen(largest(values), _digest(values))


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


def digests(blocks: Sequence[np.ndarray]) -> list[bytes]:
    """Of the pieces of contiguous arrays."""
    return in_pieces(blocks, lambda piece: _digest(piece.values))


def _digest(values: np.ndarray) -> bytes:
    # Bytes: hashlib takes no bfloat16.
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()
