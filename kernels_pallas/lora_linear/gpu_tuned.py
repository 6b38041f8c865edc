"""The Hopper kernel with the configurations that were measured on the card it runs on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from kernels_pallas.lora_linear import gpu
from kernels_pallas.lora_linear.gpu_config import Case, Config
from kernels_pallas.lora_linear.op import Implementation
from kernels_pallas.lora_matmul.op import LoraBatch


def implementation(configs: Mapping[Case, Config]) -> Implementation:
    """The kernel, cut as ``configs`` say, and by the heuristic in cases that they do not name."""
    return gpu.IMPLEMENTATION._replace(function=functools.partial(_lora_linear, configs))


def _lora_linear(
    configs: Mapping[Case, Config],
    x: jax.Array,
    weight: jax.Array,
    *,
    splits: tuple[int, ...],
    b: jax.Array | None = None,
    batch: LoraBatch | None = None,
    gated: bool = False,
    **rest: Any,
) -> jax.Array:
    """As :func:`.gpu.lora_linear`."""
    adapters: dict[str, int] = {}
    if b is not None and batch is not None:
        adapters = {
            "rank": b.shape[1],
            "blocks": batch.block_slots.shape[0],
            "block_tokens": batch.block_tokens,
        }
    case = Case(tokens=x.shape[0], d_in=x.shape[1], splits=splits, gated=gated, **adapters)
    return gpu.lora_linear(
        x,
        weight,
        splits=splits,
        b=b,
        batch=batch,
        gated=gated,
        config=configs.get(case),
        **rest,
    )
