"""Programs on their way to executables: lowered, their kernels compiled, compiled, kept.

Each stage has threads of its own; what may run beside what is decided here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from tqdm import tqdm

from jaxlora.engine.kernels import Kernel, compile_kernel, take_kernels
from jaxlora.engine.lowering import Program
from jaxlora.engine.lowering_workers import LoweringWorkers, num_workers
from jaxlora.engine.program_cache import ProgramCache
from jaxlora.engine.program_report import ProgramReport
from jaxlora.parallel import Devices

NUM_THREADS = min(16, os.cpu_count() or 1)
T = TypeVar("T")


@dataclasses.dataclass
class Task:
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
    kernels: dict[bytes, Kernel] = dataclasses.field(default_factory=dict)
    """What it calls, by their hashes: to be compiled before."""
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
        self.kernels = take_kernels(self.lowered)
        if self.cache is not None and self.link is not None:
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
        return None

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


class _Stage(Generic[T]):
    """Something that is done to each of some things, by threads of its own."""

    def __init__(self, work: Callable[[T], Any], num_threads: int) -> None:
        self.waiting: list[T] = []
        """The next one first."""
        self.running: dict[Future[Any], T] = {}
        self.pool = ThreadPoolExecutor(num_threads)
        self._work = work
        self._num_threads = num_threads

    def start(self) -> None:
        """Gives those that wait to threads that have nothing to do."""
        idle = self._num_threads - len(self.running)
        begin, self.waiting = self.waiting[:idle], self.waiting[idle:]
        self.running |= {self.pool.submit(self._work, thing): thing for thing in begin}

    def ended(self) -> list[tuple[T, Any]]:
        """Those that it was done to since this was last called, and what was returned. Raises what
        one of them raised."""
        done = [future for future in self.running if future.done()]
        return [(self.running.pop(future), future.result()) for future in done]

    def is_busy(self) -> bool:
        """Whether anything waits or is run."""
        return bool(self.waiting or self.running)


class Pipeline:
    """Makes executables of programs. XLA, which times what it has made on the device, starts once
    ``after`` is done, and raises what it has raised. The bar counts programs and kernels."""

    def __init__(
        self,
        tasks: list[Task],
        devices: Devices,
        after: Future[Any] | None,
        report: ProgramReport,
        bar: tqdm[Any],
    ) -> None:
        self._report, self._bar = report, bar
        self._before = [] if after is None else [after]
        self._workers = LoweringWorkers(num_workers(len(tasks), devices), devices)
        self._lowering = _Stage(self._lower, self._workers.num_threads)
        self._kernels = _Stage(self._compile_kernel, NUM_THREADS)
        self._compiling = _Stage(Task.compile, NUM_THREADS)
        # One compresses while the other has the lock.
        self._keeping = _Stage(Task.keep, 2)
        self._stages: tuple[_Stage[Any], ...]
        self._stages = (self._lowering, self._kernels, self._compiling, self._keeping)
        # The largest take the longest: they are at the end, but for small ones, which are lowered
        # here while workers start.
        self._lowering.waiting = tasks[::-1]
        self._found: set[bytes] = set()
        self._with_kernels: list[Task] = []
        """Programs that have kernels, until all of these are compiled."""
        self._executables: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Executables by name. The first that fails ends all."""
        with contextlib.ExitStack() as ends:
            ends.enter_context(_garbage_kept())
            for stage in self._stages:
                ends.enter_context(stage.pool)
            # It ends before those threads, which may wait for it.
            ends.enter_context(self._workers)
            try:
                while self._is_busy():
                    self._start()
                    running = [future for stage in self._stages for future in stage.running]
                    wait(running + self._before, return_when=FIRST_COMPLETED)
                    if self._before and self._before[0].done():
                        self._before.pop().result()
                    self._take()
            except BaseException:
                for stage in self._stages:
                    stage.pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self._executables

    def _is_busy(self) -> bool:
        left = self._before or self._with_kernels
        return bool(left) or any(stage.is_busy() for stage in self._stages)

    def _start(self) -> None:
        """Starts what may run beside what runs."""
        self._lowering.start()
        lowered = not self._lowering.is_busy()
        if lowered:
            self._workers.close()
            # Writing holds the interpreter lock, as lowering does.
            self._keeping.start()
        # Whoever compiles a kernel waits for those who compile programs, and they for him, so they
        # take turns: the programs without kernels as they come, then all kernels, then the rest.
        # While programs have to wait it is the kernels' turn anyway.
        is_turn = lowered or bool(self._before)
        if self._kernels.running or (self._kernels.waiting and is_turn):
            if not self._compiling.running:
                self._kernels.start()
        elif not self._before:
            if lowered:
                self._compiling.waiting += self._with_kernels
                self._with_kernels = []
            self._compiling.start()

    def _take(self) -> None:
        """Takes what has ended to what is next."""
        for task, executable in self._lowering.ended():
            if executable is not None:
                self._finish(task, executable)
                continue
            new = task.kernels.keys() - self._found
            self._found |= new
            self._kernels.waiting += [task.kernels[digest] for digest in new]
            # They wait for each other, too: those that are compiled at once should take as long.
            self._kernels.waiting.sort(key=lambda kernel: len(kernel["module"]), reverse=True)
            self._bar.total = (self._bar.total or 0) + len(new)
            (self._with_kernels if task.kernels else self._compiling.waiting).append(task)
        for _ in self._kernels.ended():
            self._report.add("kernels")
            self._bar.update()
        for task, executable in self._compiling.ended():
            if task.unkept is not None:
                self._keeping.waiting.append(task)
            self._finish(task, executable)
        self._keeping.ended()

    def _finish(self, task: Task, executable: Any) -> None:
        self._executables[task.name] = executable
        self._bar.update()

    def _lower(self, task: Task) -> Any | None:
        return task.lower(self._workers)

    def _compile_kernel(self, kernel: Kernel) -> None:
        with self._report.timed("kernel_seconds"):
            compile_kernel(kernel)


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
