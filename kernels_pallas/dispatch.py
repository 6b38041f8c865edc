"""Which implementation runs where: the one place that knows kinds of hardware.

The choice depends on the platform, the dtype and the model's sizes and is made once, when an engine
starts. The reason that comes with it is for the engine's log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.lora_linear.op import Implementation as LinearImplementation
from kernels_pallas.lora_matmul import dense, reference
from kernels_pallas.lora_matmul.op import Implementation
from kernels_pallas.paged_attention import reference as reference_attention
from kernels_pallas.paged_attention.op import Implementation as Attention
from kernels_pallas.slot_write import reference as reference_slot_write
from kernels_pallas.slot_write.op import Implementation as SlotWrite

_KINDS = "cpu, gpu, hopper or tpu"
_NOT_HOPPER = "gpu: the kernels are written for Hopper (H100, H200)"


def kind_of(device: Any) -> str:
    """What the functions below call one of ``jax.devices()``.

    "hopper" (an NVIDIA GPU of compute capability 9.0 with as many multiprocessors as an H100 has),
    "gpu" (any other), "cpu" or "tpu".
    """
    if device.platform != "gpu":
        return device.platform
    from kernels_pallas.lora_linear.gpu_config import MULTIPROCESSORS

    hopper = device.compute_capability == "9.0" and device.core_count >= MULTIPROCESSORS
    return "hopper" if hopper else "gpu"


def default_dtype(device: Any, stored: str) -> tuple[str, str]:
    """What a model whose checkpoint is ``stored`` in should be computed in on one of
    ``jax.devices()``, and why."""
    if device.platform == "cpu":
        return "float32", "a CPU multiplies bfloat16 by way of float32"
    if device.platform == "gpu" and int(device.compute_capability.split(".")[0]) < 8:
        return "float16", (
            f"a GPU of compute capability {device.compute_capability} multiplies no bfloat16"
        )
    if stored in ("float16", "bfloat16"):
        return stored, "the checkpoint's"
    return "bfloat16", f"the checkpoint's {stored} would take twice the memory and time"


def choose_lora_matmul(
    kind: str, dtype: DTypeLike, *, device_kind: str
) -> tuple[Implementation, str]:
    """The implementation for arrays of ``dtype`` on a device of this kind, and why.

    ``kind`` is as :func:`kind_of` tells it, ``device_kind`` the device's name by JAX, for what was
    measured on such devices. Raises ValueError for any other, and for a dtype that
    is not float32, bfloat16 or float16.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"LoRA runs in float32, bfloat16 or float16, not {dtype}")
    if kind == "cpu":
        return reference.IMPLEMENTATION, "cpu: no kernel is written for it"
    by_xla = f"XLA multiplies with all slots if slots * rank is at most {dense.GPU_ROWS}"
    if kind == "gpu":
        return dense.IMPLEMENTATION, f"{_NOT_HOPPER}; {by_xla}"
    if kind == "hopper":
        if dtype == jnp.float32:
            return dense.IMPLEMENTATION, f"hopper: wgmma multiplies no float32; {by_xla}"
        from kernels_pallas.lora_matmul import gpu_config, gpu_tuned

        configs, gated_configs = (
            gpu_config.tuned(device_kind, gated=gated) for gated in (False, True)
        )
        return gpu_tuned.implementation(configs, gated_configs), (
            f"hopper: Mosaic GPU kernel in {dtype}; {len(configs) + len(gated_configs)} cases are "
            f"tuned on {device_kind}, all others cut by heuristic"
        )
    if kind == "tpu":
        if dtype == jnp.float32:
            return reference.IMPLEMENTATION, "tpu: float32 is for exactness, XLA's is the standard"
        if dtype == jnp.float16:
            return reference.IMPLEMENTATION, "tpu: the matrix unit multiplies no float16"
        from kernels_pallas.lora_matmul import tpu, tpu_config

        return tpu.IMPLEMENTATION, (
            f"tpu: Mosaic TPU kernel in {dtype}; two matmuls over all slots in steps of "
            f"{tpu_config.DENSE_TOKENS[0]} to {tpu_config.DENSE_TOKENS[-1]} tokens if "
            f"slots * rank is at most {tpu_config.DENSE_ROWS}"
        )
    raise ValueError(f'no LoRA implementation for "{kind}"; use {_KINDS}')


