"""What an engine is assembled from, and what it asks of its runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.batch import ScoredChunk
from jaxlora.engine.constraint import TokenMask
from jaxlora.engine.intake import Intake
from jaxlora.engine.logprobs import LogprobArrays
from jaxlora.engine.scheduler import Plan, Scheduler
from jaxlora.engine.start_report import StartReport


@runtime_checkable
class Pending(Protocol):
    """Tokens that a dispatched step will yield."""

    def read(self) -> list[int]:
        """Waits for the device; one token for each planned row, or OVERFLOWED
        (:mod:`jaxlora.engine.sampling`)."""
        ...

    def read_logprobs(self) -> LogprobArrays | None:
        """Of those tokens, if any row wants them."""
        ...

    def read_prompt_logprobs(self) -> list[tuple[ScoredChunk, LogprobArrays]]:
        """Of the prompt tokens that the step read, where they are wanted."""
        ...


@runtime_checkable
class StepRunner(Protocol):
    """What the engine needs of a runner; tests put a fake here."""

    def load(self, loads: list[tuple[int, Any]]) -> None:
        """Dispatches the writing of staged adapters to slots, ahead of the next step."""
        ...

    def run(self, plan: Plan) -> Pending:
        """Dispatches a step and returns at once."""
        ...

    def forward(self, plan: Plan) -> Any:
        """Dispatches the first half of a step and returns at once; ``is_done()`` of what it returns
        is whether the device has run it."""
        ...

    def sample(self, forward: Any, plan: Plan, masks: Mapping[int, TokenMask]) -> Pending:
        """Dispatches the second half, and returns at once: rows in ``masks`` choose one of the
        tokens there. Of ``plan`` fewer rows may sample than of that which was run forward."""
        ...


@dataclasses.dataclass(kw_only=True)
class EngineParts:
    """What an engine is assembled from."""

    runner: StepRunner
    scheduler: Scheduler
    registry: AdapterRegistry | None
    intake: Intake
    generation_defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora_slot_timeout: float | None = None
    start_report: StartReport | None = None
