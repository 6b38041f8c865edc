"""A hundred thousand requests of hypothesis's traffic through the scheduler, without a device.

What is checked is what the scheduler's policy promises (docs/scheduling.md).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.jaxlora.engine.traffic_run import Profile

NUM_REQUESTS = 100_000
NUM_PROFILES = 5
PROFILES = st.builds(
    Profile,
    seed=st.integers(0, 2**32 - 1),
    num_adapters=st.integers(2000, 4000),
    exponent=st.sampled_from([0.9, 1.2]),
    base_share=st.sampled_from([0.1, 0.5]),
    per_step=st.sampled_from([2.0, 5.0]),
    burst=st.sampled_from([1, 300]),
    longest=st.sampled_from([2, 5, 10]),
    prompts=st.sampled_from([(3,), (3, 30, 78)]),
    num_slots=st.sampled_from([32, 64]),
)


@settings(max_examples=1, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.lists(PROFILES, min_size=NUM_PROFILES, max_size=NUM_PROFILES))
def test_a_hundred_thousand_requests(profiles: list[Profile]) -> None:
    count = NUM_REQUESTS // NUM_PROFILES // 2
    told = subprocess.run(
        [
            *(sys.executable, "-m", "tests.jaxlora.engine.traffic_run", str(count)),
            json.dumps([dataclasses.asdict(profile) for profile in profiles]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout == f"{2 * count} requests\n" * NUM_PROFILES
