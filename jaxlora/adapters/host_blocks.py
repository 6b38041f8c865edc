"""Host memory that adapters lie in, one after the other.

Fresh memory is dear: the system gives it page by page, as it is first written to, and takes it back
while Python's lock is held, as long as a step takes to dispatch. On a GPU blocks are *pinned*
besides: its copy engine reads them by itself, where XLA first copies any other memory. But while
one is being pinned, or freed, no kernel is launched; so an engine pins an arena when it starts, of
which blocks are parts as far as it goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import numpy as np

from jaxlora.adapters.arena import Arena, whole_pages
from jaxlora.adapters.pinned_memory import OwnedMemory, PinnedMemory
from jaxlora.interrupts import uninterrupted

logger = logging.getLogger(__name__)

Allocate = Callable[[int], np.ndarray]
"""So many bytes of memory: a flat uint8 array that may be written to and holds anything."""

MAX_IDLE_BYTES: Final = 1 << 30
"""What an engine keeps at most for adapters to come: a dozen of an 8B model's of rank 16, as many
as are read and staged at once."""
_UNDER_WAY: Final = 8
"""Adapters that have memory beside the copies in the host's tier: a few threads read some, others
stage some that have left that tier."""
_MANY: Final = 64
"""Adapters that the arena has room for where their number has no limit. If they do not fill
MAX_IDLE_BYTES, they are so small that any further one is pinned in half a millisecond."""
_SLACK: Final = 8
"""A block serves what needs up to an eighth less."""
_SPARE_BYTES: Final = (1 << 20, MAX_IDLE_BYTES // 2)
"""Of the smallest block that is worth making ahead, and of the largest."""


def ordinary_memory(num_bytes: int) -> np.ndarray:
    """Memory of the process, fresh each time."""
    return np.empty(num_bytes, np.uint8)


class AdapterMemory(NamedTuple):
    """What an engine's adapters lie in."""

    take: Allocate
    kind: str
    """For the log."""
    wait: Callable[[], object]
    """Returns once nothing more is made ready."""


def choose_memory(
    device: Any, *, max_bytes: int, max_adapters: int | None, adapter_bytes: int
) -> AdapterMemory:
    """Where JAX runs on a GPU, pinned blocks of the engine's own, of which at most ``max_bytes``,
    and no more than MAX_IDLE_BYTES, are kept idle. Within that ``max_adapters`` adapters of
    ``adapter_bytes`` bytes, and those under way, find their memory pinned."""
    if device.platform != "gpu":
        # On a CPU an array of JAX's may be the very memory that it was made of.
        return _ordinary(f"{device.platform}: nothing to pin it for")
    try:
        pinned = PinnedMemory(device.local_hardware_id)
    except OSError as error:
        return _ordinary(str(error))
    most = min(max_bytes, MAX_IDLE_BYTES)
    num_adapters = (_MANY if max_adapters is None else max_adapters) + _UNDER_WAY
    at_start = min(most, num_adapters * whole_pages(adapter_bytes))
    blocks = HostBlocks(pinned, max_idle_bytes=most, arena_bytes=at_start, aside=Aside())
    kind = f"pinned, {_mib(at_start)} at start, and up to {_mib(most)} kept for what comes next"
    return AdapterMemory(blocks.take, kind, blocks.wait)


def _ordinary(reason: str) -> AdapterMemory:
    return AdapterMemory(ordinary_memory, f"ordinary ({reason})", lambda: None)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"


