"""Executables on disk: which program is taken for which, and what becomes of those that are not."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlora.adapters import base_weights
from jaxlora.config import ModelConfig
from jaxlora.engine import program_cache
from jaxlora.engine.fingerprint import UnknownInputError, described, described_arguments
from jaxlora.engine.forward import ForwardSetup
from jaxlora.engine.lowering import Program, lower
from jaxlora.engine.program_cache import ProgramCache
from jaxlora.engine.programs import CompilationCounter, compile_all
from jaxlora.engine.row_state import empty_state, write_row
from jaxlora.models.lora import groups
from jaxlora.models.weights import weight_shapes
from jaxlora.parallel import Devices
from kernels_pallas.lora_linear.op import Implementation
from kernels_pallas.lora_matmul import reference
from kernels_pallas.paged_attention.reference import NARROW_IMPLEMENTATION, WIDE_IMPLEMENTATION
from tests.jaxlora.tiny_config import TINY

DEVICES = Devices.first(1)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path) -> Iterator[Path]:
    """A cache of this test's own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def program(rows: int = 3, donated: tuple[int, ...] = (0,)) -> Program:
    state = DEVICES.put(empty_state(rows, 64))
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    return Program(write_row, (state, np.asarray(0, np.int32), row), donated=donated)


def build(**programs: Program) -> tuple[dict[str, Any], tuple[int, int, int]]:
    executables, report = compile_all(programs, DEVICES, use_tqdm=False)
    return executables, (report.loaded, report.recognized, report.compiled)


# What is loaded


def test_a_loaded_program_is_no_compilation_and_overwrites_what_it_may() -> None:
    (first, counts), compilations = build(a=program()), CompilationCounter()
    assert counts == (0, 0, 1)
    second, counts = build(a=program())
    assert counts == (1, 0, 0)
    assert compilations.total == 0

    memory = second["a"].memory_analysis()
    assert memory.alias_size_in_bytes == first["a"].memory_analysis().alias_size_in_bytes > 0
    state, at, row = program().arguments
    row = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), row)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    after = second["a"](state, at, row)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after)] == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for leaf in jax.tree.leaves(after):
        np.testing.assert_array_equal(leaf[0], np.ones(leaf.shape[1:]))


def test_a_loaded_program_refuses_another_shape() -> None:
    build(a=program())
    loaded, _ = build(a=program())
    compilations = CompilationCounter()
    with pytest.raises(TypeError, match="compiled"):
        loaded["a"](*program(rows=4).arguments)
    assert compilations.total == 0


@pytest.mark.parametrize(
    "other",
    [
        {"b": program()},
        {"a": program(rows=4)},
        {"a": program(donated=())},
        {"a": program()._replace(options={"xla_backend_optimization_level": "1"})},
    ],
    ids=["name", "shape", "donation", "options"],
)
def test_another_program_is_compiled(other: dict[str, Program]) -> None:
    build(a=program())
    assert build(**other)[1] == (0, 0, 1)


@pytest.mark.parametrize(
    ("name", "value"), [("jax_default_matmul_precision", "default"), ("jax_enable_checks", True)]
)
def test_another_configuration_compiles(name: str, value: Any) -> None:
    build(a=program())
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        assert build(a=program())[1] == (0, 0, 1)
    finally:
        jax.config.update(name, before)
    assert build(a=program())[1] == (1, 0, 0)


def test_other_flags_of_xla_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    build(a=program())
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert build(a=program())[1] == (0, 0, 1)


def test_a_program_of_other_source_that_lowers_to_the_same_is_recognized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = build(a=program())
    monkeypatch.setattr(program_cache, "SOURCES", "changed")
    compilations = CompilationCounter()
    second, counts = build(a=program())
    assert counts == (0, 1, 0)
    assert compilations.total == 0
    assert second["a"].out_tree == first["a"].out_tree
    assert build(a=program())[1] == (1, 0, 0)


