"""Who waits to run: in one queue by place, kept as a line for each adapter.

What keeps the first of a line from running, its adapter or a slot, keeps all of it. So a step looks
at lines, and not at every request that waits.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from jaxlora.adapters.registered import Registered
from jaxlora.engine.sequence import Sequence

_PLACE = attrgetter("place")


class WaitingQueue:
    """Sequences by place: priority, then arrival. Iterating goes through all of them in order."""

    def __init__(self) -> None:
        self.lines: dict[Registered | None, list[Sequence]] = {}
        """By adapter, None for the base model; none is empty."""
        self._num_waiting = 0

    def __len__(self) -> int:
        """Sequences in all lines."""
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return heapq.merge(*self.lines.values(), key=_PLACE)

    def places(self) -> dict[Registered, tuple[int, int]]:
        """By adapter, the place of the first that waits for it."""
        return {entry: line[0].place for entry, line in self.lines.items() if entry is not None}

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence in its place."""
        insort(self.lines.setdefault(sequence.adapter, []), sequence, key=_PLACE)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out."""
        line = self.lines[sequence.adapter]
        at = bisect_left(line, sequence.place, key=_PLACE)
        if at == len(line) or line[at] is not sequence:
            raise ValueError(f"request {sequence.request_id!r} does not wait")
        del line[at]
        if not line:
            del self.lines[sequence.adapter]
        self._num_waiting -= 1


Head = tuple[tuple[int, int], int, list[Sequence]]
"""A line's next sequence: its place, its index and the line."""


class Round:
    """One step's way through the queue: :meth:`next` in order of place, a line at a time.

    Lines of adapters without a slot are apart, so that they are left out when no slot can be had.
    """

    def __init__(self, queue: WaitingQueue, *, with_slotless: bool) -> None:
        self._ready: list[Head] = []
        self._slotless: list[Head] = []
        for entry, line in queue.lines.items():
            has_slot = entry is None or entry.slot is not None
            if has_slot or with_slotless:
                heap = self._ready if has_slot else self._slotless
                heap.append((line[0].place, 0, line))
        heapq.heapify(self._ready)
        heapq.heapify(self._slotless)

    def leave_out_slotless(self) -> None:
        """No slot can be had any more."""
        self._slotless.clear()

    def next(self) -> Head | None:
        """Whose turn it is; its line has no other before :meth:`push`."""
        heaps = [heap for heap in (self._ready, self._slotless) if heap]
        return heapq.heappop(min(heaps)) if heaps else None

    def push(self, line: list[Sequence], at: int) -> None:
        """Goes on with a line at an index, if there is anyone."""
        if at < len(line):
            adapter = line[at].adapter
            has_slot = adapter is None or adapter.slot is not None
            heap = self._ready if has_slot else self._slotless
            heapq.heappush(heap, (line[at].place, at, line))
