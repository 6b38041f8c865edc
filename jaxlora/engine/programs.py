"""Everything that is ever compiled: listed, then compiled ahead of time in parallel threads.

A program is called as the executable it was compiled to, so a call with another shape is an error
and never a compilation. Executables are kept on disk for the next start
(:mod:`jaxlora.engine.program_cache`), beside what JAX's persistent cache has of everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import platformdirs
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from jaxlora.engine.lowering import Program
from jaxlora.engine.lowering_workers import LoweringWorkers, num_workers
from jaxlora.engine.program_cache import ProgramCache
from jaxlora.parallel import Devices

logger = logging.getLogger(__name__)

_NO_JAX_CACHE = threading.Lock()
"""One engine at a time does without."""
_NUM_THREADS = min(16, os.cpu_count() or 1)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


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
    """Tracing and lowering in this process, which hold the interpreter lock for the most part:
    processor time."""
    worker_seconds: float = 0.0
    """Tracing in other processes: processor time."""
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
            f"{self.lower_seconds:.1f} s and in other processes {self.worker_seconds:.1f} s, XLA "
            f"{self.compile_seconds:.1f} s, writing {self.keep_seconds:.1f} s)"
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
    with tqdm(total=len(programs), desc="Compiling", unit="program", disable=not use_tqdm) as bar:
        executables: dict[str, Any] = {}
        tasks = [_Task(name, program, report, cache) for name, program in programs.items()]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            for task, executable in zip(tasks, pool.map(_Task.load, tasks), strict=True):
                if executable is not None:
                    executables[task.name] = executable
                    bar.update()
        missing = [task for task in tasks if task.name not in executables]
        if missing:
            without = contextlib.nullcontext() if cache is None else _jax_cache_off()
            built = _build(missing, devices, after, without)
            for name, executable in built:
                executables[name] = executable
                bar.update()
    if cache is not None:
        cache.delete_unused()
    report.seconds = time.perf_counter() - began
    logger.info("%s", report)
    return executables, report


@dataclasses.dataclass
class _Task:
    """A program on its way to its executable; each method is for one thread."""

    name: str
    program: Program
    report: ProgramReport
    cache: ProgramCache | None
    link: Path | None = None
    """What leads to the executable; None for a program that is not kept."""
    path: Path | None = None
    """Where the executable is, once that is known."""
    lowered: jax.stages.Lowered | None = None
    """Until it is compiled."""
    unkept: jax.stages.Compiled | None = None
    """What was compiled, until it is written."""

    def load(self) -> Any | None:
        """The executable that an earlier start has left, if there is one."""
        if self.cache is None:
            return None
        function, arguments, *rest = self.program
        with self.report.timed("load_seconds"):
            self.link = self.cache.by_content(self.name, (function, rest), arguments)
            path = None if self.link is None else self.cache.follow(self.link)
            executable = None if path is None else self.cache.load(path)
        if executable is not None:
            self.report.add("loaded")
        return executable

    def lower(self, workers: LoweringWorkers) -> Any | None:
        """Traces and lowers; the executable, if an earlier start has compiled the same."""
        with self.report.timed("lower_seconds", time.thread_time):
            self.lowered, worker_seconds = workers.lower(self.name, self.program)
        self.report.add("worker_seconds", worker_seconds)
        if self.cache is None or self.link is None:
            return None
        with self.report.timed("load_seconds"):
            self.path = self.cache.by_lowered(
                self.name, self.lowered, self.program.arguments, self.program.options
            )
            executable = self.cache.load(self.path)
        if executable is not None:
            self.lowered = None
            self.report.add("recognized")
            self.cache.link(self.link, self.path)
        return executable

    def compile(self) -> Any:
        """Compiles what was lowered."""
        assert self.lowered is not None
        with self.report.timed("compile_seconds"):
            executable = self.lowered.compile(dict(self.program.options))
        self.report.add("compiled")
        self.lowered = None
        if self.path is not None:
            self.unkept = executable
        return executable

    def keep(self) -> None:
        """Writes what was compiled, for the next start."""
        assert self.cache is not None
        assert self.link is not None
        assert self.path is not None
        assert self.unkept is not None
        with self.report.timed("keep_seconds"):
            self.cache.keep(self.path, self.unkept)
            self.cache.link(self.link, self.path)
        self.unkept = None


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


class _Stage:
    """Something that is done to each task, by threads of its own."""

    def __init__(self, work: Callable[[_Task], Any], num_threads: int) -> None:
        self.waiting: list[_Task] = []
        """Until :meth:`start`."""
        self.running: dict[Future[Any], _Task] = {}
        self.pool = ThreadPoolExecutor(num_threads)
        self._work = work

    def start(self) -> None:
        """Lets the threads begin with those that wait."""
        self.running |= {self.pool.submit(self._work, task): task for task in self.waiting}
        self.waiting = []

    def ended(self) -> list[tuple[_Task, Any]]:
        """Those that it was done to since this was last called, and what was returned. Raises what
        one of them raised."""
        done = [future for future in self.running if future.done()]
        return [(self.running.pop(future), future.result()) for future in done]

    def is_busy(self) -> bool:
        """Whether any task waits or is run."""
        return bool(self.waiting or self.running)


def _build(
    tasks: list[_Task],
    devices: Devices,
    after: Future[Any] | None,
    compiling_under: contextlib.AbstractContextManager[None],
) -> Iterator[tuple[str, Any]]:
    """Executables by name, in the order in which they are done. The first that fails ends all."""
    workers = LoweringWorkers(num_workers(len(tasks), devices), devices)
    lowering = _Stage(lambda task: task.lower(workers), workers.num_threads)
    compiling = _Stage(_Task.compile, _NUM_THREADS)
    # One compresses while the other has the lock.
    keeping = _Stage(_Task.keep, 2)
    stages = (lowering, compiling, keeping)
    lowering.waiting = tasks
    before = [after or _done()]
    with contextlib.ExitStack() as ends:
        ends.enter_context(_garbage_kept())
        for stage in stages:
            ends.enter_context(stage.pool)
        # It ends before those threads, which may wait for it.
        ends.enter_context(workers)
        try:
            lowering.start()
            while before or any(stage.is_busy() for stage in stages):
                if before and before[0].done():
                    before.pop().result()
                    ends.enter_context(compiling_under)
                if not before:
                    compiling.start()
                # Writing holds the lock, too: it waits until XLA, which does not, is all there is.
                if not lowering.running:
                    workers.close()
                    keeping.start()
                running = [future for stage in stages for future in stage.running]
                wait(running + before, return_when=FIRST_COMPLETED)
                for task, executable in lowering.ended():
                    if executable is None:
                        compiling.waiting.append(task)
                    else:
                        yield task.name, executable
                for task, executable in compiling.ended():
                    if task.unkept is not None:
                        keeping.waiting.append(task)
                    yield task.name, executable
                keeping.ended()
        except BaseException:
            for stage in stages:
                stage.pool.shutdown(wait=False, cancel_futures=True)
            raise


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
