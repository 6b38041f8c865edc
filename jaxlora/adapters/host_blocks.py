"""Host memory that adapters lie in, one after the other.

Fresh memory is dear: the system gives it page by page, as it is first written to, and takes it back
while Python's lock is held, as long as a step takes to dispatch. On a GPU blocks are *pinned*
besides: its copy engine reads them by itself, where XLA first copies any other memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

import numpy as np

from jaxlora.adapters.pinned_memory import OwnedMemory, PinnedMemory
from jaxlora.interrupts import uninterrupted

logger = logging.getLogger(__name__)

Allocate = Callable[[int], np.ndarray]
"""So many bytes of memory: a flat uint8 array that may be written to and holds anything."""

MAX_IDLE_BYTES: Final = 1 << 30
"""What an engine keeps at most for adapters to come: a dozen of an 8B model's of rank 16, as many
as are read and staged at once."""
_SLACK: Final = 8
"""A block serves what needs up to an eighth less."""
_SPARE_BYTES: Final = (1 << 20, MAX_IDLE_BYTES // 2)
"""Of the smallest block that is worth making ahead, and of the largest."""


def ordinary_memory(num_bytes: int) -> np.ndarray:
    """Memory of the process, fresh each time."""
    return np.empty(num_bytes, np.uint8)


def choose_memory(device: Any, max_bytes: int | None) -> tuple[Allocate, str]:
    """What gives an engine's adapters their memory, and what memory that is, for the log: where JAX
    runs on a GPU pinned blocks of the engine's own, of which at most ``max_bytes``, and no more
    than MAX_IDLE_BYTES, are kept idle."""
    if device.platform != "gpu":
        # On a CPU an array of JAX's may be the very memory that it was made of.
        return ordinary_memory, f"ordinary ({device.platform}: nothing to pin it for)"
    try:
        pinned = PinnedMemory(device.local_hardware_id)
    except OSError as error:
        return ordinary_memory, f"ordinary ({error})"
    most = MAX_IDLE_BYTES if max_bytes is None else min(max_bytes, MAX_IDLE_BYTES)
    blocks = HostBlocks(pinned, max_idle_bytes=most, aside=Aside())
    return blocks.take, f"pinned, and up to {most / (1 << 20):.0f} MiB kept for what comes next"


class HostBlocks:
    """Lends memory that comes back by itself, with the last array that looks into it.

    ``allocate`` makes a block, or raises MemoryError: then, with one warning, further ones are
    ordinary memory. Those that came back last are kept, up to ``max_idle_bytes``. ``aside(work)``
    lets another thread work: it frees the others, and makes one more whenever the last of its size
    is taken: the next adapter is as a rule saved as this one was, and finds its memory ready. Any
    thread may ask.
    """

    def __init__(
        self,
        allocate: Allocate,
        *,
        max_idle_bytes: int,
        aside: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._allocate = allocate
        self._max_idle_bytes = max_idle_bytes
        self._aside = aside
        self._is_making_spare = False
        self._is_exhausted = False
        self._idle: list[np.ndarray] = []
        """The one that is idle for longest first."""
        self._returned: deque[np.ndarray] = deque()
        self._surplus: list[np.ndarray] = []
        """To be freed."""
        self._lock = threading.Lock()
        self._process = os.getpid()

    @property
    def idle_bytes(self) -> int:
        """Memory that nobody uses."""
        with self._lock:
            self._take_back()
            return sum(block.nbytes for block in self._idle)

    def take(self, num_bytes: int) -> np.ndarray:
        """So many bytes: the smallest idle block that is no more than a little larger, or a new
        one."""
        if not num_bytes or os.getpid() != self._process:
            # A child has the numbers, but neither the lock nor what the driver pinned.
            return ordinary_memory(num_bytes)
        with self._lock:
            self._take_back()
            at = self._fitting(num_bytes)
            block = None if at is None else self._idle.pop(at)
        if block is None:
            block = self._new(num_bytes)
        self._have_spare(num_bytes)
        return np.asarray(_Loan(block, num_bytes, self._give_back))

    def _fitting(self, num_bytes: int) -> int | None:
        """Which idle block is to be taken."""
        most = num_bytes + num_bytes // _SLACK
        sizes = ((block.nbytes, -at) for at, block in enumerate(self._idle))
        # Of equal ones the last, so that what is not needed is what is idle for longest.
        found = min((each for each in sizes if num_bytes <= each[0] <= most), default=None)
        return None if found is None else -found[1]

    def _new(self, num_bytes: int) -> np.ndarray:
        if self._is_exhausted:
            return ordinary_memory(num_bytes)
        try:
            try:
                return self._allocate(num_bytes)
            except MemoryError:
                if not self._drop_idle():
                    raise
                return self._allocate(num_bytes)
        except MemoryError as error:
            with self._lock:
                is_first, self._is_exhausted = not self._is_exhausted, True
            if is_first:
                logger.warning(
                    "no more pinned memory can be had for adapters: further ones are given "
                    "ordinary memory, and come to the device more slowly from there; lower "
                    "max_cpu_loras or max_cpu_lora_gb (%s)",
                    # Not the error: who keeps the record would keep a block.
                    str(error),
                )
            return ordinary_memory(num_bytes)

    def _drop_idle(self) -> bool:
        """Whether there was any, those that are to be freed included."""
        with self._lock:
            self._take_back()
            dropped = [*self._idle, *self._surplus]
            self._idle.clear()
            self._surplus.clear()
        return bool(dropped)

    def _have_spare(self, num_bytes: int) -> None:
        least, most = _SPARE_BYTES
        if self._aside is None or not least <= num_bytes <= min(most, self._max_idle_bytes):
            return
        with uninterrupted():
            with self._lock:
                is_there = self._fitting(num_bytes) is not None
                if self._is_making_spare or self._is_exhausted or is_there:
                    return
                self._is_making_spare = True
            self._aside(partial(self._make_spare, num_bytes))

    def _make_spare(self, num_bytes: int) -> None:
        try:
            # Who needs a block and gets none says so.
            with contextlib.suppress(MemoryError):
                self._give_back(self._allocate(num_bytes))
        finally:
            with self._lock:
                self._is_making_spare = False

    def _give_back(self, block: np.ndarray) -> None:
        self._returned.append(block)
        if os.getpid() != self._process:
            # Not for a child to free: it keeps it.
            return
        # Without waiting: it may be this very thread that has the lock, and was brought here by a
        # collection of garbage. What is not taken in now is with the next call.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._take_back()
            finally:
                self._lock.release()

    def _take_back(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        num_bytes = sum(block.nbytes for block in self._idle)
        while num_bytes > self._max_idle_bytes:
            num_bytes -= self._idle[0].nbytes
            self._surplus.append(self._idle.pop(0))
        if self._aside is None:
            self._surplus.clear()
        elif self._surplus:
            # To unpin one and give it back to the system takes milliseconds, and the thread that
            # steps is who lets go of most.
            self._aside(self._surplus.clear)


class Aside:
    """A thread that does what it is asked, one thing after the other, until nobody is left who
    could ask. That may be done at any time, by a collection of garbage while one asks as well."""

    def __init__(self) -> None:
        todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(
            target=_work, args=(todo,), name="jaxlora-host-blocks", daemon=True
        ).start()
        weakref.finalize(self, todo.put, None)
        self._todo = todo

    def __call__(self, work: Callable[[], None]) -> None:
        """Returns at once."""
        self._todo.put(work)


def _work(todo: SimpleQueue[Callable[[], None] | None]) -> None:
    while (work := todo.get()) is not None:
        try:
            work()
        except Exception:
            # Whoever asks next must not ask nobody.
            logger.exception("adapters' memory could not be made ready or freed")
        # It may be all that keeps a block.
        del work


class _Loan(OwnedMemory):
    """Gives a block back when no array needs it any more."""

    def __init__(
        self, block: np.ndarray, num_bytes: int, give_back: Callable[[np.ndarray], None]
    ) -> None:
        super().__init__(block.ctypes.data, num_bytes, block)
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back(self._owner)
