"""Turns at the slots: no adapter waits for ever because others are asked for without end.

A request whose adapter has no slot gets one when a resident adapter is idle. Under steady traffic
none may ever be. So once an adapter's requests have been passed over for more than ``patience``
steps, a resident adapter is *drained* for it: requests behind the waiting one in the queue are not
admitted to it until its slot has changed hands. Drained is the resident whose last admission is the
longest ago among those that nobody pinned and that have had their slot for ``min_residency`` steps,
so that slots are not passed on faster than they are of use. A version that was replaced is not
drained: it keeps its slot for the requests that hold it, which no new ones join. Each waiting
adapter has one resident drained for it, first come, first served.

So a request waits for its slot at most

    patience + 1 + ceil(m / S) * (min_residency + L + 1)   steps,

as long as rows, pages and token budget are to be had: m adapters wait at or before its place in the
queue when it arrives, its own included, all of them in host memory; S slots are not pinned; and a
request runs for at most L steps. Each slot changes hands within min_residency + L + 1 steps while
anybody waits out of patience, and goes to the first in the queue. Requests of the base model need
no slot and wait for none of this.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from operator import attrgetter

from jaxlora.adapters.registered import Registered
from jaxlora.engine.sequence import Sequence, Status


class SlotTurns:
    """Decides which residents are drained, and for whom. It counts in steps."""

    def __init__(self, *, patience: int = 64, min_residency: int = 64) -> None:
        self.patience = patience
        self.min_residency = min_residency
        self._step = 0
        self._first_waiting: dict[Registered, Sequence] = {}
        """By adapter without a slot, the first request that the last step passed over."""
        self._since: dict[Registered, int] = {}
        """Step in which an adapter's requests were first passed over, none admitted since."""
        self._drained_for: dict[Registered, Sequence] = {}
        self._taken: dict[int, int] = {}
        """Slot -> step in which its adapter got it."""
        self._admitted: dict[int, int] = {}
        """Slot -> step in which a request was last admitted to it."""

    def begin_step(self, running: Iterable[Sequence]) -> None:
        """Looks at who waited in the step before; ``running`` are the sequences that hold slots."""
        self._step += 1
        self._drained_for = {
            entry: waiter
            for entry, waiter in self._drained_for.items()
            if entry.slot is not None and not entry.retired and _lacks_slot(waiter)
        }
        provided = {waiter.adapter for waiter in self._drained_for.values()}
        before = self._step - self.patience
        overdue = [
            waiter
            for entry, waiter in self._first_waiting.items()
            if self._since.get(entry, before) < before
            and entry not in provided
            and _lacks_slot(waiter)
        ]
        self._first_waiting.clear()
        if overdue:
            users = {s.adapter: s.slot for s in running if s.adapter is not None}
            slots = {
                slot: entry
                for entry, slot in users.items()
                if not (entry.pinned or entry.retired)
                and entry not in self._drained_for
                and self._step - self._taken[slot] >= self.min_residency
            }
            order = sorted(slots, key=lambda slot: (self._admitted[slot], self._taken[slot]))
            first = heapq.nsmallest(len(order), overdue, key=attrgetter("place"))
            for waiter, slot in zip(first, order, strict=False):
                self._drained_for[slots[slot]] = waiter

    @property
    def slotless(self) -> list[Registered]:
        """Adapters without a slot, for want of which requests were passed over in this step."""
        # Requests of one that is drained were passed over too; it has its slot.
        return [entry for entry in self._first_waiting if entry.slot is None]

    def holds_back(self, sequence: Sequence) -> bool:
        """Its adapter is being drained for a request ahead of it in the queue."""
        if not self._drained_for or sequence.adapter is None:
            return False
        waiter = self._drained_for.get(sequence.adapter)
        return waiter is not None and waiter.place < sequence.place

    def pass_over(self, sequence: Sequence) -> None:
        """The first that waits for an adapter was not admitted for want of a slot."""
        if sequence.adapter is not None:
            self._since.setdefault(sequence.adapter, self._step)
            self._first_waiting[sequence.adapter] = sequence

    def forget(self, adapter: Registered) -> None:
        """Nobody waits for an adapter any more."""
        self._since.pop(adapter, None)

    def admit(self, sequence: Sequence, *, loaded: bool) -> None:
        """A sequence got its slot, into which its adapter is ``loaded`` now or was before."""
        if sequence.adapter is not None:
            self._since.pop(sequence.adapter, None)
        self._admitted[sequence.slot] = self._step
        if loaded:
            self._taken[sequence.slot] = self._step


def _lacks_slot(sequence: Sequence) -> bool:
    waits = sequence.status is Status.WAITING
    return waits and sequence.adapter is not None and sequence.adapter.slot is None
