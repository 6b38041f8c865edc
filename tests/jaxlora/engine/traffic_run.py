"""Many requests through the scheduler: nothing leaks, nobody starves, no step idles.

A process of its own, ``python -m tests.jaxlora.engine.traffic_run COUNT PROFILES``: under the type
checks of the tests it would take several times as long.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from random import Random

from jaxlora.engine.scheduler import Plan
from tests.jaxlora.engine.simulator import CheckedScheduler, check_ownership
from tests.jaxlora.engine.traffic import Traffic, bound, zipf

CHECK_EVERY = 97
"""Steps between two checks that look at everything."""


class SometimesChecked(CheckedScheduler):
    """Checks one plan in many: each look at all that waits takes longer than a plan."""

    num_plans = 0

    def schedule(self) -> Plan:
        self.num_plans += 1
        if self.num_plans % CHECK_EVERY == 0:
            return super().schedule()
        return super(CheckedScheduler, self).schedule()


@dataclasses.dataclass(frozen=True)
class Profile:
    """What traffic is like."""

    seed: int
    num_adapters: int
    exponent: float
    """Of the adapters' zipf distribution: the larger, the fewer are asked for."""
    base_share: float
    per_step: float
    """Requests that arrive in a step, on average."""
    burst: int
    """Requests at once, now and then."""
    longest: int
    """Most tokens of a completion."""
    prompts: tuple[int, ...]
    """Lengths of prompts."""
    num_slots: int


def send(
    traffic: Traffic, profile: Profile, count: int, *, aborts: bool, priorities: list[int]
) -> int:
    """Sends requests as the profile says, and steps in between; how many were not aborted before
    they ran."""
    random = Random(profile.seed)
    recent = []
    names = zipf(random, profile.num_adapters, count, profile.exponent)
    num_aborted = 0
    burst = 0
    for i, name in enumerate(names):
        is_base = random.random() < profile.base_share
        prompt = [random.randint(1, 3)] * random.choice(profile.prompts)
        sequence = traffic.add(
            "" if is_base else name,
            random.randint(1, profile.longest),
            random.choice(priorities),
            prompt,
        )
        if aborts:
            recent = [*recent[-50:], sequence]
            if random.random() < 0.02:
                victim = random.choice(recent)
                num_aborted += victim in traffic._arrivals
                traffic.abort(victim)
        if burst:
            burst -= 1
        elif i % 2000 == 0:
            burst = profile.burst
        else:
            while random.random() < 1 / (1 + profile.per_step):
                traffic.step()
    traffic.drain()
    return count - num_aborted


def check_the_bound(profile: Profile, count: int) -> None:
    """While rows and pages are to be had, nobody waits longer for a slot than is promised."""
    traffic = Traffic(
        num_slots=profile.num_slots,
        patience=8,
        min_residency=3,
        num_rows=1000,
        num_pages=5000,
        step_size=100_000,
        max_staged=2 * profile.num_slots,
        scheduler=SometimesChecked,
    )
    assert send(traffic, profile, count, aborts=False, priorities=[0]) == count
    assert not traffic.rows_ran_out
    assert len(traffic.waits) == count
    for wait in traffic.waits:
        if wait.name == "":
            assert wait.steps == 0
        else:
            assert wait.steps <= bound(traffic, wait, profile.num_slots, profile.longest)


def check_the_order(profile: Profile, count: int) -> None:
    """While everything is short, those of one adapter and priority run as they came."""
    traffic = Traffic(
        num_slots=profile.num_slots,
        patience=8,
        min_residency=3,
        num_rows=64,
        num_pages=96,
        step_size=256,
        max_staged=profile.num_slots,
        enable_prefix_caching=True,
        scheduler=SometimesChecked,
    )
    num_run = send(traffic, profile, count, aborts=True, priorities=[0, 0, 0, 1])
    assert len(traffic.waits) == num_run
    check_ownership(traffic.scheduler)
    # Except that one may wait a step for the pages that another is writing.
    last: dict[tuple[str, int], int] = {}
    num_overtaken = 0
    for wait in traffic.waits:
        priority, arrival = wait.place
        line = (wait.name, priority)
        num_overtaken += arrival < last.get(line, -1)
        last[line] = max(arrival, last.get(line, -1))
    assert num_overtaken <= count / 20
    for steps in traffic.loads.values():
        assert all(later > step for step, later in itertools.pairwise(steps))


def main() -> None:
    """Sends COUNT requests for each of the profiles, a JSON list, through either regime."""
    count = int(sys.argv[1])
    for fields in json.loads(sys.argv[2]):
        profile = Profile(**fields)
        check_the_bound(profile, count)
        check_the_order(profile, count)
        sys.stdout.write(f"{2 * count} requests\n")


if __name__ == "__main__":
    main()
