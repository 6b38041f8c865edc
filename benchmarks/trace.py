"""What JAX's own profiler saw: arrays on their way to the device, programs, and kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

_DISPATCH = re.compile(r"PjitFunction\((.*)\)")
"""A call of a jitted or compiled function, by the function's name."""
_PUT = "DevicePut"
"""The host has an array brought to the device: begins this name and that with a sharding."""
_COPY = "MemcpyH2D"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of a kernel on a GPU, or one copy."""

    start_ns: float
    duration_ns: float
    name: str


@dataclasses.dataclass
class Trace:
    """Of one profile, complete once :func:`traced` has ended."""

    dispatched: list[str] = dataclasses.field(default_factory=list)
    """Programs that the host dispatched, by name, a thread's one after the other."""
    num_puts: int = 0
    """Arrays that the host gave to JAX to bring to a device, or to pinned memory."""
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    """What a GPU did, copies included, in order."""

    @property
    def num_transfers(self) -> int:
        """Arrays brought to the device: on a GPU those that were copied, on a CPU those that JAX
        was given."""
        copies = sum(kernel.name.startswith(_COPY) for kernel in self.kernels)
        return copies if self.kernels else self.num_puts

    def __str__(self) -> str:
        """For a table: ``2 transfers; dispatched: jit(_write); kernels: ...``."""
        parts = {
            "dispatched": self.dispatched,
            "kernels": [k.name for k in self.kernels if not k.name.startswith(_COPY)],
        }
        told = [f"{part}: {', '.join(names)}" for part, names in parts.items() if names]
        return "; ".join([f"{self.num_transfers} transfers", *told])


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Profiles what is done inside, on all threads. Who wants to know what the device did must wait
    for it inside. A process that has loaded libtpu and has no TPU, as to compile for one, crashes:
    JAX then starts the TPU's profiler, too."""
    trace = Trace()
    options = jax.profiler.ProfileOptions()
    # Every call of Python's would be in it.
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield trace
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    for plane in data.planes:
        for line in plane.lines:
            if "GPU" in plane.name:
                if line.name.startswith("Stream"):
                    trace.kernels += [
                        Kernel(event.start_ns, event.duration_ns, event.name)
                        for event in line.events
                    ]
            else:
                _read_thread(trace, line)
    trace.kernels.sort(key=lambda kernel: kernel.start_ns)


def _read_thread(trace: Trace, line: Any) -> None:
    end = 0.0
    # Of those that begin together the outer one first: JAX records a call twice, one in the other.
    for event in sorted(line.events, key=lambda each: (each.start_ns, -each.duration_ns)):
        call = _DISPATCH.fullmatch(event.name)
        if call and event.start_ns >= end:
            trace.dispatched.append(call[1])
            end = event.start_ns + event.duration_ns
        trace.num_puts += event.name.startswith(_PUT)
