"""The choice of implementations, for every kind of hardware from any machine."""

from __future__ import annotations

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
        choose_paged_attention("rocm")


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_attention_is_chosen_for_every_platform(platform: str) -> None:
    _, reason = choose_paged_attention(platform)
    assert reason.startswith(f"{platform}: ")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="not int8"):
        choose_lora_matmul("cpu", jnp.int8)


def test_only_the_chosen_kernel_is_imported() -> None:
    code = """
import sys
from kernels_pallas.dispatch import choose_lora_matmul
choose_lora_matmul("cpu", "bfloat16")
loaded = [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
