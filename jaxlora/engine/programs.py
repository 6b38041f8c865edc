"""Everything that is ever compiled: listed, then compiled ahead of time in parallel threads.

A program is called as the executable it was compiled to, so a call with another shape is an error
and never a compilation. JAX's persistent cache makes the second start fast.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.monitoring
import platformdirs
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec
from tqdm import tqdm

from jaxlora.parallel import Devices, sharded, specs_of

logger = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Program(NamedTuple):
    """A function, arguments of the shapes it will be called with, and what it may overwrite."""

    function: Callable[..., Any]
    """Of one device's parts."""
    arguments: tuple[Any, ...]
    """As a whole; where they are split is part of them."""
    donated: tuple[int, ...] = ()
    out_specs: Any = PartitionSpec()
    """Where the results are split."""


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


def compile_all(
    programs: dict[str, Program], devices: Devices, *, use_tqdm: bool = True
) -> dict[str, Any]:
    """Compiles programs in parallel, with a progress bar; returns the executables by name."""

    def build(program: Program) -> Any:
        return lower(program, devices).compile()

    compiled: dict[str, Any] = {}
    # Tracing holds the interpreter lock and XLA parallelizes within a program: few threads do.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    bar = tqdm(total=len(programs), desc="Compiling", unit="program", disable=not use_tqdm)
    with bar, pool:
        futures = {pool.submit(build, program): name for name, program in programs.items()}
        try:
            for future in as_completed(futures):
                compiled[futures[future]] = future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return compiled


def use_compilation_cache(directory: str | None) -> None:
    """Turns JAX's persistent cache on: in ``directory``, or for "auto" in the user's cache folder
    unless one is configured already. None leaves it as it is."""
    configured = jax.config.values["jax_compilation_cache_dir"]
    if directory is None or (directory == "auto" and configured):
        return
    if directory == "auto":
        directory = str(platformdirs.user_cache_path("jaxlora") / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # Once in use, the cache stays where it is until it is reset, whatever the configuration says.
    compilation_cache.reset_cache()
    logger.info("compiled programs are kept in %s", directory)


class CompilationCounter:
    """Counts what XLA is asked to compile in this process, cache hits included."""

    def __init__(self) -> None:
        self.total = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.total += 1
