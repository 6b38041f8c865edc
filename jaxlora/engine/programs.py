"""Everything that is ever compiled: listed, then compiled ahead of time in parallel threads.

A program is called as the executable it was compiled to, so a call with another shape is an error
and never a compilation. Executables are kept on disk for the next start
(:mod:`jaxlora.engine.program_cache`), beside what JAX's persistent cache has of everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
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

_NO_JAX_CACHE = threading.Lock()
"""One engine at a time does without."""
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
    """What became of a start's programs. Seconds of work are those of all threads together."""

    loaded: int = 0
    """Programs whose executable was on disk."""
    recognized: int = 0
    """Programs that had to be traced and lowered, and then were what an earlier start has
    compiled."""
    compiled: int = 0
    load_seconds: float = 0.0
    lower_seconds: float = 0.0
    """Tracing and lowering, which hold the interpreter lock for the most part: processor time."""
    compile_seconds: float = 0.0
    keep_seconds: float = 0.0
    """Writing executables for the next start."""
    seconds: float = 0.0
    """From beginning to end."""
    _lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

    def __str__(self) -> str:
        """For logs."""
        return (
            f"{self.loaded + self.recognized + self.compiled} programs in {self.seconds:.1f} s: "
            f"{self.loaded} loaded, {self.recognized} lowered and loaded, {self.compiled} compiled "
            f"(in all threads: loading {self.load_seconds:.1f} s, lowering "
            f"{self.lower_seconds:.1f} s, XLA {self.compile_seconds:.1f} s, writing "
            f"{self.keep_seconds:.1f} s)"
        )

    @contextlib.contextmanager
    def timed(self, what: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """Adds the seconds that pass to a field; any thread may."""
        began = clock()
        yield
        self.add(what, clock() - began)

    def add(self, what: str, amount: float = 1) -> None:
        """Adds to a field; any thread may."""
        with self._lock:
            setattr(self, what, getattr(self, what) + amount)


def compile_all(
    programs: dict[str, Program], devices: Devices, *, use_tqdm: bool = True
) -> tuple[dict[str, Any], ProgramReport]:
    """Loads programs that an earlier start has left on disk and compiles the others, in parallel
    and with a progress bar; returns the executables by name."""
    report = ProgramReport()
    began = time.perf_counter()
    cache = ProgramCache.configured(devices)
    with tqdm(total=len(programs), desc="Compiling", unit="program", disable=not use_tqdm) as bar:
        links, executables = {}, {}
        if cache is not None:
            for name, (function, arguments, *rest) in programs.items():
                links[name] = cache.by_content(name, (function, rest), arguments)
            load = functools.partial(_load, cache, report)
            executables = _in_parallel(load, {n: (at,) for n, at in links.items() if at}, bar)
        missing = {
            name: (name, program, links.get(name))
            for name, program in programs.items()
            if name not in executables
        }
        with contextlib.ExitStack() as meanwhile:
            if cache is not None and missing:
                meanwhile.enter_context(_jax_cache_off())
            meanwhile.enter_context(_garbage_kept())
            build = functools.partial(_build, cache, report, devices)
            executables |= _in_parallel(build, missing, bar)
    if cache is not None:
        cache.delete_unused()
    report.seconds = time.perf_counter() - began
    logger.info("%s", report)
    return executables, report


def _load(cache: ProgramCache, report: ProgramReport, link: Path) -> Any | None:
    with report.timed("load_seconds"):
        path = cache.follow(link)
        loaded = None if path is None else cache.load(path)
    if loaded is not None:
        report.add("loaded")
    return loaded


def _build(
    cache: ProgramCache | None,
    report: ProgramReport,
    devices: Devices,
    name: str,
    program: Program,
    link: Path | None,
) -> Any:
    with report.timed("lower_seconds", time.thread_time):
        lowered = lower(program, devices)
    if cache is None or link is None:
        return _compile(report, lowered)
    with report.timed("load_seconds"):
        path = cache.by_lowered(name, lowered, program.arguments)
        executable = cache.load(path)
    if executable is not None:
        report.add("recognized")
    else:
        executable = _compile(report, lowered)
        with report.timed("keep_seconds"):
            cache.keep(path, executable)
    cache.link(link, path)
    return executable


def _compile(report: ProgramReport, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    with report.timed("compile_seconds"):
        compiled = lowered.compile()
    report.add("compiled")
    return compiled


def _in_parallel(
    function: Callable[..., Any], calls: dict[str, tuple[Any, ...]], bar: tqdm[Any]
) -> dict[str, Any]:
    """What the calls return by name, without None. The first that fails ends them all."""
    results = {}
    # Tracing holds the interpreter lock and XLA parallelizes within a program: few threads do.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(function, *call): name for name, call in calls.items()}
        try:
            for future in as_completed(futures):
                if (result := future.result()) is not None:
                    results[futures[future]] = result
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


@contextlib.contextmanager
def _jax_cache_off() -> Iterator[None]:
    """Programs are not looked for in JAX's cache meanwhile: an executable from there cannot be kept
    in ours, and everything it has of programs is in ours."""
    with _NO_JAX_CACHE:
        jax.config.update("jax_enable_compilation_cache", False)
        # Once in use, the cache is used until it is reset, whatever the configuration says.
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Tracing makes millions of objects and hardly a cycle: looking for cycles is a tenth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
