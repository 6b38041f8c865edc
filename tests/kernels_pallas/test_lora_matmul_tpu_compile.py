"""The TPU kernel compiles for every chip, on a machine without one.

One decode step and one prefill step of an 8B model each; ``python -m benchmarks.compile_tpu`` has
the whole matrix. Without libtpu, which is in the dev extra, these tests fail.
"""

from __future__ import annotations

import pytest

from benchmarks.compile_tpu import GROUPS, NUM_SLOTS, compile_lora_matmul
from benchmarks.tpu_topologies import CHIPS

RANK = 64


@pytest.mark.parametrize(("group", "num_tokens"), [("qkv", 8), ("gate_up", 2048)])
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip: str, group: str, num_tokens: int) -> None:
    d_in, splits = GROUPS[group]
    compiled = compile_lora_matmul(chip, GROUPS[group], num_tokens, RANK)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert cost is not None
    y_bytes = 2 * num_tokens * sum(splits)
    # y is updated in place, and not even one slot of the bank is copied on the way to the kernel.
    assert memory.alias_size_in_bytes == y_bytes
    slot_bytes = 2 * RANK * (len(splits) * d_in + sum(splits))
    assert memory.temp_size_in_bytes < slot_bytes / 2
    assert "lora_matmul" in compiled.as_text()
    assert cost["bytes accessed"] >= y_bytes + min(NUM_SLOTS, num_tokens) * slot_bytes


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("chip", CHIPS)
def test_two_matmuls_over_few_slots_compile(chip: str, group: str) -> None:
    compiled = compile_lora_matmul(chip, GROUPS[group], num_tokens=64, rank=16, num_slots=8)
    assert "tpu_custom_call" not in compiled.as_text()
