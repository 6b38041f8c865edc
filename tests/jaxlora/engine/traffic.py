"""Requests into a scheduler alone, stepped as the engine steps it: no device, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from random import Random

from jaxlora.adapters.registered import Registered
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.pages import PagePool
from jaxlora.engine.scheduler import Plan, Scheduler
from jaxlora.engine.sequence import Sequence
from jaxlora.engine.turns import SlotTurns
from jaxlora.outputs import RequestMetrics
from jaxlora.types import LoRARequest, SamplingParams
from tests.jaxlora.engine.simulator import known_adapters, make_adapter, make_staging

PARAMS = SamplingParams()
METRICS = RequestMetrics(arrival_time=0.0)
PROMPT = [1, 2, 3]


@dataclasses.dataclass(frozen=True)
class Wait:
    """What became of one request."""

    name: str
    steps: int
    """From its arrival to its admission."""
    num_ahead: int
    """Adapters that waited at or before its place when it came, its own included."""
    place: tuple[int, int]


class Traffic:
    """A scheduler one step ahead of what it is told, as the engine is."""

    def __init__(
        self,
        *,
        num_slots: int,
        patience: int,
        min_residency: int,
        num_rows: int = 64,
        max_staged: int | None = None,
        num_pages: int | None = None,
        step_size: int | None = None,
        enable_prefix_caching: bool = False,
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self.registry = AdapterRegistry(
            num_slots,
            lambda request: make_adapter(request.lora_name),
            staging=make_staging(max_adapters=max_staged),
        )
        self.scheduler = scheduler(
            pool=PagePool(num_pages or num_rows * 4, 16),
            registry=self.registry,
            max_num_seqs=num_rows,
            step_sizes=(step_size or num_rows * 4,),
            enable_prefix_caching=enable_prefix_caching,
            turns=SlotTurns(patience=patience, min_residency=min_residency),
        )
        self.num_steps = 0
        self.waits: list[Wait] = []
        """In the order of admission."""
        self.loads: dict[int, list[int]] = {}
        """Slot -> steps in which an adapter was written to it."""
        self.rows_ran_out = False
        self._arrivals: dict[Sequence, tuple[int, int]] = {}
        self._last_plan: Plan | None = None
        self._entries: dict[str, Registered] = {}

    def add(
        self, name: str, num_tokens: int, priority: int = 0, prompt: Seq[int] = PROMPT
    ) -> Sequence:
        """Queues a request for an adapter, or for the base model if ``name`` is empty."""
        if name and name not in self._entries:
            self._entries[name] = self.registry.get(LoRARequest(name))
        sequence = Sequence(
            request_id=name,
            prompt_token_ids=list(prompt),
            params=PARAMS,
            max_len=len(prompt) + num_tokens,
            eos_token_ids=frozenset(),
            seed=0,
            metrics=METRICS,
            adapter=self._entries.get(name),
            priority=priority,
        )
        self.scheduler.add(sequence)
        waiting = len(self.scheduler.waiting.lines.keys() - {None})
        self._arrivals[sequence] = (self.num_steps, waiting)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """Takes a request out, unless it has ended."""
        if sequence.finish_reason is None:
            sequence.finish_reason = "abort"
            self.scheduler.finish(sequence)
            self._arrivals.pop(sequence, None)

    def step(self) -> Plan:
        """Plans a step, then tells what the one before it sampled."""
        self.registry.start_prefetch(self.scheduler.waiting.places())
        assert not self.registry.finish_prefetch()
        plan = self.scheduler.schedule()
        for row in plan.rows:
            if row.sequence in self._arrivals:
                came, num_ahead = self._arrivals.pop(row.sequence)
                name, steps = row.sequence.request_id, self.num_steps - came
                self.waits.append(Wait(name, steps, num_ahead, row.sequence.place))
        for slot, _ in plan.loads:
            self.loads.setdefault(slot, []).append(self.num_steps)
        last, self._last_plan = self._last_plan, plan
        for row in last.rows if last else ():
            if row.samples and row.sequence.finish_reason is None:
                row.sequence.append(1)
                if row.sequence.finish_reason is not None:
                    self.scheduler.finish(row.sequence)
        self.num_steps += 1
        self.rows_ran_out |= not self.scheduler._free_rows
        return plan

    def drain(self) -> None:
        """Steps until nothing is left, and checks that nothing is held."""
        while self.scheduler.has_work:
            self.step()
        scheduler, registry = self.scheduler, self.registry
        assert not self._arrivals
        assert not scheduler.waiting.lines
        assert scheduler.pool.num_free == scheduler.pool.num_pages
        assert sorted(scheduler._free_rows) == list(range(scheduler.max_num_seqs))
        assert not registry._held
        assert all(entry.in_use == entry.num_holders == 0 for entry in known_adapters(registry))
        assert not scheduler.turns._since


def bound(traffic: Traffic, wait: Wait, num_slots: int, longest: int) -> int:
    """As :mod:`jaxlora.engine.turns` states it; a request of n tokens holds its slot for n + 1
    steps."""
    turns = traffic.scheduler.turns
    rounds = -(-wait.num_ahead // num_slots)
    return turns.patience + 1 + rounds * (turns.min_residency + longest + 1 + 1)


def zipf(random: Random, num_adapters: int, count: int, exponent: float = 1.0) -> list[str]:
    """Names of adapters, a few of them most of the time."""
    weights = [rank**-exponent for rank in range(1, num_adapters + 1)]
    return [f"a{i}" for i in random.choices(range(num_adapters), weights, k=count)]
