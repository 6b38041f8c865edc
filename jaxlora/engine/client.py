"""JAX's client of a GPU, which takes its memory and launches its kernels; once in a process."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

import jax
from jax._src import xla_bridge  # nothing public says whether JAX has started

logger = logging.getLogger(__name__)

_CHOICE = "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT"
"""JAX's own variable for which of two clients there is."""
_OPTIONS = "jax_pjrt_client_create_options"


def ask_for_client(memory_fraction: float, *, num_devices: int) -> bool:
    """Has JAX take this part of a GPU's memory when it starts, instead of the 75% that are its
    default; False if it has started already and keeps what it has.

    For one device it is asked for the client that launches kernels on a thread of its own, which
    halves what a decode step takes of the thread that calls it, unless the user's environment says
    which. Options that the user has given JAX stay.
    """
    if xla_bridge.backends_are_initialized():
        return False
    if any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
        options: dict[str, Any] = {"memory_fraction": memory_fraction}
        if num_devices == 1 and _CHOICE not in os.environ:
            options["use_tfrt_gpu_client"] = True
        options |= _given()
        jax.config.update(_OPTIONS, options)
        logger.info(
            "JAX's client: %s", ", ".join(f"{name}={value}" for name, value in options.items())
        )
    return True


def _given() -> dict[str, Any]:
    """What the user has set, in either of the forms that JAX takes: a dict, or "a:1;b:2"."""
    given = getattr(jax.config, _OPTIONS)
    if isinstance(given, str):
        return dict(each.split(":", 1) for each in given.split(";") if each)
    return dict(given or {})
