"""The bound on the wait for a slot, by simulation of the scheduler alone: no device, no tokens."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from tests.jaxlora.engine.traffic import Traffic, bound, zipf


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
    traffic.drain()
    assert not traffic.rows_ran_out, "rows are short: the bound does not speak of that"
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


@pytest.mark.parametrize(("num_slots", "room"), [(1, 1), (1, 2), (2, 2), (2, 3)])
def test_adapters_that_always_wait_do_not_keep_others_from_being_staged(
    num_slots: int, room: int
) -> None:
    """Hot ones fill slots and staging area for as long as they like; never is one of them held by
    nobody."""
    traffic = Traffic(num_slots=num_slots, patience=10, min_residency=4, max_staged=room)
    hot = [f"hot{i}" for i in range(num_slots + room)]
    for step in range(400):
        for name in hot:
            if sum(s.request_id == name for s in traffic.scheduler.waiting) < 12:
                traffic.add(name, 4)
        if step == 50:
            traffic.add("new", 4)
        traffic.step()
    (wait,) = [wait for wait in traffic.waits if wait.name == "new"]
    assert wait.num_ahead == len(hot) + 1
    assert wait.steps <= bound(traffic, wait, num_slots, 4)
    assert not traffic.rows_ran_out
    traffic.drain()


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


def test_what_is_drained_does_not_lack_a_slot() -> None:
    traffic = Traffic(num_slots=1, patience=3, min_residency=0)
    traffic.add("hot", 60)
    traffic.step()
    traffic.add("cold", 1)
    for _ in range(10):
        held_back = traffic.add("hot", 1)
        traffic.step()
    assert traffic.scheduler.turns.holds_back(held_back)
    assert [entry.name for entry in traffic.scheduler.turns.slotless] == ["cold"]