def choose_lora_linear(
    kind: str,
    dtype: DTypeLike,
    *,
    shapes: Sequence[tuple[int, tuple[int, ...], bool]],
    num_slots: int,
    rank: int,
    device_kind: str,
) -> tuple[LinearImplementation | None, str]:
    """What runs a step's linears with all that follows them, None for XLA and the LoRA kernel one
    after the other; and why.

    ``shapes`` are (d_in, splits, gated) of the model's groups, ``num_slots`` and ``rank`` those of
    the bank, 0 without one. ``kind`` and ``device_kind`` are as for :func:`choose_lora_matmul`.
    """
    if kind != "hopper":
        return None, _NOT_HOPPER if kind == "gpu" else f"{kind}: no kernel is written for it"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return None, f"hopper: wgmma multiplies no {jnp.dtype(dtype)}"
    from kernels_pallas.lora_linear import gpu_config, gpu_prompt_config, gpu_tuned

    decode: str | None = None
    prompts: str | None = None
    cases: set[gpu_config.Case] = set()
    for d_in, splits, gated in shapes:
        decode = decode or gpu_config.problem(d_in, splits, gated=gated, rank=rank, slots=num_slots)
        cases.update(gpu_config.cases(d_in, splits, gated=gated, rank=rank, slots=num_slots))
        prompts = prompts or gpu_prompt_config.problem(d_in, splits, rank, gated=gated)
    if decode is not None and prompts is not None:
        return None, f"hopper: {decode}"
    configs = gpu_config.tuned(device_kind)
    implementation = gpu_tuned.implementation(configs)
    implementation, graphs = _with_graphs(implementation, dtype, shapes)
    if prompts is None:
        base, lora = (
            max(
                gpu_prompt_config.least_tokens(splits, gated=gated, with_lora=with_lora)
                for _, splits, gated in shapes
            )
            for with_lora in (False, True)
        )
        implementation = implementation._replace(prompt_tokens=base, lora_prompt_tokens=lora)
        steps = f"from {base} tokens on, and from {lora} on with adapters"
    else:
        steps = f"XLA and the LoRA kernel in larger steps: {prompts}"
    if decode is not None:
        implementation = implementation._replace(sizes=(), base_sizes=(), early=None)
        return implementation, (
            f"hopper: XLA and the LoRA kernel at decode: {decode}; Mosaic GPU kernel in "
            f"{jnp.dtype(dtype)} {steps}"
        )
    return implementation, (
        f"hopper: Mosaic GPU kernel in {jnp.dtype(dtype)}; of its {len(cases)} cases "
        f"{len(cases & configs.keys())} are tuned on {device_kind}, the others cut by heuristic; "
        f"XLA where a single row has no adapter; {graphs}; {'another ' * (prompts is None)}{steps}"
    )


def _with_graphs(
    implementation: LinearImplementation,
    dtype: DTypeLike,
    shapes: Sequence[tuple[int, tuple[int, ...], bool]],
) -> tuple[LinearImplementation, str]:
    """The implementation as it is where kernels that begin early are the faster ones, and without
    those elsewhere; and why."""
    from kernels_pallas import dependent_launch
    from kernels_pallas.lora_linear import gpu_norm

    layer_bytes = sum(d_in * sum(splits) for d_in, splits, _ in shapes) * jnp.dtype(dtype).itemsize
    least = dependent_launch.LEAST_LAYER_BYTES
    graphs = implementation._replace(early=None)
    if not all(gpu_norm.serves(d_in) for d_in, _, gated in shapes if gated):
        return graphs, "decode steps are CUDA graphs: their norms are XLA's"
    if layer_bytes < least:
        return graphs, (
            f"decode steps are CUDA graphs: layers of {layer_bytes / 1e6:.0f} MB are less than "
            f"{least / 1e6:.0f}"
        )
    if not dependent_launch.TAKES_EFFECT:
        return graphs, "decode steps are CUDA graphs: JAX before 0.11 launches no kernel early"
    return implementation, (
        "decode steps without a linear of XLA's are no CUDA graphs: each kernel begins before the "
        "last ends"
    )


