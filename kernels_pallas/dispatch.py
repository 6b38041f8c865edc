"""Which implementation runs where: the one place that knows kinds of hardware.

The choice depends on the platform, the dtype and the model's sizes and is made once, when an engine
starts. The reason that comes with it is for the engine's log.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.lora_matmul import reference
from kernels_pallas.lora_matmul.op import Implementation
from kernels_pallas.paged_attention import reference as reference_attention
from kernels_pallas.paged_attention.op import Implementation as Attention


def choose_lora_matmul(platform: str, dtype: DTypeLike) -> tuple[Implementation, str]:
    """The implementation for arrays of ``dtype`` on ``platform``, and why.

    ``platform`` is what :func:`jax.default_backend` returns: "cpu", "gpu" or "tpu". Raises
    ValueError for any other, and for a dtype that is not float32, bfloat16 or float16.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"LoRA runs in float32, bfloat16 or float16, not {dtype}")
    if platform == "cpu":
        return reference.IMPLEMENTATION, "cpu: no kernel is written for it"
    if platform == "gpu":
        if dtype == jnp.float32:
            return reference.IMPLEMENTATION, "gpu: wgmma multiplies no float32"
        from kernels_pallas.lora_matmul import gpu

        return gpu.IMPLEMENTATION, f"gpu: Mosaic GPU kernel in {dtype}"
    if platform == "tpu":
        if dtype == jnp.float32:
            return reference.IMPLEMENTATION, "tpu: float32 is for exactness, XLA's is the standard"
        if dtype == jnp.float16:
            return reference.IMPLEMENTATION, "tpu: the matrix unit multiplies no float16"
        from kernels_pallas.lora_matmul import tpu

        return tpu.IMPLEMENTATION, f"tpu: Mosaic TPU kernel in {dtype}"
    raise ValueError(f'no LoRA implementation for platform "{platform}"; use cpu, gpu or tpu')


def choose_paged_attention(
    platform: str,
    dtype: DTypeLike,
    *,
    head_dim: int,
    page_size: int,
    sliding_window: int | None,
) -> tuple[Attention, str]:
    """What attends on ``platform`` (as in :func:`choose_lora_matmul`), and why.

    Raises ValueError for another platform.
    """
    dtype = jnp.dtype(dtype)
    if platform == "cpu":
        return reference_attention.NARROW_IMPLEMENTATION, "cpu: reference, few rows a loop"
    wide = reference_attention.WIDE_IMPLEMENTATION
    if platform == "tpu":
        if dtype != jnp.bfloat16:
            return wide, f"tpu: reference, the kernel is for bfloat16 and not {dtype}"
        from kernels_pallas.paged_attention import tpu as tpu_attention

        return tpu_attention.IMPLEMENTATION, f"tpu: JAX's ragged paged attention in {dtype}"
    if platform == "gpu":
        from kernels_pallas.paged_attention import gpu

        if dtype not in (jnp.bfloat16, jnp.float16):
            return wide, f"gpu: reference, wgmma multiplies no {dtype}"
        if sliding_window is not None:
            return wide, "gpu: reference, the kernel has no sliding window"
        if head_dim not in gpu.HEAD_DIMS or not gpu.serves_page_size(page_size):
            return wide, (
                f"gpu: reference, the kernel serves no heads of {head_dim} in pages of {page_size}"
            )
        return gpu.IMPLEMENTATION, f"gpu: Mosaic GPU kernel in {dtype}"
    raise ValueError(f'no paged attention for platform "{platform}"; use cpu, gpu or tpu')


def default_page_size(platform: str, max_model_len: int) -> int:
    """Tokens in a page, unless the caller knows better: 16, and more on a TPU.

    There a page is one copy and the page table lies in scalar memory: a sixteenth of the longest
    context, at most 256.
    """
    if platform != "tpu":
        return 16
    sixteenth = -(-max_model_len // 16)
    return min(256, max(16, 1 << (sixteenth - 1).bit_length()))
