"""What became of a start's programs, and how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass
class ProgramReport:
    """What became of a start's programs. Seconds of work are those of all threads together."""

    loaded: int = 0
    """Programs whose executable was on disk."""
    recognized: int = 0
    """Programs that had to be traced and lowered, and then were what an earlier start has
    compiled."""
    compiled: int = 0
    load_seconds: float = 0.0
    lower_seconds: float = 0.0
    """Tracing and lowering in this process, which hold the interpreter lock for the most part:
    processor time."""
    worker_seconds: float = 0.0
    """Tracing in other processes: processor time."""
    kernels: int = 0
    """Mosaic GPU kernels that were compiled, for all programs together."""
    kernel_seconds: float = 0.0
    compile_seconds: float = 0.0
    keep_seconds: float = 0.0
    """Writing executables for the next start."""
    seconds: float = 0.0
    """From beginning to end."""
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    def __str__(self) -> str:
        """For logs."""
        return (
            f"{self.loaded + self.recognized + self.compiled} programs in {self.seconds:.1f} s: "
            f"{self.loaded} loaded, {self.recognized} lowered and loaded, {self.compiled} compiled "
            f"(in all threads: loading {self.load_seconds:.1f} s, lowering "
            f"{self.lower_seconds:.1f} s and in other processes {self.worker_seconds:.1f} s, "
            f"{self.kernels} kernels {self.kernel_seconds:.1f} s, "
            f"XLA {self.compile_seconds:.1f} s, writing {self.keep_seconds:.1f} s)"
        )

    @contextlib.contextmanager
    def timed(self, what: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Adds the seconds that pass to a field; any thread may."""
        began = clock()
        yield
        self.add(what, clock() - began)

    def add(self, what: str, amount: float = 1) -> None:
        """Adds to a field; any thread may."""
        with self._lock:
            setattr(self, what, getattr(self, what) + amount)
