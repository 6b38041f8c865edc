"""How often a quantity had which values."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


class Histogram:
    """Counts values by ascending bounds, as a Prometheus histogram of its name does.

    Noting a value costs a fraction of what it costs prometheus_client's, which looks through all
    bounds under a lock. Here one thread notes and copies; a copy is anybody's.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        """Values above the bound before and up to this one."""
        self.sum = 0.0

    @property
    def count(self) -> int:
        """All values."""
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        """Notes a value that was seen so many times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def copy(self) -> Histogram:
        """What was noted so far."""
        copied = Histogram(self.bounds[:-1])
        copied.counts, copied.sum = self.counts.copy(), self.sum
        return copied
