"""Processes that trace and lower programs, where one alone would take long.

Tracing and lowering hold Python's lock, so that threads do not help. Each worker is a Python of its
own on the host's processor (it never touches an accelerator), which is sent what a program is made
of and sends back what it was traced to. Nothing of the caller's script is run again in it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import CancelledError
from pathlib import Path
from typing import IO, Any

import jax
import jax.export

from jaxlora.engine.fingerprint import SOURCES
from jaxlora.engine.kernels import number_alike
from jaxlora.engine.lowering import Description, Exported, Program, lower, lower_exported
from jaxlora.parallel import Devices
from kernels_pallas.dispatch import kind_of

logger = logging.getLogger(__name__)

_LEAST_CORES = 4
_LEAST_PROGRAMS = 8
_MOST_WORKERS = 8
_HERE = 2
"""Threads that trace in this process where there is no worker: the lock lets more only end later,
all at once."""
_MEANWHILE = 2
"""Threads that do so while workers start."""
_OWN_CONFIG = (
    "jax_platforms",
    "jax_cuda_visible_devices",
    "jax_rocm_visible_devices",
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_persistent_cache",
    "jax_pjrt_client",
)
"""What begins so is of the devices or of files on disk, and is no worker's business."""


class _WorkerError(Exception):
    """A worker has ended, or could not do what it was asked; says why."""


def num_workers(num_programs: int, devices: Devices) -> int:
    """How many processes are to lower so many programs.

    On Hopper GPUs only, where tracing kernels takes most of a start, and which is what JAX lowers
    them for where it finds no GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    reasons = {
        # An application's executable would start the application.
        "this is no plain Python": getattr(sys, "frozen", False) or not sys.executable,
        "no program has kernels that take long": kind_of(devices.all[0]) != "hopper",
        f"they are for {devices.count} devices": devices.count > 1,
        f"there are {cores} cores": (cores or 1) < _LEAST_CORES,
        f"they are {num_programs}": num_programs < _LEAST_PROGRAMS,
    }
    for reason, holds in reasons.items():
        if holds:
            logger.info("programs are lowered in this process alone: %s", reason)
            return 0
    return min(_MOST_WORKERS, (cores or 1) // 2, num_programs // 2)


class LoweringWorkers:
    """Lowers programs for some devices, in so many processes and until they have started, or for
    what they cannot do, in this one. As a context manager it leaves no process behind."""

    def __init__(self, count: int, devices: Devices) -> None:
        self._devices = devices
        self._changed = threading.Condition()
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._num_ready = 0
        self._num_here = 0
        self._closed = False
        for _ in range(count):
            try:
                worker = _Worker()
            except OSError as error:
                logger.warning("a process that was to lower programs did not start: %s", error)
                break
            self._workers.append(worker)
        self.num_threads = _HERE + len(self._workers)
        """That may call :meth:`lower` at once."""
        self._num_starting = len(self._workers)
        for worker in self._workers:
            threading.Thread(target=self._start, args=(worker,), daemon=True).start()
        if count:
            # What is lowered here is to be as it is there.
            number_alike()
            logger.info("programs are lowered in %d processes", len(self._workers))

    def __enter__(self) -> LoweringWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, whatever they do; whoever waits for one gets a CancelledError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self._workers:
            worker.kill()

    def lower(self, name: str, program: Program) -> tuple[jax.stages.Lowered, float]:
        """The program, traced for these devices; and the processor time that a worker took."""
        if not self._workers:
            return lower(program, self._devices), 0.0
        asked = Description.of(program, jax.export.default_export_platform())
        worker = self._take()
        try:
            # Here it is done as there, so that a later start recognizes it wherever it was done.
            exported = asked.export() if worker is None else worker.export(asked)
            lowered = lower_exported(exported, program, self._devices)
        except Exception as error:
            if self._closed:
                raise CancelledError from error
            logger.warning("%s is lowered in this process: %s", name, error)
            return lower(program, self._devices), 0.0
        finally:
            self._give_back(worker)
        return lowered, exported.seconds

    def _take(self) -> _Worker | None:
        """A worker that has nothing to do; None while there is none, and this process has a
        thread to spare."""
        with self._changed:
            while not self._closed:
                if self._idle:
                    return self._idle.pop()
                limit = _MEANWHILE if self._num_starting else _HERE
                if not self._num_ready and self._num_here < limit:
                    self._num_here += 1
                    return None
                self._changed.wait()
        raise CancelledError

    def _give_back(self, worker: _Worker | None) -> None:
        with self._changed:
            if worker is None:
                self._num_here -= 1
            elif worker.is_alive():
                self._idle.append(worker)
            else:
                self._num_ready -= 1
            self._changed.notify_all()

    def _start(self, worker: _Worker) -> None:
        try:
            worker.start()
        except _WorkerError as error:
            worker.kill()
            if not self._closed:
                logger.warning("a process that was to lower programs did not start: %s", error)
        with self._changed:
            self._num_starting -= 1
            if worker.is_alive():
                self._num_ready += 1
                self._idle.append(worker)
            self._changed.notify_all()


class _Worker:
    """One process, and the pipes to it."""

    def __init__(self) -> None:
        # What is imported here is imported there, wherever it was found. (Python passes over
        # entries that are no text.)
        entries: list[Any] = sys.path
        known = [path or str(Path.cwd()) for path in entries if isinstance(path, str)]
        paths = json.dumps(known)
        script = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
            f"from {__name__} import main; main(int(sys.argv[2]))"
        )
        # Not a pipe, which would have to be emptied; and nothing of it is for the terminal.
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", script, paths, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
            )
        except OSError:
            self._said.close()
            raise
        self._asking = threading.RLock()

    def start(self) -> None:
        """Returns once it can be asked more. Raises _WorkerError if it cannot."""
        if self._ask(_config()) != SOURCES:
            raise _WorkerError("its source has changed since this process imported it")

    def export(self, asked: Description) -> Exported:
        """Has it trace a program. Raises _WorkerError."""
        exported: Exported = self._ask(asked)
        return exported

    def is_alive(self) -> bool:
        """Whether it can be asked more."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends it, and returns when it has."""
        self._process.kill()
        self._process.wait()
        with self._asking:
            for pipe in (self._process.stdin, self._process.stdout, self._said):
                # What was not sent will not be.
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()

    def _ask(self, asked: Any) -> Any:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            packed = pickle.dumps(asked)
        except Exception as error:
            raise _WorkerError(f"it cannot be sent to another: {error}") from error
        with self._asking:
            try:
                # What cannot be unpickled there is read from the pipe all the same.
                pickle.dump(packed, process.stdin)
                process.stdin.flush()
                answer, problem, trace = pickle.load(process.stdout)
            # The pipe was closed, at either end, or has something else in it: any exception.
            except Exception as ended:
                said = ""
                if not self._said.closed:
                    self._said.seek(0)
                    said = self._said.read().decode(errors="replace").strip()
                self.kill()
                raise _WorkerError(
                    f"another has ended with status {process.returncode}: {said[-2000:]}"
                ) from ended
        if problem is not None:
            logger.debug("%s", trace)
            raise _WorkerError(f"another could not do it: {problem}")
        return answer


