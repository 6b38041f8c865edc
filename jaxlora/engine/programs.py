"""Everything that is ever compiled: listed, then compiled ahead of time in parallel threads.

A program is called as the executable it was compiled to, so a call with another shape is an error
and never a compilation. Executables are kept on disk for the next start
(:mod:`jaxlora.engine.program_cache`), beside what JAX's persistent cache has of everything else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.monitoring
import platformdirs
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from jaxlora.engine.lowering import Program
from jaxlora.engine.program_cache import ProgramCache
from jaxlora.engine.program_pipeline import NUM_THREADS, Pipeline, Task
from jaxlora.engine.program_report import ProgramReport
from jaxlora.parallel import Devices

logger = logging.getLogger(__name__)

_NO_JAX_CACHE = threading.Lock()
"""One engine at a time does without."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def compile_all(
    programs: dict[str, Program],
    devices: Devices,
    *,
    use_tqdm: bool = True,
    after: Future[Any] | None = None,
) -> tuple[dict[str, Any], ProgramReport]:
    """Loads programs that an earlier start has left on disk and compiles the others, in parallel
    and with a progress bar; returns the executables by name.

    XLA, which chooses kernels by timing them on the device, starts once ``after`` is done, and
    raises what it has raised; loading, tracing and lowering do not wait.
    """
    report = ProgramReport()
    began = time.perf_counter()
    cache = ProgramCache.configured(devices)
    with tqdm(total=len(programs), desc="Compiling", unit="it", disable=not use_tqdm) as bar:
        executables: dict[str, Any] = {}
        tasks = [Task(name, program, report, cache) for name, program in programs.items()]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for task, executable in zip(tasks, pool.map(Task.load, tasks), strict=True):
                if executable is not None:
                    executables[task.name] = executable
                    bar.update()
        missing = [task for task in tasks if task.name not in executables]
        if missing:
            with contextlib.nullcontext() if cache is None else _jax_cache_off():
                executables |= Pipeline(missing, devices, after, report, bar).run()
    if cache is not None:
        cache.delete_unused()
    report.seconds = time.perf_counter() - began
    logger.info("%s", report)
    return executables, report


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
