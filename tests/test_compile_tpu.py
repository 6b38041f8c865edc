"""The engine's own programs compile for every TPU, on a machine without one.

The decode step with adapters of SmolLM2's sizes, two layers of them, for each chip; for one of them
also with many slots, with prompts, and split over two devices, there with extras too. ``python -m
benchmarks.compile_tpu programs`` has the whole matrix, an 8B model among it. Without libtpu, which
is in the dev extra, these tests fail.
"""

from __future__ import annotations

import re
from collections import Counter

import jax
import pytest

from benchmarks.tpu_programs import Engine, Target
from benchmarks.tpu_topologies import CHIPS
from benchmarks.workloads import SHAPES
from tests.jaxlora.engine.test_programs import copies_of

NUM_LAYERS = 2
ALL_KERNELS = Counter(
    ragged_paged_attention_kernel=NUM_LAYERS, write_kv=NUM_LAYERS, lora_matmul=4 * NUM_LAYERS
)
"""Of a step with adapters; LoRA of qkv, o, gate and up, down."""


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer more is compiled like the one before it."""
    small = {"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 12, "num_key_value_heads": 4}
    monkeypatch.setitem(SHAPES, "split", SHAPES["smollm2-135m"] | small)
    smollm2 = SHAPES["smollm2-135m"] | {"num_hidden_layers": NUM_LAYERS}
    monkeypatch.setitem(SHAPES, "smollm2-135m", smollm2)


def compile_largest(
    target: Target, kind: str = "decode lora"
) -> tuple[jax.stages.Compiled, Engine]:
    engine = Engine(target)
    return engine.compile(target.largest[kind]), engine


def kernels_of(hlo: str) -> Counter[str]:
    """How often compiled HLO calls each kernel."""
    names = "ragged_paged_attention_kernel|write_kv|lora_matmul"
    return Counter(re.findall(rf"%({names})[.\d]* = .* custom-call\(", hlo))


def num_sums(hlo: str) -> int:
    """How many sums over the devices compiled HLO has."""
    return len(re.findall(r" all-reduce(?:-start)?\(", hlo))


@pytest.mark.parametrize("chip", CHIPS)
def test_a_decode_step_compiles(chip: str) -> None:
    compiled, engine = compile_largest(
        Target(shape="smollm2-135m", chip=chip, num_devices=1, slots=8, max_num_seqs=16)
    )
    hlo = compiled.as_text()
    # Its own attention, writes in place and LoRA; not the reference's loops.
    assert kernels_of(hlo) == ALL_KERNELS
    assert " while(" not in hlo
    memory = compiled.memory_analysis()
    assert memory is not None
    # SmolLM2's heads, padded to 4 of 128, a key and a value, 2 bytes.
    assert engine.token_bytes == NUM_LAYERS * 2 * 4 * 128 * 2
    # The pools, and the table of last tokens.
    assert 0 <= memory.alias_size_in_bytes - engine.cache_bytes < 1024
    _, cache, _, _, bank, _ = engine.programs[engine.target.largest["decode lora"]].arguments
    assert copies_of(hlo, (cache, bank)) == []


def test_a_large_step_with_few_slots_reads_the_bank_as_it_lies() -> None:
    """There LoRA is two matmuls over all slots."""
    compiled, engine = compile_largest(
        Target(shape="smollm2-135m", chip="v6e", num_devices=1, slots=7, max_num_seqs=64)
    )
    hlo = compiled.as_text()
    assert kernels_of(hlo) == ALL_KERNELS - Counter(lora_matmul=4 * NUM_LAYERS)
    *_, bank, _ = engine.programs[engine.target.largest["decode lora"]].arguments
    assert copies_of(hlo, bank) == []


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("decode lora", {"slots": 64, "max_num_seqs": 64}),
        ("mixed lora", {"slots": 7, "max_num_seqs": 16, "max_num_batched_tokens": 512}),
    ],
    ids=["many slots", "prompts"],
)
def test_a_step_of_many_slots_or_tokens_is_the_kernels(kind: str, sizes: dict[str, int]) -> None:
    target = Target(shape="smollm2-135m", chip="v6e", num_devices=1, **sizes)
    compiled, engine = compile_largest(target, kind)
    hlo = compiled.as_text()
    assert kernels_of(hlo) == ALL_KERNELS
    _, cache, _, _, bank, _ = engine.programs[target.largest[kind]].arguments
    assert copies_of(hlo, (cache, bank)) == []


def test_a_sharded_step_compiles() -> None:
    whole, split = (
        compile_largest(Target(shape="split", chip="v5e", num_devices=n, slots=8, max_num_seqs=16))
        for n in (1, 2)
    )
    assert [num_sums(one.as_text()) for one, _ in (whole, split)] == [0, 2 * NUM_LAYERS + 1]
    assert 2 * split[1].token_bytes == whole[1].token_bytes
    needed = [one.memory_analysis() for one, _ in (whole, split)]
    assert needed[0] is not None
    assert needed[1] is not None
    assert needed[1].argument_size_in_bytes < 0.6 * needed[0].argument_size_in_bytes


def test_a_sharded_step_with_extras_is_the_same_kernels_and_sums() -> None:
    target = Target(shape="split", chip="v5e", num_devices=2, slots=8, extras=True, max_num_seqs=16)
    hlo = compile_largest(target, "decode extras")[0].as_text()
    assert kernels_of(hlo) == ALL_KERNELS
    assert num_sums(hlo) == 2 * NUM_LAYERS + 1
