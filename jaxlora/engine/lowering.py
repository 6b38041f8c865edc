"""Programs traced and lowered: here, or in another process that has no such devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlora.engine.kernels import CALL
from jaxlora.parallel import Devices, jitted, of_parts, sharded, specs_of


class Program(NamedTuple):
    """A function, arguments of the shapes it will be called with, and what it may overwrite."""

    function: Callable[..., Any]
    """Of one device's parts."""
    arguments: tuple[Any, ...]
    """As a whole; where they are split is part of them."""
    donated: tuple[int, ...] = ()
    out_specs: Any = PartitionSpec()
    """Where the results are split."""
    options: Mapping[str, str] = {}
    """Of XLA, for this program alone."""


def lower(program: Program, devices: Devices) -> jax.stages.Lowered:
    """The program, traced for these devices."""
    function = sharded(
        program.function,
        devices,
        in_specs=specs_of(program.arguments),
        out_specs=program.out_specs,
        donated=program.donated,
    )
    return function.lower(*program.arguments)


class Exported(NamedTuple):
    """A traced program, for a process that has the devices."""

    serialized: bytes
    """Of leaves alone, because JAX writes only trees that it is told how to."""
    results: Any
    """The structure of what is returned."""
    seconds: float = 0.0
    """Processor time that it took."""


@dataclasses.dataclass(frozen=True)
class Description:
    """All that tracing a program needs, without arrays and devices: it can be sent."""

    function: Callable[..., Any]
    structure: Any
    """Of the arguments."""
    leaves: list[jax.ShapeDtypeStruct]
    in_specs: list[PartitionSpec]
    out_specs: Any
    platform: str
    """That it is lowered for, as ``jax.export`` calls it."""

    @classmethod
    def of(cls, program: Program, platform: str) -> Description:
        """A program's."""
        leaves, structure = jax.tree.flatten(program.arguments)
        shapes = [
            jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, weak_type=bool(getattr(leaf, "weak_type", False))
            )
            for leaf in leaves
        ]
        specs = jax.tree.leaves(specs_of(leaves))
        return cls(program.function, structure, shapes, specs, program.out_specs, platform)

    def export(self) -> Exported:
        """Traces and lowers for one device, whatever devices this process has."""
        function = of_parts(
            self.function,
            Devices.of(jax.devices()[:1]),
            in_specs=jax.tree.unflatten(self.structure, self.in_specs),
            out_specs=self.out_specs,
        )
        results: list[Any] = []

        def flat(*leaves: Any) -> list[Any]:
            returned, structure = jax.tree.flatten(
                function(*jax.tree.unflatten(self.structure, leaves))
            )
            results.append(structure)
            return returned

        exported = jax.export.export(
            jax.jit(flat),
            platforms=[self.platform],
            # JAX 0.10 does not promise to read this call in another version, and so does not export
            # it unasked; both processes have the same.
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(CALL)],
        )(*self.leaves)
        return Exported(bytes(exported.serialize()), results[0])


def lower_exported(exported: Exported, program: Program, devices: Devices) -> jax.stages.Lowered:
    """What :func:`lower` would give: the same computation, donations and shardings."""
    inner = jax.export.deserialize(bytearray(exported.serialized))
    in_specs = specs_of(program.arguments)
    used = set(inner.module_kept_var_idx)

    # Named, and its arguments too, as the program is.
    @functools.wraps(
        of_parts(program.function, devices, in_specs=in_specs, out_specs=program.out_specs)
    )
    def function(*arguments: Any) -> Any:
        # What the program does not read is to be no argument of the executable, either.
        leaves = [
            leaf if at in used else jnp.zeros(leaf.shape, leaf.dtype)
            for at, leaf in enumerate(jax.tree.leaves(arguments))
        ]
        return jax.tree.unflatten(exported.results, inner.call(*leaves))

    outer = jitted(function, devices, in_specs, program.out_specs, program.donated)
    return outer.lower(*program.arguments)