def test_what_jax_has_cached_is_compiled_once_more() -> None:
    """XLA:CPU cannot write an executable that it has read: what it calls would be missing."""
    weight, block = DEVICES.put(np.ones((96, 64), np.float32)), np.ones((96, 64), np.float32)
    compared = Program(base_weights._has_rows, (weight, block, np.asarray(0, np.int32)))
    for _ in range(2):
        lower(compared, DEVICES).compile()
    for counts in ((0, 0, 1), (1, 0, 0)):
        executables, found = build(a=compared)
        assert found == counts
        assert executables["a"](*compared.arguments)


def test_jax_caches_other_programs_as_before(directory: Path) -> None:
    build(a=program())
    before = set(directory.iterdir())
    jax.jit(lambda x: 11 * x - 5).lower(np.zeros(3, np.float32)).compile()
    assert set(directory.iterdir()) > before
    assert jax.config.values["jax_enable_compilation_cache"]


# What is kept


def test_a_function_of_unknown_source_is_not_kept(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    x = jnp.zeros(3)
    for _ in range(2):
        assert build(a=Program(lambda x: x + 1, (x,)))[1] == (0, 0, 1)
    assert list((directory / "executables").iterdir()) == []
    assert "a is compiled at every start: it runs" in caplog.text


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_may_write_to_is_not_used(
    mode: int, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(a=program())
    (directory / "executables").chmod(mode)
    assert build(a=program())[1] == (0, 0, 1)
    assert "can run any code" in caplog.text
    (directory / "executables").chmod(0o700)
    assert build(a=program())[1] == (1, 0, 0)


def test_where_there_is_no_cache_all_is_compiled(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    jax.config.update("jax_compilation_cache_dir", None)
    assert ProgramCache.configured(DEVICES) is None
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert ProgramCache.configured(DEVICES) is None
    assert "local folders only, not in gs://bucket/cache" in caplog.text


def test_a_folder_that_cannot_be_made_is_no_error(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory.write_text("a file")
    assert ProgramCache.configured(DEVICES) is None
    assert "executables are not kept" in caplog.text


def test_an_executable_that_cannot_be_written_is_no_error(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ProgramCache.configured(DEVICES)
    assert cache is not None
    (directory / "executables").rmdir()
    cache.keep(directory / "executables" / "a", jax.jit(jnp.sin).lower(jnp.zeros(3)).compile())
    assert "could not be kept" in caplog.text


def test_an_executable_of_another_jax_is_compiled_again(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, under the right name, and yet it does not load."""
    monkeypatch.setattr("pickle.dumps", lambda _: b"not a pickle")
    build(a=program())
    monkeypatch.undo()
    assert build(a=program())[1] == (0, 0, 1)
    assert caplog.text.count("does not load") == 1
    assert build(a=program())[1] == (1, 0, 0)


def test_many_may_write_and_read_one_executable_at_once(directory: Path) -> None:
    executables, _ = build(a=program())
    cache = ProgramCache.configured(DEVICES)
    assert cache is not None
    (path,) = (directory / "executables").glob("a-lowered-*")
    before = set((directory / "executables").iterdir())
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(cache.keep, path, executables["a"]) for _ in range(20)]
        loads = [pool.submit(cache.load, path) for _ in range(20)]
        assert all(load.result() is not None for load in loads)
        assert [write.result() for write in writes] == [None] * 20
    assert set((directory / "executables").iterdir()) == before


def test_what_no_start_loads_for_long_is_deleted(directory: Path) -> None:
    build(a=program(), b=program())
    paths = set((directory / "executables").iterdir())
    for path in paths:
        os.utime(path, (0, time.time() - 31 * 86400))
    # This one is loaded, and so it stays.
    assert build(a=program())[1] == (1, 0, 0)
    stayed = set((directory / "executables").iterdir())
    assert stayed == {path for path in paths if path.name.startswith("a-")}
    assert len(stayed) == 2


def test_nothing_is_written_while_a_program_is_traced(directory: Path) -> None:
    """Both hold the interpreter lock, and XLA waits for the tracing."""
    go_on = threading.Event()

    def slow(x: jax.Array) -> jax.Array:
        assert go_on.wait(300)
        return x + 1

    compilations = CompilationCounter()
    programs = {"a": program(), "slow": Program(slow, (jnp.zeros(3),))}
    compilations.total = 0
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(compile_all, programs, DEVICES, use_tqdm=False)
        while compilations.total == 0:
            time.sleep(0.01)
        time.sleep(0.3)
        assert list((directory / "executables").iterdir()) == []
        go_on.set()
        started.result()
    assert len(list((directory / "executables").iterdir())) == 2
    assert build(a=program())[1] == (1, 0, 0)


# Beside the loading of weights


def test_xla_waits_for_what_tracing_need_not() -> None:
    loading: Future[None] = Future()
    traced = threading.Event()

    def function(x: jax.Array) -> jax.Array:
        traced.set()
        return x + 1

    x = jnp.zeros(3)
    compilations = CompilationCounter()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(
            compile_all, {"a": Program(function, (x,))}, DEVICES, use_tqdm=False, after=loading
        )
        assert traced.wait(300)
        assert not started.done()
        assert compilations.total == 0
        loading.set_result(None)
        executables, report = started.result()
    assert report.compiled == compilations.total == 1
    assert executables["a"](x).tolist() == [1, 1, 1]


def test_what_fails_beside_is_raised_and_nothing_is_compiled() -> None:
    loading: Future[None] = Future()
    loading.set_exception(ValueError("no such tensor"))
    compilations = CompilationCounter()
    with pytest.raises(ValueError, match="no such tensor"):
        compile_all({"a": program()}, DEVICES, use_tqdm=False, after=loading)
    assert compilations.total == 0
    assert jax.config.values["jax_enable_compilation_cache"]
    assert gc.isenabled()


# What is told from what


def setup(**changes: Any) -> ForwardSetup:
    model = ModelConfig.from_hf(TINY | changes.pop("model", {}))
    graph, state = weight_shapes(model, jnp.dtype("float32"), DEVICES)
    values: dict[str, Any] = {
        "graph": graph,
        "structure": jax.tree.structure(state),
        "attention": NARROW_IMPLEMENTATION,
        "lora_matmul": reference.IMPLEMENTATION,
        "linear": None,
        "groups": groups(model),
        "hidden_rows": 32,
    }
    return ForwardSetup(**(values | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"rms_norm_eps": 1e-6}},
        {"model": {"rope_theta": 5e5}},
        {"model": {"num_hidden_layers": 3}},
        {"attention": WIDE_IMPLEMENTATION},
        {"attention": NARROW_IMPLEMENTATION._replace(of_qkv=write_row)},
        {"lora_matmul": None},
        {"lora_matmul": reference.IMPLEMENTATION._replace(gated=reference.lora_matmul)},
        {"linear": Implementation("a", reference.lora_matmul, (1,), (), None, 128, empty_state)},
        {"hidden_rows": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_forward_pass_is_told_from_others(changes: dict[str, Any]) -> None:
    assert described(setup()) == described(setup())
    assert described(setup()) != described(setup(**changes))


def test_what_is_bound_to_a_function_is_part_of_it() -> None:
    def bound(*args: Any, **keywords: Any) -> Any:
        return described(functools.partial(reference.lora_matmul, *args, **keywords))

    assert bound(1, splits=(2, 3)) == bound(1, splits=(2, 3))
    several = [bound(), bound(1), bound(1.0), bound("1"), bound(True), bound(splits=(1,))]
    several += [bound(None), bound(jnp.dtype("float32")), bound(jnp.dtype("bfloat16"))]
    assert len({repr(one) for one in several}) == len(several)


def test_arguments_are_known_by_shape_dtype_and_structure() -> None:
    x = np.zeros((2, 3), np.float32)
    assert described_arguments(([x],)) == described_arguments(([x + 1],))
    others = [((x,),), ([x, x],), ([x.T],), ([x.astype(np.int32)],), ({"a": x},)]
    for other in others:
        assert described_arguments(other) != described_arguments(([x],))


@dataclasses.dataclass(frozen=True)
class Opaque:
    inside: Any


@pytest.mark.parametrize("value", [object(), np.zeros(3), {1, 2}, print, Opaque(object())])
def test_what_cannot_be_told_from_others_is_refused(value: Any) -> None:
    with pytest.raises(UnknownInputError):
        described(value)
    with pytest.raises(UnknownInputError):
        described(functools.partial(reference.lora_matmul, value))
