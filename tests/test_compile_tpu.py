"""The engine's own programs compile for every TPU, on a machine without one.

The decode step with adapters of SmolLM2's sizes, two layers of them, for each chip, and split over
two devices for one; ``python -m benchmarks.compile_tpu programs`` has the whole matrix, an 8B model
among it. Without libtpu, which is in the dev extra, these tests fail.
"""

from __future__ import annotations

import re

import jax
import pytest

from benchmarks.tpu_programs import Engine, Target
from benchmarks.tpu_topologies import CHIPS
from benchmarks.workloads import SHAPES
from tests.jaxlora.engine.test_programs import copies_of

NUM_LAYERS = 2


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer more is compiled like the one before it."""
    small = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 12, "num_key_value_heads": 4}
    monkeypatch.setitem(SHAPES, "split", SHAPES["smollm2-135m"] | small)
    smollm2 = SHAPES["smollm2-135m"] | {"num_hidden_layers": NUM_LAYERS}
    monkeypatch.setitem(SHAPES, "smollm2-135m", smollm2)


def compile_decode(target: Target) -> tuple[jax.stages.Compiled, Engine]:
    engine = Engine(target)
    return engine.compile(target.largest["decode lora"]), engine


@pytest.mark.parametrize("chip", CHIPS)
def test_a_decode_step_compiles(chip: str) -> None:
    compiled, engine = compile_decode(
        Target(shape="smollm2-135m", chip=chip, num_devices=1, slots=8, max_num_seqs=16)
    )
    hlo = compiled.as_text()
    # Its own attention, writes in place and LoRA; not the reference's loops.
    for kernel in ("ragged_paged_attention_kernel", "write_kv", "lora_matmul"):
        assert kernel in hlo
    assert " while(" not in hlo
    memory = compiled.memory_analysis()
    # SmolLM2's heads, padded to 4 of 128, a key and a value, 2 bytes.
    assert engine.token_bytes == NUM_LAYERS * 2 * 4 * 128 * 2
    # The pools, and the table of last tokens.
    assert 0 <= memory.alias_size_in_bytes - engine.cache_bytes < 1024
    _, cache, _, _, bank, _ = engine.programs[engine.target.largest["decode lora"]].arguments
    assert copies_of(hlo, (cache, bank)) == []


def test_a_large_step_with_few_slots_reads_the_bank_as_it_lies() -> None:
    """There LoRA is two matmuls over all slots."""
    compiled, engine = compile_decode(
        Target(shape="smollm2-135m", chip="v6e", num_devices=1, slots=7, max_num_seqs=64)
    )
    hlo = compiled.as_text()
    kernels = [line for line in hlo.splitlines() if "tpu_custom_call" in line]
    assert kernels
    assert not any("lora_matmul" in line for line in kernels)
    *_, bank, _ = engine.programs[engine.target.largest["decode lora"]].arguments
    assert copies_of(hlo, bank) == []


def test_a_sharded_step_compiles() -> None:
    whole, split = (
        compile_decode(Target(shape="split", chip="v5e", num_devices=n, slots=8, max_num_seqs=16))
        for n in (1, 2)
    )
    sums = [
        len(re.findall(r" all-reduce(?:-start)?\(", one.as_text())) for one, _ in (whole, split)
    ]
    assert sums == [0, 2 * NUM_LAYERS + 1]
    assert 2 * split[1].token_bytes == whole[1].token_bytes
    needed = [one.memory_analysis().argument_size_in_bytes for one, _ in (whole, split)]
    assert needed[1] < 0.6 * needed[0]
