"""A step that was dispatched, until its tokens have been read."""

from __future__ import annotations

from jaxlora.engine.parts import Pending
from jaxlora.engine.scheduler import Plan


class StepInFlight:
    """A plan and what it will yield."""

    def __init__(self, plan: Plan, pending: Pending) -> None:
        self.plan, self.pending = plan, pending
        self._tokens: list[int] | None = None

    def read(self) -> list[int]:
        """A token for each row of the plan (and some for padding). The first time this waits for
        the device, and lets constraints go on to their next masks."""
        if self._tokens is None:
            self._tokens = self.pending.read()
            for row, token in zip(self.plan.rows, self._tokens, strict=False):
                if row.samples and row.sequence.constraint is not None:
                    row.sequence.constraint.push(token)
        return self._tokens
