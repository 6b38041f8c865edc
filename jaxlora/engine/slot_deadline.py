"""When a request has waited too long for a slot that nobody gives back."""

from __future__ import annotations

import time
from collections.abc import Iterable

from jaxlora.adapters.registered import Registered


class SlotDeadline:
    """Finds adapters that have waited ``seconds`` for a slot, while no slot changed hands.

    Under traffic slots do change hands (:mod:`jaxlora.engine.turns`), so that a long queue is no
    reason; what runs without end in every slot is one. None is no deadline.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._clock = time.monotonic
        self._num_changes = -1
        self._since: dict[Registered, float] = {}

    def overdue(self, waiting: Iterable[Registered], num_changes: int) -> list[Registered]:
        """Of the adapters that the last step left without a slot, those that have waited too long;
        ``num_changes`` counts how often a slot was given to an adapter so far."""
        if self.seconds is None:
            return []
        now = self._clock()
        if num_changes != self._num_changes:
            self._num_changes = num_changes
            self._since.clear()
        self._since = {entry: self._since.get(entry, now) for entry in waiting}
        return [entry for entry, since in self._since.items() if now - since > self.seconds]
