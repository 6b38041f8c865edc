"""The Hopper kernel with the configurations that were measured on the card it runs on."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from kernels_pallas.lora_matmul import gpu
from kernels_pallas.lora_matmul.gpu_config import Case, Config
from kernels_pallas.lora_matmul.op import Implementation, LoraBatch


def implementation(configs: Mapping[Case, Config]) -> Implementation:
    """The kernel, cut as ``configs`` say, and by the heuristic in cases that they do not name."""

    def lora_matmul(
        y: jax.Array,
        x: jax.Array,
        a: jax.Array,
        b: jax.Array,
        batch: LoraBatch,
        *,
        splits: tuple[int, ...],
    ) -> jax.Array:
        """As :func:`.gpu.lora_matmul`."""
        case = Case(
            d_in=x.shape[1],
            splits=splits,
            rank=b.shape[1],
            block_tokens=batch.block_tokens,
            blocks=batch.block_slots.shape[0],
        )
        return gpu.lora_matmul(y, x, a, b, batch, splits=splits, config=configs.get(case))

    return gpu.IMPLEMENTATION._replace(function=lora_matmul)