def _config() -> dict[str, Any]:
    """What decides how programs are traced besides themselves."""
    return {
        name: value for name, value in jax.config.values.items() if not name.startswith(_OWN_CONFIG)
    }


def _work(asks: IO[bytes], answers: IO[bytes]) -> None:
    """Answers until there is nobody who asks."""
    while True:
        try:
            packed = pickle.load(asks)
        except EOFError:
            return
        try:
            answer: tuple[Any, ...] = _answer(pickle.loads(packed)), None, None
        except Exception as error:  # noqa: BLE001 - whatever it is, the one who asks can do without
            answer = None, f"{type(error).__name__}: {error}", traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


def _answer(asked: dict[str, Any] | Description) -> Exported | str:
    if isinstance(asked, Description):
        began = time.process_time()
        return asked.export()._replace(seconds=time.process_time() - began)
    # These take long the first time; and some of the configuration is that of Pallas.
    for module in ("jaxlora.engine.forward", "jax.experimental.pallas.mosaic_gpu"):
        importlib.import_module(module)
    for name, value in asked.items():
        # Raises what is unknown here, and so cannot be as it is there.
        if name not in jax.config.values or jax.config.values[name] != value:
            jax.config.update(name, value)
    number_alike()
    jax.devices()
    return SOURCES


def _end_after(parent: int) -> None:
    """Ends this process when its parent has ended, which may be without a word (as by Ctrl-C)."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main(parent: int) -> None:
    """A worker: asked on its standard input, answers on its standard output, for the process of
    this id."""
    # Ctrl-C is for that one, which ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    # Before any device is made: the accelerator is the other's.
    jax.config.update("jax_platforms", "cpu")
    gc.disable()
    answers = os.fdopen(os.dup(1), "wb")
    # Whatever else is printed is no answer.
    os.dup2(2, 1)
    _work(sys.stdin.buffer, answers)
