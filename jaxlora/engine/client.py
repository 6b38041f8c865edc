"""JAX's client of a GPU, which takes its memory and launches its kernels; once in a process."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import jax
from jax._src import xla_bridge  # nothing public says whether JAX has started

logger = logging.getLogger(__name__)

_DECIDE = {"XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT", "XLA_PYTHON_CLIENT_ALLOCATOR"}
"""JAX's own variables for which of two clients there is, and for allocators, not all of which both
have."""
_OPTIONS = "jax_pjrt_client_create_options"


def ask_for_client(memory_fraction: float, *, num_devices: int) -> bool:
    """Has JAX take this part of a GPU's memory when it starts, instead of the 75% that are its
    default; False if it has started already, or the user has told it what to take. To be called
    just before it starts.

    For one device it is asked for the client that launches kernels on a thread of its own, which
    halves what a decode step takes of the thread that calls it, unless the user's environment says
    something of that. What the user has set in JAX's options for it stays.
    """
    if xla_bridge.backends_are_initialized():
        return False
    if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        return True
    given = getattr(jax.config, _OPTIONS) or {}
    if not isinstance(given, dict):
        # As text, which JAX takes as it is or not at all.
        return False
    options: dict[str, Any] = {"memory_fraction": memory_fraction}
    if num_devices == 1 and not _DECIDE & os.environ.keys() and "allocator" not in given:
        options["use_tfrt_gpu_client"] = True
    options |= given
    jax.config.update(_OPTIONS, options)
    logger.info("JAX's client: %s", ", ".join(f"{name}={value}" for name, value in options.items()))
    return "memory_fraction" not in given
