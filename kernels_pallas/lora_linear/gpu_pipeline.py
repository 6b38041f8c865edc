"""Both ends of a pipeline of copies, in kernels for linears on NVIDIA Hopper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def free_stage(step: Any, *, stages: int, empty: Any) -> Any:
    """Waits until the stage of a pipeline's step may be filled; returns which one it is."""
    stage = lax.rem(step, stages)
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
    return stage


def contract(
    begin: Any,
    count: Any,
    multiply: Callable[[int, Any], None],
    *,
    stages: int,
    full: Any,
    empty: Any,
    products: int,
    turns: int = 1,
) -> Any:
    """Multiplies in ``count * turns`` steps of a pipeline, from its step ``begin`` on; returns the
    step that follows.

    ``multiply(turn, stage)`` issues a step's ``products`` of ``wgmma``. The next step's are issued
    before these are waited for, and with them the stage is free.
    """

    def stage_of(step: Any) -> Any:
        return lax.rem(step, stages)

    @pl.loop(0, count)
    def _steps(i: Any) -> None:
        for turn in range(turns):
            step = begin + i * turns + turn
            plgpu.barrier_wait(full.at[stage_of(step)])
            multiply(turn, stage_of(step))
            # All but this step's are done.
            plgpu.wgmma_wait(products)

            def free(step: Any = step) -> None:
                plgpu.barrier_arrive(empty.at[stage_of(step + stages - 1)])

            if turn == 0:
                pl.when(i > 0)(free)
            else:
                free()

    plgpu.wgmma_wait(0)
    after = begin + count * turns
    pl.when(count > 0)(lambda: plgpu.barrier_arrive(empty.at[stage_of(after + stages - 1)]))
    return after
