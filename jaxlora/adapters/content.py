"""What is looked at in every byte of an adapter: that it is finite, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from jaxlora.adapters.pieces import in_pieces

Array = np.ndarray[Any, np.dtype[Any]]

_INFINITY: Final = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
"""As bits. NaNs are above it, what is finite is below; a sign is the highest bit."""


class Seen(NamedTuple):
    """What was found in some of an adapter's elements."""

    is_finite: bool
    digest: bytes
    """SHA-256 of their bytes."""


def look(values: Array) -> Seen:
    """Looks at a contiguous array of float32, float16 or bfloat16."""
    return Seen(is_finite(values), _digest(values))


def is_finite(array: Array) -> bool:
    """Whether a contiguous array of float32, float16 or bfloat16 has no NaN and no Inf."""
    infinity, size = _INFINITY[array.dtype.name], array.itemsize
    flat = array.reshape(-1)
    if not flat.size:
        return True
    # As signed integers all positive numbers are above the negative ones, else below. Two passes
    # over what a cache holds take less than one that masks the signs.
    if flat.view(f"i{size}").max() >= infinity:
        return False
    return bool(flat.view(f"u{size}").max() < infinity + (1 << (8 * size - 1)))


def digests(blocks: Sequence[Array]) -> list[bytes]:
    """Of the pieces of contiguous arrays."""
    return in_pieces(blocks, lambda piece: _digest(piece.values))


def _digest(values: Array) -> bytes:
    # Bytes: hashlib takes no bfloat16.
    return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()
