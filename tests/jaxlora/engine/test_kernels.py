"""Kernels apart from their programs: which they are, and in which order all are compiled.

That programs find them is tested where there is a GPU (test_start.py and test_gpu.py)."""

from __future__ import annotations

import functools
import io
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from jaxlora.engine import program_pipeline
from jaxlora.engine.kernels import Kernel, lower_kernel, number_alike, take_kernels
from jaxlora.engine.lowering import Program
from jaxlora.engine.program_cache import ProgramCache
from jaxlora.engine.programs import compile_all
from jaxlora.parallel import Devices
from tests.jaxlora.engine.test_lowering_workers import engine_programs, traced

DEVICES = Devices.first(1)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """A kernel of the sort that Mosaic GPU compiles."""

    def body(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = x_ref[...] * factor

    return plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


@functools.partial(jax.jit, static_argnames="factor")
def layer(x: jax.Array, factor: float) -> jax.Array:
    """As a model's layers are: traced once, whatever calls it."""
    return scaled(x, factor) + 1


def for_cuda(function: Any) -> jax.stages.Lowered:
    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    return jax.jit(function).trace(x).lower(lowering_platforms=("cuda",))


def test_a_kernel_is_found_once_and_leaves_its_hash() -> None:
    lowered = for_cuda(lambda x: layer(layer(layer(x, 2.0), 3.0), 2.0))
    whole = lowered.as_text()
    kernels = take_kernels(lowered)
    assert len(kernels) == 2
    for digest, kernel in kernels.items():
        assert kernel["kernel_hash"] == digest
        assert len(kernel["module"]) > 1000
    left = lowered.as_text()
    assert left.count("kernel_hash") == whole.count("kernel_hash")
    assert len(whole) - len(left) > sum(len(kernel["module"]) for kernel in kernels.values())
    # What was taken is what a program of its own is made of.
    for digest, kernel in kernels.items():
        assert take_kernels(lower_kernel(kernel)) == {digest: kernel}


def test_what_is_lowered_again_is_the_same() -> None:
    """Though JAX 0.11 numbers kernels as it lowers them."""
    number_alike()
    texts, kernels = [], []
    for _ in range(2):
        lowered = for_cuda(lambda x: layer(x, 2.0))
        kernels.append(take_kernels(lowered))
        texts.append(lowered.as_text())
    assert texts[0] == texts[1]
    assert kernels[0] == kernels[1]


def test_a_modules_number_is_no_part_of_it() -> None:
    found = []
    for number, name in ((1007, "sum"), (1234, "sum"), (1007, "product")):
        with ir.Context() as context, ir.Location.unknown():
            context.allow_unregistered_dialects = True
            module = ir.Module.create()
            module.operation.attributes["mosaic_gpu.dump_basename"] = ir.StringAttr.get(
                f"{name}_{number}"
            )
            written = io.BytesIO()
            module.operation.write_bytecode(written)
        told = {"module": written.getvalue(), "kernel_hash": b"", "use_custom_barrier": False}
        (digest,) = take_kernels(lower_kernel(told))
        found.append(digest)
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_program_without_kernels_is_left_alone() -> None:
    lowered = for_cuda(lambda x: x + 1)
    whole = lowered.as_text()
    assert take_kernels(lowered) == {}
    assert lowered.as_text() == whole


def test_an_engines_programs_have_kernels_in_common() -> None:
    programs = engine_programs("hopper", "bfloat16")
    lowered = {}
    for name in ("decode 8", "decode lora 8"):
        lowered[name] = take_kernels(traced(programs[name]).lower(lowering_platforms=("cuda",)))
    base, lora = lowered.values()
    assert base.keys() & lora.keys()
    assert lora.keys() - base.keys()


class Compiler:
    """Says that programs have kernels, and notes what is compiled when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernels: dict[str, list[str]]) -> None:
        self.events: list[str] = []
        self.failing = ""
        self._kernels = kernels
        self._lock = threading.Lock()
        self._running = {"kernel": 0, "program": 0}
        compile_program = program_pipeline.Task.compile
        monkeypatch.setattr(program_pipeline, "take_kernels", self._take)
        monkeypatch.setattr(program_pipeline, "compile_kernel", self._compile_kernel)

        def compile_noted(task: program_pipeline.Task) -> Any:
            return self._noted("program", task.name, lambda: compile_program(task))

        monkeypatch.setattr(program_pipeline.Task, "compile", compile_noted)

    def _take(self, lowered: jax.stages.Lowered) -> dict[bytes, Kernel]:
        (name,) = (name for name in self._kernels if f"@jit_{name}" in lowered.as_text())
        return {
            kernel.encode(): {"kernel_hash": kernel.encode(), "module": b"of " + kernel.encode()}
            for kernel in self._kernels[name]
        }

    def _compile_kernel(self, kernel: Kernel) -> None:
        name = kernel["kernel_hash"].decode()
        if name == self.failing:
            raise ValueError(f"{name} cannot be compiled")
        self._noted("kernel", name, lambda: time.sleep(0.05))

    def _noted(self, kind: str, name: str, work: Any) -> Any:
        with self._lock:
            self._running[kind] += 1
            assert not all(self._running.values()), "a kernel and a program at once"
        result = work()
        with self._lock:
            self._running[kind] -= 1
            self.events.append(name)
        return result


def plain(x: jax.Array) -> jax.Array:
    return x + 1


def one(x: jax.Array) -> jax.Array:
    return x + 2


def two(x: jax.Array) -> jax.Array:
    return x + 3


PROGRAMS = {function.__name__: Program(function, (jnp.zeros(3),)) for function in (one, two, plain)}
KERNELS = {"one": ["a", "b"], "two": ["b", "c"], "plain": []}


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setattr(ProgramCache, "configured", lambda _: None)
    return Compiler(monkeypatch, KERNELS)


def test_kernels_are_compiled_once_and_before_their_programs(compiler: Compiler) -> None:
    executables, report = compile_all(PROGRAMS, DEVICES, use_tqdm=False)
    assert sorted(compiler.events) == ["a", "b", "c", "one", "plain", "two"]
    first = min(compiler.events.index(name) for name in ("one", "two"))
    assert {"a", "b", "c"} <= set(compiler.events[:first])
    assert (report.kernels, report.compiled) == (3, 3)
    assert report.kernel_seconds >= 0.15
    assert "3 kernels" in str(report)
    assert [int(executables[name](jnp.zeros(3))[0]) for name in PROGRAMS] == [2, 3, 1]


def test_kernels_do_not_wait_for_what_programs_wait_for(compiler: Compiler) -> None:
    """Weights may take long."""
    loaded = Future[None]()

    def load() -> None:
        while not {"a", "b", "c"} <= set(compiler.events):
            time.sleep(0.01)
        compiler.events.append("weights")
        loaded.set_result(None)

    thread = threading.Thread(target=load)
    thread.start()
    compile_all(PROGRAMS, DEVICES, use_tqdm=False, after=loaded)
    thread.join()
    assert compiler.events[3] == "weights"


def test_a_kernel_that_does_not_compile_ends_the_start(compiler: Compiler) -> None:
    compiler.failing = "b"
    with pytest.raises(ValueError, match="b cannot be compiled"):
        compile_all(PROGRAMS, DEVICES, use_tqdm=False)
    assert not {"one", "two"} & set(compiler.events)
