"""The device mesh and the one table from a weight's logical axes to the mesh.

Column-parallel weights split their outputs ("heads", "mlp", "vocab"), row-parallel ones their
inputs, as in Megatron-LM (arXiv:1909.08053); what is not in the table is replicated.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxlora.errors import ConfigError

TENSOR_AXIS = "tensor"

LOGICAL_TO_MESH: dict[str, str | None] = {
    "embed": None,
    "heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
    "vocab": None,
    "rank": None,
    "slots": None,
    "pages": None,
    "head_dim": None,
}


def make_mesh(tensor_parallel_size: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A one-axis mesh over the first devices. Raises ConfigError if there are too few.

    More than one device is not served yet: weights are fused per group without interleaving
    the shards, so a larger mesh is refused instead of computing something else.
    """
    devices = jax.devices() if devices is None else devices
    if tensor_parallel_size != 1:
        raise ConfigError(
            f"tensor_parallel_size={tensor_parallel_size} is not served yet; use 1"
        )
    return Mesh(np.asarray(devices[:tensor_parallel_size]), (TENSOR_AXIS,))


def partition(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes."""
    return PartitionSpec(*(None if axis is None else LOGICAL_TO_MESH[axis] for axis in axes))
