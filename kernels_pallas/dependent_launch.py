"""Kernels that begin before the one in front of them has ended, on NVIDIA Hopper.

CUDA's programmatic dependent launch: a kernel that calls :func:`wait_for_previous` may be on the
device while the kernel in front of it still runs, and sets itself up meanwhile. The call returns
when that kernel has ended and what it wrote can be read. Every thread makes it, before it reads or
writes anything that another kernel may have to do with.

Only then may the next kernel begin. So there are never more than two on their way, and what a
kernel reads before it has waited can be anything that the very last one has not written.

It takes effect in programs that XLA does not turn into CUDA graphs (:data:`OPTIONS`), from JAX 0.11
on, which launches kernels so. Elsewhere the kernel begins when the one in front has ended, and the
call returns at once.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

TAKES_EFFECT = jax.__version_info__ >= (0, 11)
OPTIONS = {"xla_gpu_graph_min_graph_size": "1000000"} if TAKES_EFFECT else {}
"""Of XLA, for a program of such kernels. In a CUDA graph each would be a graph of its own, which
begins when the one before has ended."""

LEAST_LAYER_BYTES = 400_000_000
"""Of weights, for it to be worth while. Outside a graph the host launches a step's kernels one by
one, some 5 us each, beside 2 ms for all else: with smaller layers the device would wait for it."""


def wait_for_previous() -> None:
    """Waits for the kernel in front, and lets the one that follows begin to set itself up."""
    plgpu.griddepcontrol_wait()
    plgpu.griddepcontrol_launch_dependents()
