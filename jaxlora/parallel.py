"""The devices of an engine, how arrays lie on them, and what the devices tell one another.

Every program is one ``shard_map`` over a mesh of one axis, on one device too (there the functions
of this module do nothing). A device computes its share of the heads and of the MLP for all tokens
(Megatron's split, arXiv:1909.08053): the model is written as that of one device, a smaller one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxlora.config import ModelConfig
from jaxlora.errors import ConfigError

TENSOR = "tensor"
"""The mesh's only axis."""

MESH_AXES: dict[str, str | None] = {
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
    "device": TENSOR,
    "hidden": None,
}
"""Logical axis -> mesh axis; one that is not split is on every device as a whole.

"heads" is the outputs of q, k and v together and the inputs of o, "device" an axis with one part
for each device.
"""

Axes = tuple[str | None, ...]
"""The logical axis of each dimension; None is not split."""


def spec(axes: Axes) -> PartitionSpec:
    """Where the dimensions of these logical axes are split."""
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes))


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices an engine runs on, and the one way to make arrays on them."""

    mesh: Mesh

    @classmethod
    def first(cls, count: int) -> Devices:
        """The first ``count`` of the default platform. Raises ConfigError if there are fewer."""
        present = jax.devices()
        if count > len(present):
            raise ConfigError(
                f"tensor_parallel_size={count} needs {count} devices, and JAX finds "
                f"{len(present)} ({present[0].platform}): lower it to {len(present)}"
            )
        return cls.of(present[:count])

    @classmethod
    def of(cls, devices: Sequence[Any]) -> Devices:
        """These devices."""
        return cls(Mesh(np.asarray(devices), (TENSOR,)))

    @property
    def count(self) -> int:
        """How many there are."""
        return self.mesh.size

    @property
    def all(self) -> list[Any]:
        """Each of them, as JAX has it."""
        return list(self.mesh.devices.flat)

    @property
    def platform(self) -> str:
        """What JAX calls their kind: cpu, gpu or tpu."""
        return str(self.all[0].platform)

    def sharding(self, axes: Axes = ()) -> NamedSharding:
        """How an array of these logical axes lies on the devices."""
        return NamedSharding(self.mesh, spec(axes))

    def num_parts(self, axis: str | None) -> int:
        """How many parts a dimension of this logical axis is split into."""
        (mesh_axis,) = spec((axis,))
        return 1 if mesh_axis is None else self.count

    def whole_shape(self, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
        """Of an array whose part on one device has ``shape``."""
        return tuple(n * self.num_parts(axis) for n, axis in zip(shape, axes, strict=True))

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> Any:
        """Zeros; ``shape`` is that of one device's part."""
        return jnp.zeros(self.whole_shape(shape, axes), dtype, device=self.sharding(axes))

    def put(self, tree: Any, axes: Axes = ()) -> Any:
        """Arrays of the host or of one device, laid out over all of them."""
        return jax.device_put(tree, self.sharding(axes))

    def put_parts(self, parts: np.ndarray) -> jax.Array:
        """``[devices, n]`` of the host as ``[devices * n]``, of which each device has its row. With
        more dimensions XLA would not let a copy engine read pinned memory, but copy it first."""
        count, size = parts.shape

        def part(index: Any) -> np.ndarray:
            return parts[(index[0].start or 0) // size]

        return jax.make_array_from_callback((count * size,), self.sharding(("device",)), part)


class ShapesOnly(Devices):
    """Devices that are not here: for each array its shape and sharding, enough to compile for."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike, axes: Axes) -> Any:
        """The shape alone."""
        whole = self.whole_shape(shape, axes)
        return jax.ShapeDtypeStruct(whole, dtype, sharding=self.sharding(axes))

    def put(self, tree: Any, axes: Axes = ()) -> Any:
        """The shapes alone."""
        sharding = self.sharding(axes)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )


def shard(config: ModelConfig, count: int) -> ModelConfig:
    """The model as one of ``count`` devices computes it. Raises ConfigError where a size is not a
    multiple of ``count``."""
    sizes = {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
    }
    parts = {}
    for name, hf_name in sizes.items():
        size = getattr(config, name)
        parts[name], rest = divmod(size, count)
        if rest:
            common = math.gcd(*(getattr(config, name) for name in sizes))
            allowed = [str(n) for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"tensor_parallel_size={count} does not divide the model's {hf_name}={size}; "
                f"it may be {', '.join(allowed)}"
            )
    return dataclasses.replace(config, **parts)


def specs_of(tree: Any) -> Any:
    """How the leaves of a tree lie on the devices; those of the host will be on all of them."""

    def spec_of(leaf: Any) -> PartitionSpec:
        sharding = getattr(leaf, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()

    return jax.tree.map(spec_of, tree)


def bytes_on_each(tree: Any) -> int:
    """Bytes that arrays take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


# Within a program


def summed(x: jax.Array, count: int) -> jax.Array:
    """The sum of what ``count`` devices have, on each of them."""
    return x if count == 1 else lax.psum(x, TENSOR)


def own_ids(ids: jax.Array, size: int, count: int) -> jax.Array:
    """Where ids of a whole are in this device's part of it, which has ``size``; where another of
    the ``count`` devices has them, beyond either end of this part."""
    return ids if count == 1 else ids - lax.axis_index(TENSOR) * size


def joined(x: jax.Array, *, axis: int) -> jax.Array:
    """The devices' parts side by side, on each of them."""
    return x if lax.axis_size(TENSOR) == 1 else lax.all_gather(x, TENSOR, axis=axis, tiled=True)


def of_parts(function: Any, devices: Devices, in_specs: Any, out_specs: Any) -> Any:
    """The function of whole arrays whose parts ``function`` is of."""
    return jax.shard_map(
        function,
        mesh=devices.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def jitted(
    function: Any, devices: Devices, in_specs: Any, out_specs: Any, donated: tuple[int, ...]
) -> Any:
    """A function of whole arrays, to be compiled for devices on which they lie so."""

    def shardings(specs: Any) -> Any:
        return jax.tree.map(functools.partial(NamedSharding, devices.mesh), specs)

    return jax.jit(
        function,
        donate_argnums=donated,
        in_shardings=shardings(in_specs),
        out_shardings=shardings(out_specs),
    )


def sharded(
    function: Any, devices: Devices, in_specs: Any, out_specs: Any, donated: tuple[int, ...]
) -> Any:
    """Both: the jitted function of whole arrays whose parts ``function`` is of."""
    mapped = of_parts(function, devices, in_specs, out_specs)
    return jitted(mapped, devices, in_specs, out_specs, donated)
