"""The bound on the wait for a slot, by simulation of the scheduler alone: no device, no tokens."""

from __future__ import annotations

import dataclasses
import itertools
from random import Random

import pytest

from jaxlora.adapters.registered import Registered
from jaxlora.adapters.registry import AdapterRegistry
from jaxlora.engine.pages import PagePool
from jaxlora.engine.scheduler import Plan, Scheduler
from jaxlora.engine.sequence import Sequence
from jaxlora.engine.turns import SlotTurns
from jaxlora.types import LoRARequest, RequestMetrics, SamplingParams
from tests.jaxlora.engine.simulator import make_adapter, make_staging

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


class Traffic:
    """Requests into a scheduler, which is stepped as the engine steps it: one step ahead."""

    def __init__(
        self,
        *,
        num_slots: int,
        patience: int,
        min_residency: int,
        num_rows: int = 64,
        max_staged: int | None = None,
    ) -> None:
        self.registry = AdapterRegistry(
            num_slots,
            lambda request: make_adapter(request.lora_name),
            staging=make_staging(max_adapters=max_staged),
        )
        self.scheduler = Scheduler(
            pool=PagePool(num_rows * 4, 16),
            registry=self.registry,
            max_num_seqs=num_rows,
            max_num_batched_tokens=num_rows * 4,
            enable_prefix_caching=False,
            turns=SlotTurns(patience=patience, min_residency=min_residency),
        )
        self.num_steps = 0
        self.waits: list[Wait] = []
        self.loads: dict[int, list[int]] = {}
        """Slot -> steps in which an adapter was written to it."""
        self._arrivals: dict[Sequence, tuple[int, int]] = {}
        self._last_plan: Plan | None = None
        self._entries: dict[str, Registered] = {}

    def add(self, name: str, num_tokens: int, priority: int = 0) -> Sequence:
        if name and name not in self._entries:
            self._entries[name] = self.registry.get(LoRARequest(name))
        sequence = Sequence(
            request_id=name,
            prompt_token_ids=PROMPT,
            params=PARAMS,
            max_len=len(PROMPT) + num_tokens,
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

    def step(self) -> None:
        self.registry.start_prefetch()
        assert not self.registry.finish_prefetch()
        plan = self.scheduler.schedule()
        for row in plan.rows:
            if row.sequence in self._arrivals:
                came, num_ahead = self._arrivals.pop(row.sequence)
                self.waits.append(Wait(row.sequence.request_id, self.num_steps - came, num_ahead))
        for slot, _ in plan.loads:
            self.loads.setdefault(slot, []).append(self.num_steps)
        last, self._last_plan = self._last_plan, plan
        for row in last.rows if last else ():
            row.sequence.append(1)
            if row.sequence.finish_reason is not None:
                self.scheduler.finish(row.sequence)
        self.num_steps += 1
        assert self.scheduler._free_rows, "rows are short: the bound does not speak of that"


def bound(traffic: Traffic, wait: Wait, num_slots: int, longest: int) -> int:
    """As the module's docstring states it; a request of n tokens holds its slot for n + 1 steps."""
    turns = traffic.scheduler.turns
    rounds = -(-wait.num_ahead // num_slots)
    return turns.patience + 1 + rounds * (turns.min_residency + longest + 1 + 1)


def zipf(random: Random, num_adapters: int, count: int) -> list[str]:
    weights = [1 / rank for rank in range(1, num_adapters + 1)]
    return [f"a{i}" for i in random.choices(range(num_adapters), weights, k=count)]


@pytest.mark.parametrize(("num_slots", "num_pinned", "room"), [(8, 0, None), (8, 0, 2), (4, 1, 2)])
def test_nobody_waits_past_the_bound_under_zipf_traffic(
    num_slots: int, num_pinned: int, room: int | None
) -> None:
    random = Random(0)
    traffic = Traffic(num_slots=num_slots, patience=6, min_residency=8, max_staged=room)
    for i in range(num_pinned):
        traffic.add(f"a{i}", 1)
        traffic.registry.pin(i + 1)
        traffic.step()
    longest = 8
    num_added = num_pinned
    for i, name in enumerate(zipf(random, 2000, 1000)):
        if random.random() < 0.2:
            traffic.add("", random.randint(1, longest))
            num_added += 1
        traffic.add(name, random.randint(1, longest))
        num_added += 1
        # Bursts of forty at once, steady traffic between them.
        for _ in range(0 if i % 200 < 40 else random.choice([0, 1, 1, 2, 3])):
            traffic.step()
    while traffic.scheduler.has_work:
        traffic.step()
    assert len(traffic.waits) == num_added
    free = num_slots - num_pinned
    for wait in traffic.waits:
        if wait.name == "":
            assert wait.steps == 0
        else:
            assert wait.steps <= bound(traffic, wait, free, longest)
    assert len({wait.name for wait in traffic.waits}) > 300
    # The bound is not met for want of waiting.
    assert max(wait.num_ahead for wait in traffic.waits) > 2 * num_slots
    assert traffic.registry.slots.num_evictions > 300


@pytest.mark.parametrize("patience", [10, 1_000_000])
def test_a_hot_adapter_gives_up_its_slot_in_time(patience: int) -> None:
    traffic = Traffic(num_slots=1, patience=patience, min_residency=10)
    cold = None
    for step in range(300):
        traffic.add("hot", 6)
        if step == 50:
            cold = traffic.add("cold", 6)
        traffic.step()
    wait = next((wait for wait in traffic.waits if wait.name == "cold"), None)
    if patience > 300:
        # Without the policy it would wait for ever.
        assert wait is None
    else:
        assert cold is not None
        assert cold.finish_reason == "length"
        assert wait is not None
        assert patience < wait.steps <= bound(traffic, wait, 1, 6)


def test_slots_change_hands_no_faster_than_they_are_of_use() -> None:
    traffic = Traffic(num_slots=2, patience=5, min_residency=20)
    for _ in range(600):
        for name in "abc":
            traffic.add(name, 4)
        traffic.step()
    served = [wait.name for wait in traffic.waits]
    for name in "abc":
        assert served.count(name) > 350
    for steps in traffic.loads.values():
        assert all(later - step >= 20 for step, later in itertools.pairwise(steps))
    assert len(traffic.waits) > 1700


def test_the_resident_that_was_needed_least_recently_is_drained() -> None:
    traffic = Traffic(num_slots=3, patience=4, min_residency=2)
    traffic.add("once", 60)
    for step in range(40):
        traffic.add("hot", 6)
        if step % 5 == 0:
            traffic.add("warm", 6)
        if step == 10:
            traffic.add("cold", 6)
        traffic.step()
    # "once" runs for long and is asked for no more: nothing is to be gained from the others.
    assert [wait.steps for wait in traffic.waits if wait.name in ("hot", "warm")] == [0] * 48
    for _ in range(40):
        traffic.add("hot", 6)
        traffic.step()
    assert "cold" in {wait.name for wait in traffic.waits}


def test_requests_ahead_in_the_queue_are_not_held_back() -> None:
    traffic = Traffic(num_slots=1, patience=3, min_residency=0)
    for _ in range(60):
        traffic.add("urgent", 4, priority=-1)
        if traffic.num_steps == 10:
            traffic.add("cold", 4)
        traffic.step()
    # As priorities have it, and not for want of patience.
    assert {wait.name for wait in traffic.waits} == {"urgent"}
    assert all(wait.steps == 0 for wait in traffic.waits)
    while traffic.scheduler.has_work:
        traffic.step()
    assert traffic.waits[-1].name == "cold"


def test_whoever_stops_waiting_stops_nobody_else() -> None:
    traffic = Traffic(num_slots=1, patience=3, min_residency=0)
    for step in range(20):
        traffic.add("hot", 30)
        if step == 1:
            cold = traffic.add("cold", 4)
        traffic.step()
        if step == 10:
            assert len(traffic.scheduler.waiting) > 1
            traffic.scheduler.finish(cold)
            traffic._arrivals.pop(cold)
        assert step < 11 or not traffic.scheduler.waiting or step == 11
    assert len(traffic.waits) == 20
