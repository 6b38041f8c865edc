"""The choice of implementations, for every kind of hardware from any machine."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax.numpy as jnp
import pytest

from kernels_pallas.dispatch import choose_lora_matmul, choose_paged_attention


@pytest.mark.parametrize(
    ("platform", "dtype", "name"),
    [
        ("cpu", jnp.float32, "reference"),
        ("cpu", jnp.bfloat16, "reference"),
        ("gpu", jnp.float32, "reference"),
        ("gpu", jnp.bfloat16, "mosaic_gpu"),
        ("gpu", jnp.float16, "mosaic_gpu"),
        ("tpu", jnp.float32, "reference"),
        ("tpu", jnp.float16, "reference"),
        ("tpu", jnp.bfloat16, "mosaic_tpu"),
    ],
)
def test_choice(platform: str, dtype: jnp.dtype, name: str) -> None:
    implementation, reason = choose_lora_matmul(platform, dtype)
    assert implementation.name == name
    assert reason.startswith(f"{platform}: ")


def test_an_unknown_platform_is_refused() -> None:
    with pytest.raises(ValueError, match='platform "rocm"; use cpu, gpu or tpu'):
        choose_lora_matmul("rocm", jnp.bfloat16)
    with pytest.raises(ValueError, match='platform "rocm"; use cpu, gpu or tpu'):
        attention("rocm")


def attention(
    platform: str,
    dtype: str = "bfloat16",
    *,
    head_dim: int = 128,
    page_size: int = 16,
    sliding_window: int | None = None,
) -> tuple[str, str]:
    """Module of the function chosen, and the reason."""
    function, reason = choose_paged_attention(
        platform, dtype, head_dim=head_dim, page_size=page_size, sliding_window=sliding_window
    )
    if isinstance(function, functools.partial):
        function = function.func
    return function.__module__.rpartition(".")[2], reason


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "name"),
    [
        ("cpu", "float32", {}, "reference"),
        ("tpu", "bfloat16", {}, "reference"),
        ("gpu", "bfloat16", {}, "gpu"),
        ("gpu", "float16", {"head_dim": 64, "page_size": 64}, "gpu"),
        ("gpu", "float32", {}, "reference"),
        ("gpu", "bfloat16", {"head_dim": 96}, "reference"),
        ("gpu", "bfloat16", {"page_size": 4}, "reference"),
        ("gpu", "bfloat16", {"sliding_window": 4096}, "reference"),
    ],
)
def test_choice_of_attention(platform: str, dtype: str, changes: dict[str, int], name: str) -> None:
    chosen, reason = attention(platform, dtype, **changes)
    assert chosen == name
    assert reason.startswith(f"{platform}: ")
    assert ("reference" in reason) == (name == "reference")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="not int8"):
        choose_lora_matmul("cpu", jnp.int8)


def test_only_the_chosen_kernel_is_imported() -> None:
    code = """
import sys
from kernels_pallas.dispatch import choose_lora_matmul, choose_paged_attention
choose_lora_matmul("cpu", "bfloat16")
choose_paged_attention("cpu", "bfloat16", head_dim=128, page_size=16, sliding_window=None)
loaded = [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