class HostBlocks:
    """Lends memory that comes back by itself, with the last array that looks into it.

    ``allocate`` makes a block, or raises MemoryError. One of ``arena_bytes`` is made first, and
    parts of it are lent as long as it has some of the size. What does not fit in there has a block
    of its own; if none can be made, then, with one warning, further ones are ordinary memory. Of
    blocks that came back the last are kept: together with what is idle in the arena up to
    ``max_idle_bytes``. ``aside(work)`` lets another thread work: it makes the arena, frees blocks,
    and makes one more whenever the last of its size is taken: the next adapter is as a rule saved
    as this one was, and finds its memory ready. Any thread may ask.
    """

    def __init__(
        self,
        allocate: Allocate,
        *,
        max_idle_bytes: int,
        arena_bytes: int = 0,
        aside: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._allocate = allocate
        self._max_idle_bytes = max_idle_bytes
        self._aside = aside
        self._is_making_spare = False
        self._is_exhausted = False
        self._arena = Arena(ordinary_memory(0))
        self._has_arena = threading.Event()
        """Or can have none."""
        self._idle: list[np.ndarray] = []
        """The one that is idle for longest first."""
        self._returned: deque[np.ndarray] = deque()
        """Parts of the arena as well."""
        self._surplus: list[np.ndarray] = []
        """To be freed."""
        self._lock = threading.Lock()
        self._process = os.getpid()
        if not arena_bytes:
            self._has_arena.set()
        elif aside is None:
            self._make_arena(arena_bytes)
        else:
            aside(partial(self._make_arena, arena_bytes))

    @property
    def idle_bytes(self) -> int:
        """Memory that nobody uses."""
        with uninterrupted(), self._lock:
            self._take_back()
            return self._arena.idle_bytes + sum(block.nbytes for block in self._idle)

    def wait(self) -> None:
        """Returns once the arena was made. Who takes memory before is not kept waiting, but given
        a block: whoever serves waits here, before anybody could ask."""
        self._has_arena.wait()

    def take(self, num_bytes: int) -> np.ndarray:
        """So many bytes: of the arena, or the smallest idle block that is no more than a little
        larger, or a new one."""
        if not num_bytes or os.getpid() != self._process:
            # A child has the numbers, but neither the lock nor what the driver pinned.
            return ordinary_memory(num_bytes)
        with uninterrupted():
            # Of the arena would be lost what nobody gives back.
            loan = _Loan(self._block(num_bytes), num_bytes, self._give_back)
        return np.asarray(loan)

    def _block(self, num_bytes: int) -> np.ndarray:
        with self._lock:
            self._take_back()
            block = self._arena.take(num_bytes)
            if block is not None:
                return block
            at = self._fitting(num_bytes)
            block = None if at is None else self._idle.pop(at)
        if block is None:
            block = self._new(num_bytes)
        self._have_spare(num_bytes)
        return block

    def _make_arena(self, num_bytes: int) -> None:
        try:
            arena = Arena(self._allocate(num_bytes))
            with self._lock:
                self._arena = arena
        except MemoryError as error:
            logger.warning(
                "%s of memory for adapters cannot be pinned at start: it is pinned as adapters "
                "come, which holds up steps; lower max_cpu_loras or max_cpu_lora_gb (%s)",
                _mib(num_bytes),
                str(error),
            )
        finally:
            self._has_arena.set()

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
        if self._aside is None or not least <= num_bytes <= most:
            return
        with self._lock:
            # What is too large to be kept would be made and freed each time.
            is_needed = self._fitting(num_bytes) is None and num_bytes <= self._most_idle_bytes
            if self._is_making_spare or self._is_exhausted or not is_needed:
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
        if sys.is_finalizing() or os.getpid() != self._process:
            # With the process all of it goes. And a child is not to free it: it keeps it.
            return
        # Without waiting: it may be this very thread that has the lock, and was brought here by a
        # collection of garbage. What is not taken in now is with the next call.
        with uninterrupted():
            while self._returned and self._lock.acquire(blocking=False):
                try:
                    self._take_back()
                finally:
                    self._lock.release()

    @property
    def _most_idle_bytes(self) -> int:
        """Of blocks, beside what is idle in the arena."""
        return self._max_idle_bytes - self._arena.idle_bytes

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            if not self._arena.give_back(block):
                self._idle.append(block)
        num_bytes = sum(block.nbytes for block in self._idle)
        while self._idle and num_bytes > self._most_idle_bytes:
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
