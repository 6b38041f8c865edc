"""The Hopper kernel with the configurations that were measured on the card it runs on."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax

from kernels_pallas.lora_matmul import gpu
from kernels_pallas.lora_matmul.gpu_config import Case, Config
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch, max_cover


def implementation(
    configs: Mapping[Case, Config], gated_configs: Mapping[Case, Config]
) -> Implementation:
    """The kernel, cut as ``configs`` say, and by the heuristic in cases that they do not name;
    ``gated_configs`` are those of the kernel with a gate."""
    return gpu.IMPLEMENTATION._replace(
        function=functools.partial(_tuned, configs, gate=False),
        gated=functools.partial(_tuned, gated_configs, gate=True),
    )


def _tuned(
    configs: Mapping[Case, Config],
    y: jax.Array,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    batch: LoraBatch,
    *,
    splits: tuple[int, ...],
    gate: bool,
) -> jax.Array:
    """As :func:`.gpu.lora_matmul`, or with a gate :func:`.gpu.gated_lora_matmul`."""
    blocks = batch.block_slots.shape[0]
    if gate:
        blocks = max_cover(x.shape[0], batch.ranks.shape[0], batch.block_tokens)
    case = Case(
        d_in=x.shape[1],
        splits=splits,
        rank=b.shape[1],
        block_tokens=batch.block_tokens,
        blocks=blocks,
    )
    function = gpu.gated_lora_matmul if gate else gpu.lora_matmul
    return function(y, x, a, b, batch, splits=splits, config=configs.get(case))
