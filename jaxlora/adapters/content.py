"""What is looked at in every byte of an adapter: that it is finite, and its hash.

Both in few calls on large blocks: each call gives Python's lock back and waits to get it again.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_INFINITY: Final = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
"""As bits. NaNs are above it, what is finite is below; a sign is the highest bit."""
_PIECE_BYTES: Final = 16 << 20
"""What is hashed in one call. Part of what a version is."""
_MOST_THREADS: Final = 4
"""That hash one adapter; others may be read at the same time."""


def is_finite(arrays: Iterable[Array]) -> bool:
    """Whether contiguous arrays of float32, float16 or bfloat16 have no NaN and no Inf."""
    for array in arrays:
        infinity, size = _INFINITY[array.dtype.name], array.itemsize
        flat = array.reshape(-1)
        # As signed integers all positive numbers are above the negative ones, else below.
        positive, negative = flat.view(f"i{size}"), flat.view(f"u{size}")
        if flat.size and positive.max() >= infinity:
            return False
        if flat.size and negative.max() >= infinity + (1 << (8 * size - 1)):
            return False
    return True


def digests(blocks: Iterable[Array]) -> list[bytes]:
    """SHA-256 of the bytes of contiguous arrays, piece by piece. A core takes 50 ms for 84 MB, so
    several do it."""
    pieces = [
        data[at : at + _PIECE_BYTES]
        for block in blocks
        # Bytes: hashlib takes no bfloat16.
        for data in (block.reshape(-1).view(np.uint8).data,)
        for at in range(0, len(data), _PIECE_BYTES)
    ]
    if len(pieces) == 1 or (os.cpu_count() or 1) < 2 * _MOST_THREADS:
        return list(map(_digest, pieces))
    return list(_threads().map(_digest, pieces))


def _digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_THREADS, "jaxlora-hash")


# A child has none of the threads, and would wait for them for ever.
os.register_at_fork(after_in_child=_threads.cache_clear)
