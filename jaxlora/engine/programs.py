"""Everything that is ever compiled: listed, then compiled ahead of time in parallel threads.

A program is called as the executable it was compiled to, so a call with another shape is an error
and never a compilation. Executables are kept on disk for the next start
(:mod:`jaxlora.engine.program_cache`), and what XLA compiles is in JAX's persistent cache too, which
also finds it when our source has changed and the program has not.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.monitoring
import platformdirs
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec
from tqdm import tqdm

from jaxlora.engine.program_cache import ProgramCache
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


@dataclasses.dataclass
class ProgramReport:
    """What became of a start's programs. Seconds of work are of all threads together."""

    loaded: int = 0
    """Programs whose executable was on disk."""
    compiled: int = 0
    load_seconds: float = 0.0
    lower_seconds: float = 0.0
    """Tracing and lowering, which hold the interpreter lock for the most part."""
    compile_seconds: float = 0.0
    """In XLA, or in JAX's cache of what XLA has compiled."""
    keep_seconds: float = 0.0
    """Writing executables for the next start."""
    seconds: float = 0.0
    """From beginning to end."""

    def __str__(self) -> str:
        """For logs."""
        parts = []
        if self.loaded:
            parts.append(f"{self.loaded} loaded ({self.load_seconds:.1f} s of work)")
        if self.compiled:
            parts.append(
                f"{self.compiled} compiled (of work: {self.lower_seconds:.1f} s tracing and "
                f"lowering, {self.compile_seconds:.1f} s XLA, {self.keep_seconds:.1f} s writing)"
            )
        return f"{self.loaded + self.compiled} programs in {self.seconds:.1f} s: {'; '.join(parts)}"


def compile_all(
    programs: dict[str, Program], devices: Devices, *, use_tqdm: bool = True
) -> tuple[dict[str, Any], ProgramReport]:
    """Loads programs that an earlier start has left on disk and compiles the others, in parallel
    and with a progress bar; returns the executables by name."""
    report = ProgramReport()
    cache = ProgramCache.configured(devices)
    lock = threading.Lock()

    def build(name: str, program: Program) -> Any:
        times = [time.perf_counter()]
        path, loaded = None, None
        if cache is not None:
            function, arguments, *rest = program
            path = cache.path(name, (function, rest), arguments)
            loaded = None if path is None else cache.load(path)
        times.append(time.perf_counter())
        if loaded is not None:
            with lock:
                report.loaded += 1
                report.load_seconds += times[1] - times[0]
            return loaded
        lowered = lower(program, devices)
        times.append(time.perf_counter())
        compiled = lowered.compile()
        times.append(time.perf_counter())
        if cache is not None and path is not None:
            cache.keep(path, compiled)
        times.append(time.perf_counter())
        with lock:
            report.compiled += 1
            report.lower_seconds += times[2] - times[1]
            report.compile_seconds += times[3] - times[2]
            report.keep_seconds += times[4] - times[3]
        return compiled

    began = time.perf_counter()
    executables: dict[str, Any] = {}
    # Tracing holds the interpreter lock and XLA parallelizes within a program: few threads do.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    bar = tqdm(total=len(programs), desc="Compiling", unit="program", disable=not use_tqdm)
    with bar, pool:
        futures = {pool.submit(build, name, program): name for name, program in programs.items()}
        try:
            for future in as_completed(futures):
                executables[futures[future]] = future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report.seconds = time.perf_counter() - began
    logger.info("%s", report)
    if cache is not None:
        cache.delete_unused()
    return executables, report


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
