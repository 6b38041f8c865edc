"""Blocks of memory as an engine on a GPU has them, and how many there are."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import Executor

import jax
import numpy as np

from jaxlora.adapters.host_blocks import HostBlocks
from tests.jaxlora.patience import wait_until


class Lender:
    """Makes blocks that hold NaN, until ``max_bytes`` are alive."""

    def __init__(
        self,
        *,
        max_idle_bytes: int = 1 << 30,
        arena_bytes: int = 0,
        max_bytes: int = 1 << 40,
        threads: Executor | None = None,
    ) -> None:
        self.num_made = self.num_refused = 0
        self._max_bytes = max_bytes
        self._made: list[weakref.ref[np.ndarray]] = []
        self._lock = threading.Lock()
        """Blocks are made by several threads at once."""
        self.blocks = HostBlocks(
            self._make,
            max_idle_bytes=max_idle_bytes,
            arena_bytes=arena_bytes,
            aside=None if threads is None else threads.submit,
        )

    @property
    def alive_bytes(self) -> int:
        """Of all blocks, lent or idle, and of the arena."""
        return sum(block.nbytes for ref in list(self._made) if (block := ref()) is not None)

    @property
    def lent_bytes(self) -> int:
        idle = self.blocks.idle_bytes
        return self.alive_bytes - idle

    def check_lent(self, num_bytes: int) -> None:
        """Once the threads that had to do with it are done."""

        def is_lent() -> bool:
            # What JAX has read it lets go of with the next call.
            jax.device_put(0)
            return self.lent_bytes == num_bytes

        wait_until(is_lent, 60)
        lent = self.lent_bytes
        # In words: pytest tells no values of what is asserted outside of the tests' own files.
        assert lent == num_bytes, f"{lent} bytes are lent, not {num_bytes}"

    def _make(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            if self.alive_bytes + num_bytes > self._max_bytes:
                self.num_refused += 1
                raise MemoryError("the driver has no more")
            self.num_made += 1
            block = np.full(num_bytes, 0xFF, np.uint8)
            # A block that is made meanwhile, and is in neither list, would count as returned before
            # it was lent.
            self._made = [ref for ref in self._made if ref() is not None] + [weakref.ref(block)]
        return block
