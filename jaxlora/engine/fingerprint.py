"""What decides a compiled program, as a hash: so that one on disk is found again, or not at all."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import kernels_pallas

_FOLDERS = (Path(__file__).parent.parent, *map(Path, kernels_pallas.__path__))
"""Of the packages that programs are written in."""
_COVERED = ("jaxlora", "kernels_pallas", "jax")
"""Packages whose functions are known by name: their source, or their version, is hashed."""
_DISTRIBUTIONS = """jax jaxlib flax libtpu
    jax-cuda12-plugin jax-cuda12-pjrt nvidia-cublas-cu12 nvidia-cudnn-cu12 nvidia-cuda-nvcc-cu12
    jax-cuda13-plugin jax-cuda13-pjrt nvidia-cublas nvidia-cudnn-cu13 nvidia-cuda-nvcc""".split()
"""What traces and compiles, and what an executable calls."""
_CONFIG = tuple(
    # Where programs are kept decides nothing, nor how much of its memory JAX takes.
    name
    for name in jax.config.values
    if not name.startswith(("jax_compilation_cache", "jax_persistent_cache", "jax_pjrt_client"))
)
"""By name, because Pallas adds to them when it is first used."""
# Settings of XLA and CUDA, not ours: they are read wherever a program is compiled, so no command
# line passes them on.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def _hash_sources() -> str:
    """Of every file of those packages: kernels read tables too."""
    found = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.parent.name != "__pycache__":
                content = path.read_bytes()
                name = path.relative_to(folder.parent)
                found.update(f"{name} {len(content)}\n".encode() + content)
    return found.hexdigest()


SOURCES = _hash_sources()
"""A hash of the packages that programs are written in, as they were when this was imported (and not
as they are at a later start)."""


class UnknownInputError(TypeError):
    """A program depends on something that cannot be told from something else."""


@functools.singledispatch
def described(value: Any) -> Any:
    """What a value is, as nested tuples of text and numbers: equal for two values only if a program
    that depends on one is the same as for the other.

    Functions are known by name and by what is bound to them. Raises UnknownInputError for what it
    does not know, arrays among them.
    """
    if callable(getattr(value, "__wrapped__", None)):
        return described(inspect.unwrap(value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return _name_of(type(value)), described(fields)
    raise UnknownInputError(f"it depends on a {_name_of(type(value))}, which has no description")


@described.register(bool | int | float | str | bytes | None)
def _(value: Any) -> Any:
    return type(value).__name__, repr(value)


@described.register
def _(value: np.dtype) -> Any:
    return "dtype", value.name


@described.register
def _(value: type) -> Any:
    return "type", _name_of(value)


@described.register(tuple | list)
def _(value: Sequence[Any]) -> Any:
    return _name_of(type(value)), tuple(map(described, value))


@described.register(Mapping)
def _(value: Mapping[Any, Any]) -> Any:
    return "mapping", tuple((described(key), described(item)) for key, item in value.items())


@described.register(functools.partial)
def _(value: functools.partial[Any]) -> Any:
    return "partial", described((value.func, value.args, value.keywords))


@described.register(jax.tree_util.PyTreeDef | nnx.GraphDef | PartitionSpec)
def _(value: Any) -> Any:
    # Flax colors what it writes in a terminal.
    text = re.sub(r"\x1b\[[0-9;]*m", "", repr(value))
    if " at 0x" in text:
        raise UnknownInputError(f"it depends on an object that is known by address only: {text}")
    return _name_of(type(value)), text


@described.register
def _(value: FunctionType) -> Any:
    if value.__module__.split(".")[0] not in _COVERED:
        raise UnknownInputError(f"it runs {_name_of(value)}, whose source is not known")
    # Those that decorators wrap do the same.
    function = inspect.unwrap(value)
    try:
        bound = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:
        raise UnknownInputError(f"{_name_of(function)} is bound to an empty cell") from error
    return (
        "function",
        _name_of(function),
        # Apart from another of the same name.
        function.__code__.co_firstlineno,
        described((bound, function.__defaults__, function.__kwdefaults__)),
    )


def described_arguments(arguments: Any) -> Any:
    """What a program is told of its arguments: each array's shape, dtype and place, and how they
    hang together."""
    leaves, structure = jax.tree.flatten(arguments)
    return described(structure), tuple(map(_array, leaves))


def _array(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    where = str(sharding.spec) if isinstance(sharding, NamedSharding) else None
    is_weak = bool(getattr(leaf, "weak_type", False))
    return tuple(leaf.shape), str(leaf.dtype), is_weak, where


def surroundings(devices: Sequence[Any]) -> dict[str, Any]:
    """What decides every program of this process on these devices besides our source,
    described."""
    client = devices[0].client
    return {
        "versions": {name: _version(name) for name in _DISTRIBUTIONS},
        "python": platform.python_version_tuple()[:2],
        "platform": (client.platform, client.platform_version, jax.device_count()),
        "devices": [
            (repr(device), device.device_kind, getattr(device, "core_count", None))
            for device in devices
        ],
        # XLA compiles for the host's processor, and so does Mosaic what launches its kernels.
        "processor": _processor(),
        "config": [(name, repr(jax.config.values[name])) for name in _CONFIG],
        "environment": [(name, os.environ.get(name)) for name in _ENVIRONMENT],
        "flags": [argument for argument in sys.argv if argument.startswith("--xla")],
    }


def _name_of(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The host's processor and what it can do."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    first, _, _ = cpuinfo.read_text().partition("\n\n")
    return "\n".join(line for line in first.splitlines() if line.startswith(wanted))
