"""Reads adapters from wherever they are, on any thread, and counts what that takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jaxlora.adapters.adapter import Adapter
from jaxlora.errors import forget_frames
from jaxlora.types import LoRARequest


class Reader:
    """``load(request)`` reads an adapter or raises AdapterError; calls may overlap."""

    def __init__(self, load: Callable[[LoRARequest], Adapter]) -> None:
        self.num_loads = 0
        """Adapters read, successfully or not."""
        self.load_seconds = 0.0
        """Time spent on that, over all threads."""
        self._load = load
        self._lock = threading.Lock()
        """Guards the two counts."""

    def read(self, request: LoRARequest) -> Adapter:
        """The adapter that a request names. Raises AdapterError."""
        start = time.perf_counter()
        try:
            return self._load(request)
        except Exception as error:
            forget_frames(error)
            raise
        finally:
            with self._lock:
                self.num_loads += 1
                self.load_seconds += time.perf_counter() - start
