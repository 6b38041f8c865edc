"""TPUs to compile for on a machine that has none. Needs libtpu."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache


class Chip(NamedTuple):
    """What JAX shows as one device."""

    topology: str
    """The smallest there is, of four chips."""
    hbm_gib: float
    """Memory that the compiler has; it says so when a program does not fit."""


CHIPS = {
    "v5e": Chip("v5e:2x2", 15.75),
    "v5p": Chip("v5p:2x2x1", 95.73),
    "v6e": Chip("v6e:2x2", 31.24),
    # Two devices a chip, so this is half of one.
    "7x": Chip("tpu7x:2x2x1", 94.74),
}


@functools.cache
def devices(chip: str) -> tuple[jax.Device, ...]:
    """Devices to compile for, not to run on."""
    # libtpu would ask a metadata server about the machine, and refuse a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)
    return tuple(topology.devices)


def compile_for(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a program, and leaves JAX's persistent cache alone: what is kept there for a device
    that is not here cannot be read again."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    # Once in use, the cache is used whatever the configuration says, until it is reset.
    compilation_cache.reset_cache()
    try:
        return lowered.compile()
    finally:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()
