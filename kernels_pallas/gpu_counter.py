"""A counter in device memory, for the thread blocks of a kernel to wait for one another.

A kernel finds it at zero and leaves it so: one serves all kernels of a program, one after the
other. Mosaic GPU's own semaphores XLA zeroes before each kernel, by another one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu


def new(number: int = 1) -> Any:
    """Counters at zero, for the program that is being traced: a Ref of int32 ``[number]``."""
    return jax.new_ref(jnp.zeros(number, jnp.int32))


def add_one(counter: Any) -> None:
    """Counts the calling warpgroup. Who then waits for the counter sees what it wrote before."""
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(_add_one)(counter)


def wait_for(counter: Any, value: Any, *, take: bool = False) -> None:
    """Waits until the counter is at ``value`` or above, and with ``take`` takes that from it."""
    types = (plgpu.RefType(), plgpu.Layout.WG_SPLAT)
    wait = functools.partial(_wait_for, take=take)
    plgpu.inline_mgpu(arg_types=types)(wait)(counter, jnp.int32(value))


def _add_one(_context: Any, counter: Any) -> None:
    # One thread counts for all of the warpgroup.
    mgpu.warpgroup_barrier()
    _semaphore(counter).signal(1, memory_scope="gpu")


def _wait_for(_context: Any, counter: Any, value: Any, *, take: bool) -> None:
    _semaphore(counter).wait(value.registers.item(), decrement=take, memory_scope="gpu")


def _semaphore(counter: Any) -> Any:
    return mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter))
