"""How many KV pages an engine gets, and what it says when they are too few."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxlora import LLM
from jaxlora.config import ModelConfig
from jaxlora.engine.memory import available_bytes, plan_pages
from jaxlora.errors import ConfigError
from jaxlora.models.cache import make_cache, page_bytes
from jaxlora.parallel import Devices
from kernels_pallas.paged_attention import tpu
from kernels_pallas.paged_attention.reference import WIDE_IMPLEMENTATION
from tests.jaxlora.peft_models import Reference
from tests.jaxlora.tiny_config import TINY

CONFIG = ModelConfig.from_hf(
    TINY
    | {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 1 << 20}
)
BFLOAT16 = jnp.dtype("bfloat16")
PER_PAGE = 3 * 16 * 2 * 2 * 32 * 2
"""Layers, tokens, key and value, KV heads, head size, bytes."""
GIB = 1 << 30


class Accelerator:
    """A device of 24 GiB, some of it in use."""

    platform = "gpu"

    def __init__(self, in_use: int) -> None:
        self._in_use = in_use

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": 24 * GIB, "bytes_in_use": self._in_use}


def plan(*devices: Accelerator, **changes: Any) -> int:
    arguments: dict[str, Any] = {
        "dtype": BFLOAT16,
        "page_size": 16,
        "max_model_len": 1000,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "utilization": 0.9,
        "claimed": False,
        "override": None,
    }
    on = devices or jax.devices()
    return plan_pages(CONFIG, WIDE_IMPLEMENTATION, on, **arguments | changes)


def test_a_page_is_what_the_cache_allocates() -> None:
    for attention, per_page in (
        (WIDE_IMPLEMENTATION, PER_PAGE),
        (tpu.IMPLEMENTATION, 4 * PER_PAGE),
    ):
        # On a TPU a head of 32 is padded to 128.
        assert page_bytes(CONFIG, attention, 16, BFLOAT16) == per_page
        cache = make_cache(
            CONFIG, attention, Devices.first(1), num_pages=5, page_size=16, dtype=BFLOAT16
        )
        assert sum(layer.nbytes for layer in cache) == 5 * per_page


def test_a_cpu_holds_what_all_rows_can_fill() -> None:
    assert plan() == 8 * math.ceil(1000 / 16)


def test_a_cpu_gives_a_gibibyte_or_one_sequence_if_that_is_more() -> None:
    assert plan(max_model_len=200_000) == GIB // PER_PAGE
    assert plan(max_model_len=1 << 21) == (1 << 21) // 16 > GIB // PER_PAGE


def test_the_override_is_taken_as_it_is() -> None:
    assert plan(override=63) == 63


def test_an_override_below_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(override=62)
    said = str(refusal.value)
    assert said.startswith("62 KV pages of 16 tokens (num_gpu_blocks_override)")
    assert "max_model_len=1000" in said
    assert said.endswith("or raise num_gpu_blocks_override to 63")


def test_an_override_that_memory_does_not_hold_is_refused_with_what_it_does() -> None:
    device = Accelerator(4 * GIB)
    most = 19 * GIB // PER_PAGE
    assert plan(device, override=most, weight_bytes=GIB) == most
    with pytest.raises(ConfigError) as refusal:
        plan(device, override=most + 1, weight_bytes=GIB)
    said = str(refusal.value)
    assert said.startswith(
        f"{most + 1} KV pages of 16 tokens (num_gpu_blocks_override) take 19,456"
    )
    assert f"19,456 MiB are available, enough for {most}: lower num_gpu_blocks_override" in said


def test_an_override_is_taken_where_nobody_knows_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Accelerator, "memory_stats", lambda device: None)
    assert plan(Accelerator(0), override=10**6) == 10**6
    with pytest.raises(ConfigError, match="num_gpu_blocks_override must: set it"):
        plan(Accelerator(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_gpu_blocks_override": 10**9},
            r"^1000000000 KV pages .* take [\d,]+ MiB .* [\d,]+ MiB are available, enough for \d+",
        ),
        ({"block_size": 10**9}, r"enough for 0: lower max_model_len or block_size"),
        ({"max_num_batched_tokens": 10**10}, r"steps of max_num_batched_tokens=10000000000 tokens"),
        (
            {"max_num_seqs": 10**8, "max_num_batched_tokens": 10**8},
            r"max_num_seqs=100000000 rows take .* enough for \d+: lower max_num_seqs",
        ),
        ({"max_loras": 10**9}, r"max_loras=1000000000 slots of max_lora_rank=16 take .*: lower"),
        ({"max_lora_rank": 10**6, "max_loras": 10**3}, r"max_loras=1000 slots of max_lora_rank=10"),
    ],
)
def test_what_no_memory_holds_is_refused_by_name(
    reference: Reference, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        LLM(
            reference.base_path,
            enable_lora=True,
            skip_tokenizer_init=True,
            use_tqdm=False,
            **options,
        )


VERSION_1 = {
    "/sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 1000\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "5000\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
}
VERSION_2 = {
    "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 1000\n",
    "/sys/fs/cgroup/memory.current": "5000\n",
    "/sys/fs/cgroup/memory.max": "max\n",
}


@pytest.mark.parametrize("groups", [VERSION_1, VERSION_2])
def test_a_cpu_has_what_its_container_has_left(
    groups: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"/proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\n"} | groups
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    cpu = jax.devices()
    assert available_bytes(cpu) == 8_000_000 * 1024
    files[list(groups)[-1]] = str(4000 + 50 * PER_PAGE)
    assert available_bytes(cpu) == 50 * PER_PAGE
    assert available_bytes(cpu * 2) == 25 * PER_PAGE
    # What one sequence needs is asked for, what is usual is not.
    assert plan(max_model_len=160) == 50
    with pytest.raises(ConfigError, match=r"enough for 50: lower max_model_len or block_size"):
        plan(max_model_len=816)


@pytest.mark.parametrize("override", [None, 64])
def test_weights_that_a_cpu_has_no_memory_for_are_what_is_told(override: int | None) -> None:
    """Fewer pages would not help."""
    size = available_bytes(jax.devices()) + 100 * GIB
    with pytest.raises(ConfigError, match=r"weights take [\d,]+ MiB .* available: use a smaller"):
        plan(weight_bytes=size, override=override)


def test_an_accelerator_gives_what_is_left() -> None:
    one = Accelerator(4 * GIB)
    pages = plan(one)
    left = 24 * GIB * 0.9 - 4 * GIB - pages * PER_PAGE
    # A step works with no less than the compiler's own scratch, and with far less than the cache.
    assert GIB / 8 < left < GIB
    assert plan(Accelerator(3 * GIB), weight_bytes=GIB) == pages
    assert plan(one, bank_bytes=GIB) == pages, "it is in use already"
    # Memory in use, and utilization given up, are pages less.
    fuller = Accelerator(5 * GIB)
    assert pages - plan(fuller) == pytest.approx(GIB / PER_PAGE, abs=1)
    assert plan(fuller) - plan(fuller, utilization=0.8) == pytest.approx(
        2.4 * GIB / PER_PAGE, abs=1
    )
    # Two devices have half of every page each, and the fuller one decides.
    assert plan(one, fuller) == pytest.approx(2 * plan(fuller), abs=1)


def test_larger_steps_leave_fewer_pages() -> None:
    device = Accelerator(4 * GIB)
    assert plan(device, max_num_batched_tokens=8192) < plan(device)
    assert plan(device, max_num_seqs=256) < plan(device)


@pytest.mark.parametrize("in_use", [21 * GIB, 23 * GIB])
def test_a_full_accelerator_says_what_may_be_changed(in_use: int) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(
            Accelerator(in_use - GIB),
            max_model_len=1 << 20,
            weight_bytes=GIB,
            bank_bytes=in_use - GIB,
        )
    said = str(refusal.value)
    assert f"less {in_use >> 20} MiB of this engine's weights and bank, 0 MiB that this" in said
    assert "gpu_memory_utilization=0.9 of the 24576 MiB" in said
    for flag in ("max_model_len=1048576", "max_loras", "max_lora_rank", "gpu_memory_utilization"):
        assert flag in said
    assert not said.startswith("-")
    assert "another LLM" not in said


def test_a_full_accelerator_says_what_is_whose() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(Accelerator(20 * GIB), weight_bytes=4 * GIB, bank_bytes=2 * GIB)
    said = str(refusal.value)
    assert "less 6144 MiB of this engine's weights and bank" in said
    assert "18432 MiB that this process has in use besides" in said
    assert "another LLM has its own until nothing refers to it" in said


def test_what_was_claimed_at_the_start_is_used_whole() -> None:
    device = Accelerator(GIB)
    more = plan(device, claimed=True) - plan(device)
    assert more == pytest.approx(0.1 * 24 * GIB / PER_PAGE, abs=2)
