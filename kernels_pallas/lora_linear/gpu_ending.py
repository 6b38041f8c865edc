"""The end of a linear on NVIDIA Hopper: what becomes of a warpgroup's sums.

At decode the thread blocks of a cluster, each with a part of the contraction, add up each other's
sums, every one for its share of the tokens and all in the same order. Then the gate is applied or
the residual added, as in a prompt step, too, and the result sent on its way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """One warpgroup's, with the shared memory that it reads and writes."""

    dtype: Any
    gated: bool
    cluster: int
    shares: int
    """Parts of the step's tokens, for a thread block of the cluster each."""
    me: Any
    """Which warpgroup of those that multiply."""
    cta: Any
    """Which thread block of the cluster."""
    out_smem: Any  # [consumers, parts of the result, share, 64]
    partial_sums: Any = None  # [shares, parts, consumers, 64, share], in a cluster
    summed: Any = None
    residual_smem: Any = None  # as out_smem, if there is a residual
    residual_full: Any = None

    def end(self, sums: Sequence[Any], target: Callable[[int], Any]) -> None:
        """Writes what comes of the sums, one ``[64, T]`` for each part, to ``target`` of each part
        of the result."""
        if self.cluster == 1:
            self._finish(sums, target)
            return
        me, partial_sums = self.me, self.partial_sums
        share = partial_sums.shape[-1]
        for part, value in enumerate(sums):
            for j in range(self.shares):
                partial_sums.at[j, part, me][...] = value[:, j * share : (j + 1) * share]
        self._meet()

        @pl.when(self.cta < self.shares)
        def _mine() -> None:
            mine = jnp.minimum(self.cta, self.shares - 1)
            peers = [
                plgpu.cluster_ref(partial_sums, {"cta": jnp.int32(peer)})
                for peer in range(self.cluster)
            ]
            mine_of_all = [
                sum(peer.at[mine, part, me][...] for peer in peers) for part in range(len(sums))
            ]
            self._finish(mine_of_all, target)

        # A peer may still read.
        self._meet()

    def _meet(self) -> None:
        """Waits for the same warpgroup of the other thread blocks."""
        plgpu.barrier_arrive(self.summed.at[self.me])
        plgpu.barrier_wait(self.summed.at[self.me])

    def _finish(self, values: Sequence[Any], target: Callable[[int], Any]) -> None:
        if self.gated:
            values = [through_gate(*values)]
        if self.residual_smem is not None:
            plgpu.barrier_wait(self.residual_full)
        for part, value in enumerate(values):
            if self.residual_smem is not None:
                value = onto(self.residual_smem.at[self.me, part], value)  # noqa: PLW2901
            self.out_smem.at[self.me, part].transpose((1, 0))[...] = plgpu.layout_cast(
                value.astype(self.dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
        plgpu.commit_smem()
        for part in range(len(values)):
            plgpu.copy_smem_to_gmem(self.out_smem.at[self.me, part], target(part))
        plgpu.wait_smem_to_gmem(0)


def through_gate(gate: Any, up: Any) -> Any:
    """``silu(gate) * up``."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def onto(residual: Any, value: Any) -> Any:
    """Sums in float32 ``[64, tokens]``, and what lies in shared memory as ``[tokens, 64]``."""
    before = residual.transpose((1, 0))[...]
    before = plgpu.layout_cast(before, plgpu.Layout.WGMMA_TRANSPOSED)
    before = plgpu.layout_cast(before, plgpu.Layout.WGMMA)
    return value + before.astype(jnp.float32)
