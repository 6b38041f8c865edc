"""The Mosaic GPU kernels of programs, compiled before the programs and once for all of them.

XLA compiles a program's kernels in the midst of the program. LLVM's options, which a process has
but once, are others for a kernel, so whoever compiles one waits for all who do not, and the other
way round; and the kernel's module, some 100 kB, goes with each of its calls, one in every layer,
through every copy and text that XLA makes of the program. But jaxlib keeps what it has compiled
while the process lives, and finds it by a hash in the call (``GetOrCreateKernel`` in
jaxlib/mosaic/gpu/custom_call.cc, the same from 0.10 to 0.11). So the modules are taken out of a
program, which keeps the hashes, and compiled by themselves.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Any

import jax
import jax.ffi
import jax.numpy as jnp
from jaxlib.mlir import ir

CALL = "mosaic_gpu_v2"
"""The custom call of kernels."""

_TOLD = "mhlo.backend_config"
_HASH = "kernel_hash"
_MODULE = "module"
_NUMBER = re.compile(rb"(mosaic_gpu\.dump_basename\0[^\0]*?)(\d+)\0")
"""Where JAX 0.11 counts the kernels that a process lowers: in their modules."""

Kernel = dict[str, Any]
"""What a call says of the kernel: all that it is compiled from."""


def take_kernels(lowered: jax.stages.Lowered) -> dict[bytes, Kernel]:
    """Takes the kernels out of a program, which can be compiled once they have been; returns them
    by their hashes. Those, and so what is left of the program, are the same in every process that
    has called :func:`number_alike`."""
    kernels: dict[bytes, Kernel] = {}

    def take(operation: Any) -> Any:
        attributes = operation.attributes
        if (
            operation.name == "stablehlo.custom_call"
            and attributes["call_target_name"].value == CALL
        ):
            told = {named.name: named.attr for named in attributes[_TOLD]}
            kernel = {name: _value(attribute) for name, attribute in told.items()}
            kernel[_MODULE] = _NUMBER.sub(_with_zeros, kernel[_MODULE])
            kernel[_HASH] = hashlib.sha256(kernel[_MODULE]).digest()
            kernels[kernel[_HASH]] = kernel
            with operation.context:
                told[_MODULE] = ir.StringAttr.get("")
                told[_HASH] = ir.StringAttr.get(kernel[_HASH])
                attributes[_TOLD] = ir.DictAttr.get(told)
        return ir.WalkResult.ADVANCE

    module: Any = lowered.compiler_ir()
    module.operation.walk(take)
    return kernels


@functools.cache
def number_alike() -> None:
    """Has kernels that this process lowers from now on numbered with four digits: numbers can be
    taken out of modules, but not their lengths."""
    # Takes a while to import, and is needed only where there are kernels.
    from jax.experimental.mosaic.gpu import dialect

    if hasattr(dialect, "get_or_set_dump_options"):
        with ir.Context(), ir.Location.unknown():
            for _ in range(1000):
                dialect.get_or_set_dump_options(ir.Module.create())


def compile_kernel(kernel: Kernel) -> None:
    """Compiles a kernel for whatever is compiled in this process from now on."""
    lower_kernel(kernel).compile()


def lower_kernel(kernel: Kernel) -> jax.stages.Lowered:
    """A program that calls it, to be compiled and never run: what a kernel takes and returns is
    nothing to its compiler."""
    call = jax.ffi.ffi_call(CALL, jax.ShapeDtypeStruct((), jnp.float32))
    return jax.jit(lambda: call(**kernel)).trace().lower(lowering_platforms=("cuda",))


def _with_zeros(found: re.Match[bytes]) -> bytes:
    return found[1] + b"0" * len(found[2]) + b"\0"


def _value(attribute: Any) -> Any:
    return attribute.value if isinstance(attribute, ir.BoolAttr) else attribute.value_bytes