def choose_slot_write(
    kind: str,
    dtype: DTypeLike,
    *,
    shapes: Sequence[tuple[int, tuple[int, ...]]],
) -> tuple[SlotWrite, str]:
    """What writes an adapter into its slot, and why.

    ``shapes`` are (d_in, splits) of the model's groups, ``kind`` is as for
    :func:`choose_lora_matmul`.
    """
    if kind != "hopper":
        reason = _NOT_HOPPER if kind == "gpu" else f"{kind}: no kernel is written for it"
        return reference_slot_write.IMPLEMENTATION, reason
    from kernels_pallas.slot_write import gpu

    dtype = jnp.dtype(dtype)
    for d_in, splits in shapes:
        problem = gpu.problem(d_in, splits, dtype)
        if problem is not None:
            return reference_slot_write.IMPLEMENTATION, f"hopper: {problem}"
    return gpu.IMPLEMENTATION, f"hopper: Mosaic GPU kernel in {dtype}"


def choose_paged_attention(
    kind: str,
    dtype: DTypeLike,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    sliding_window: int | None,
) -> tuple[Attention, str]:
    """What attends on a device of this kind (as in :func:`choose_lora_matmul`), and why. The heads
    are those of one device.

    Raises ValueError for another kind.
    """
    dtype = jnp.dtype(dtype)
    if kind == "cpu":
        return reference_attention.NARROW_IMPLEMENTATION, "cpu: reference, few rows a loop"
    wide = reference_attention.WIDE_IMPLEMENTATION
    if kind == "tpu":
        if dtype != jnp.bfloat16:
            return wide, f"tpu: reference, the kernel is for bfloat16 and not {dtype}"
        from kernels_pallas.paged_attention import tpu as tpu_attention

        return tpu_attention.IMPLEMENTATION, f"tpu: JAX's ragged paged attention in {dtype}"
    if kind == "gpu":
        return wide, f"gpu: reference, {_NOT_HOPPER.removeprefix('gpu: ')}"
    if kind == "hopper":
        from kernels_pallas.paged_attention import gpu, gpu_plan, gpu_rotate

        if dtype not in (jnp.bfloat16, jnp.float16):
            return wide, f"hopper: reference, wgmma multiplies no {dtype}"
        if sliding_window is not None:
            return wide, "hopper: reference, the kernel has no sliding window"
        if head_dim not in gpu_plan.HEAD_DIMS or not gpu_plan.serves_page_size(page_size):
            return wide, (
                f"hopper: reference, the kernel serves no heads of {head_dim} in pages of "
                f"{page_size}"
            )
        if not gpu_rotate.serves(num_heads, num_kv_heads, head_dim):
            return gpu.IMPLEMENTATION._replace(of_qkv=None), (
                f"hopper: Mosaic GPU kernel in {dtype}; XLA turns {num_heads} + {num_kv_heads} "
                f"heads of {head_dim}"
            )
        return gpu.IMPLEMENTATION, f"hopper: Mosaic GPU kernels in {dtype}"
    raise ValueError(f'no paged attention for "{kind}"; use {_KINDS}')


def default_page_size(platform: str, max_model_len: int) -> int:
    """Tokens in a page, unless the caller knows better: 16, and more on a TPU.

    There a page is one copy and the page table lies in scalar memory: a sixteenth of the longest
    context, at most 256.
    """
    if platform != "tpu":
        return 16
    sixteenth = -(-max_model_len // 16)
    return min(256, max(16, 1 << (sixteenth - 1).bit_length()))
