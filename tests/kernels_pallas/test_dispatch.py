"""The choice of implementations, for every kind of hardware from any machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kernels_pallas import dependent_launch
from kernels_pallas.dispatch import (
    choose_lora_linear,
    choose_lora_matmul,
    choose_paged_attention,
    default_dtype,
    default_page_size,
    kind_of,
)
from kernels_pallas.lora_linear import gpu, gpu_norm
from kernels_pallas.lora_linear.op import EarlyKernels, Implementation


@dataclasses.dataclass
class Device:
    platform: str
    compute_capability: str = ""
    core_count: int = 0


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        (Device("cpu"), "cpu"),
        (Device("tpu"), "tpu"),
        (Device("gpu", "9.0", 132), "hopper"),
        (Device("gpu", "9.0", 114), "gpu"),
        (Device("gpu", "8.0", 108), "gpu"),
        (Device("gpu", "10.0", 148), "gpu"),
    ],
)
def test_kinds(device: Device, kind: str) -> None:
    assert kind_of(device) == kind


@pytest.mark.parametrize(
    ("device", "stored", "dtype", "why"),
    [
        (Device("cpu"), "bfloat16", "float32", "CPU"),
        (Device("tpu"), "bfloat16", "bfloat16", "checkpoint"),
        (Device("gpu", "8.0"), "float16", "float16", "checkpoint"),
        (Device("gpu", "10.0"), "float32", "bfloat16", "float32"),
        (Device("gpu", "7.5"), "bfloat16", "float16", "7.5"),
    ],
)
def test_default_dtypes(device: Device, stored: str, dtype: str, why: str) -> None:
    name, reason = default_dtype(device, stored)
    assert name == dtype
    assert why in reason


def linear(
    shapes: list[tuple[int, tuple[int, ...], bool]],
    kind: str = "hopper",
    dtype: str = "bfloat16",
    *,
    rank: int = 16,
) -> tuple[Implementation | None, str]:
    """What is chosen for a bank of 8 slots, or for none, and the reason."""
    num_slots = 8 if rank else 0
    return choose_lora_linear(
        kind, dtype, shapes=shapes, num_slots=num_slots, rank=rank, device_kind="any"
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "d_in", "said"),
    [
        ("hopper", "bfloat16", 4096, None),
        ("hopper", "float32", 4096, "float32"),
        ("hopper", "bfloat16", 4100, "d_in 4100"),
        ("gpu", "bfloat16", 4096, "Hopper"),
        ("cpu", "bfloat16", 4096, "no kernel"),
    ],
)
def test_choice_for_decode(kind: str, dtype: str, d_in: int, said: str | None) -> None:
    shapes = [(d_in, (4096, 1024, 1024), False), (4096, (14336, 14336), True)]
    chosen, reason = linear(shapes, kind, dtype)
    assert (chosen is None) == (said is not None)
    assert reason.startswith(f"{kind}: ")
    assert (said or "Mosaic") in reason


@pytest.mark.parametrize(
    ("d_in", "d_out", "takes_effect", "said"),
    [
        (4096, 14336, True, "no CUDA graphs"),
        (4096, 14336, False, "before 0.11"),
        (4096, 4096, True, "layers of 67 MB are less than 400"),
        (4160, 14336, True, "norms are XLA's"),
    ],
)
def test_decode_steps_are_graphs_where_no_kernel_begins_early(
    monkeypatch: pytest.MonkeyPatch, d_in: int, d_out: int, takes_effect: bool, said: str
) -> None:
    options = {"some": "option"}
    monkeypatch.setattr(dependent_launch, "TAKES_EFFECT", takes_effect)
    kernels = EarlyKernels(gpu_norm.rms_norm, options)
    monkeypatch.setattr(gpu, "IMPLEMENTATION", gpu.IMPLEMENTATION._replace(early=kernels))
    chosen, reason = linear(
        [(d_in, (d_out, d_out), True)] + [(d_in, (d_out,), False)] * 2 * (d_out > 4096)
    )
    assert chosen is not None
    assert chosen.serves(64, num_slots=8)
    assert chosen.early == (kernels if said == "no CUDA graphs" else None)
    assert said in reason


@pytest.mark.parametrize(("width", "served"), [(1024, True), (960, False)])
def test_choice_for_prompts(width: int, served: bool) -> None:
    chosen, reason = linear([(4096, (2048, width, width), False)])
    assert chosen is not None
    assert chosen.serves(64, num_slots=8)
    assert not chosen.serves(129, num_slots=8)
    for slots in (0, 8, 64):
        assert chosen.serves(2048, num_slots=slots) == served
    assert chosen.serves(512, num_slots=64) == served
    assert not chosen.serves(512, num_slots=0)
    # No whole tiles of rows.
    assert not chosen.serves(2044, num_slots=0)
    assert ("in larger steps" in reason) == (not served)


def test_choice_for_prompts_alone() -> None:
    """Qwen2.5-7B's gate and up are more tiles than a decode step's kernel runs at once."""
    chosen, reason = linear([(3584, (18944, 18944), True)])
    assert chosen is not None
    assert chosen.sizes == ()
    assert chosen.early is None
    assert not chosen.serves(64, num_slots=8)
    assert chosen.serves(2048, num_slots=8)
    assert "XLA and the LoRA kernel at decode" in reason


@pytest.mark.parametrize(
    ("hidden", "rank", "least", "with_lora"),
    [
        (32768, 16, 1024, 256),
        (4096, 16, 1024, 512),
        (2048, 64, 2048, 1024),
        (1024, 0, 4096, 2048),
        (4096, 80, None, None),
    ],
)
def test_from_how_many_tokens_on_prompts_are_served(
    hidden: int, rank: int, least: int | None, with_lora: int | None
) -> None:
    """Small models have fewer tiles; small steps are another kernel's, however many they have; of
    large ranks nothing was measured."""
    chosen, reason = linear([(hidden, (hidden,), False)], rank=rank)
    assert chosen is not None
    assert (chosen.prompt_tokens, chosen.lora_prompt_tokens) == (least, with_lora)
    assert str(least or rank) in reason
    assert str(with_lora or rank) in reason


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", jnp.float32, "reference"),
        ("cpu", jnp.bfloat16, "reference"),
        ("gpu", jnp.bfloat16, "dense"),
        ("hopper", jnp.float32, "dense"),
        ("hopper", jnp.bfloat16, "mosaic_gpu"),
        ("hopper", jnp.float16, "mosaic_gpu"),
        ("tpu", jnp.float32, "reference"),
        ("tpu", jnp.float16, "reference"),
        ("tpu", jnp.bfloat16, "mosaic_tpu"),
    ],
)
def test_choice(platform: str, dtype: jnp.dtype, name: str) -> None:
    implementation, reason = choose_lora_matmul(platform, dtype, device_kind="any")
    assert implementation.name == name
    assert reason.startswith(f"{platform}: ")


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match='"rocm"; use cpu, gpu, hopper or tpu'):
        choose_lora_matmul("rocm", jnp.bfloat16, device_kind="any")
    with pytest.raises(ValueError, match='"rocm"; use cpu, gpu, hopper or tpu'):
        attention("rocm")


def attention(
    platform: str,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 128,
    page_size: int = 16,
    sliding_window: int | None = None,
) -> tuple[str, str]:
    """Name of the implementation chosen, and the reason."""
    implementation, reason = choose_paged_attention(
        platform,
        dtype,
        num_heads=32,
        num_kv_heads=8,
        head_dim=head_dim,
        page_size=page_size,
        sliding_window=sliding_window,
    )
    return implementation.name, reason


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "name"),
    [
        ("cpu", "float32", {}, "reference, narrow"),
        ("tpu", "bfloat16", {}, "ragged_paged_attention"),
        ("tpu", "bfloat16", {"head_dim": 80, "sliding_window": 9}, "ragged_paged_attention"),
        ("tpu", "float32", {}, "reference, wide"),
        ("tpu", "float16", {}, "reference, wide"),
        ("gpu", "bfloat16", {}, "reference, wide"),
        ("hopper", "bfloat16", {}, "mosaic_gpu"),
        ("hopper", "float16", {"head_dim": 64, "page_size": 64}, "mosaic_gpu"),
        ("hopper", "float32", {}, "reference, wide"),
        ("hopper", "bfloat16", {"head_dim": 96}, "reference, wide"),
        ("hopper", "bfloat16", {"page_size": 4}, "reference, wide"),
        ("hopper", "bfloat16", {"sliding_window": 4096}, "reference, wide"),
    ],
)
def test_choice_of_attention(platform: str, dtype: str, changes: dict[str, int], name: str) -> None:
    chosen, reason = attention(platform, dtype, **changes)
    assert chosen == name
    assert reason.startswith(f"{platform}: ")
    assert ("reference" in reason) == name.startswith("reference")


@pytest.mark.parametrize(
    ("platform", "max_model_len", "size"),
    [
        ("cpu", 131072, 16),
        ("gpu", 131072, 16),
        ("tpu", 100, 16),
        ("tpu", 2000, 128),
        ("tpu", 2048, 128),
        ("tpu", 2049, 256),
        ("tpu", 131072, 256),
    ],
)
def test_pages_are_small_but_on_a_tpu(platform: str, max_model_len: int, size: int) -> None:
    assert default_page_size(platform, max_model_len) == size


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="not int8"):
        choose_lora_matmul("cpu", jnp.int8, device_kind="any")


def test_only_the_chosen_kernel_is_imported() -> None:
    code = """
import sys
from kernels_pallas.dispatch import (
    choose_lora_linear, choose_lora_matmul, choose_paged_attention
)
choose_lora_matmul("cpu", "bfloat16", device_kind="any")
choose_lora_linear("cpu", "bfloat16", shapes=[], num_slots=0, rank=0, device_kind="cpu")
heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
choose_paged_attention("cpu", "bfloat16", **heads, page_size=16, sliding_window=None)
loaded = [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
