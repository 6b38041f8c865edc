"""What is compiled: copies nothing large, refuses other shapes, is counted and is kept."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlora.adapters.bank import AdapterBank
from jaxlora.config import ModelConfig
from jaxlora.engine.layered import LEAST_LAYERS
from jaxlora.engine.lowering import Program
from jaxlora.engine.programs import (
    CompilationCounter,
    compile_all,
    use_compilation_cache,
)
from jaxlora.engine.runner import Runner
from jaxlora.models.cache import make_cache
from jaxlora.models.lora import MODULES
from jaxlora.models.weights import dummy_weights
from jaxlora.parallel import Devices, specs_of
from kernels_pallas.lora_matmul.reference import IMPLEMENTATION
from kernels_pallas.paged_attention.reference import NARROW_IMPLEMENTATION
from tests.jaxlora.tiny_config import TINY

FLOAT32 = jnp.dtype("float32")
CONFIG = ModelConfig.from_hf(TINY)
DEVICES = Devices.first(1)
FORWARD = ("decode 4", "decode lora 4", "mixed 32", "mixed lora 32")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return make_runner(CONFIG)


def make_runner(config: ModelConfig) -> Runner:
    """Cache and bank of unusual sizes, each far larger than what a step computes."""
    bank = AdapterBank(
        config,
        DEVICES,
        kernel=IMPLEMENTATION,
        num_slots=7,
        max_rank=48,
        dtype=FLOAT32,
        modules=MODULES,
    )
    return Runner(
        config,
        dummy_weights(config, FLOAT32, DEVICES, seed=0),
        make_cache(
            config, NARROW_IMPLEMENTATION, DEVICES, num_pages=4999, page_size=4, dtype=FLOAT32
        ),
        devices=DEVICES,
        bank=bank,
        attention=NARROW_IMPLEMENTATION,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        pages_per_row=64,
    )


@pytest.fixture(scope="module")
def programs(runner: Runner) -> dict[str, Program]:
    assert runner.bank is not None
    writes = {
        f"write {kind.rank}": Program(
            function, arguments, donated=(0,), out_specs=specs_of(arguments[0])
        )
        for kind, (function, arguments) in runner.bank.programs().items()
    }
    return runner._forward_programs() | writes


@pytest.fixture(scope="module")
def compiled(programs: dict[str, Program]) -> dict[str, Any]:
    names = (*FORWARD, "write 16", "write 48")
    executables, _ = compile_all({name: programs[name] for name in names}, DEVICES, use_tqdm=False)
    return executables


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def copies_of(hlo: str, arrays: Any) -> list[str]:
    """Lines of compiled HLO that copy as many elements as one of the arrays has."""
    sizes = {leaf.size for leaf in jax.tree.leaves(arrays)}
    found = []
    for line in hlo.splitlines():
        match = re.search(r"= \w+\[([\d,]*)\]\S* (copy|copy-start|transpose|pad)\(", line)
        if match and math.prod(int(n) for n in match[1].split(",") if n) in sizes:
            found.append(line.strip())
    return found


def test_a_copy_would_be_seen() -> None:
    pool = jnp.zeros((499, 4, 8))
    not_donated = jax.jit(lambda x: x.at[3].set(1.0)).lower(pool).compile()
    assert copies_of(not_donated.as_text(), [pool])
    memory = not_donated.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == 0


@pytest.mark.parametrize("name", FORWARD)
def test_a_step_copies_neither_cache_nor_bank(
    name: str, runner: Runner, programs: dict[str, Program], compiled: dict[str, Any]
) -> None:
    assert runner.bank is not None
    _, cache, table, *_ = programs[name].arguments
    executable = compiled[name]
    assert copies_of(executable.as_text(), (cache, runner.bank.arrays)) == []
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes((cache, table))
    # Nor does it do so within a fused operation.
    assert memory.temp_size_in_bytes < cache[0].nbytes / 2


@pytest.mark.parametrize("name", ["decode lora 4", "mixed lora 32"])
def test_nor_do_layers_that_are_compiled_for_all(name: str) -> None:
    runner = make_runner(dataclasses.replace(CONFIG, num_layers=LEAST_LAYERS))
    assert runner.bank is not None
    layers = f"{name}, layers"
    compiled, _ = compile_all({layers: runner.programs()[layers]}, DEVICES, use_tqdm=False)
    x, cache, *_ = runner.programs()[layers].arguments
    assert 1 < len(cache) < LEAST_LAYERS
    assert copies_of(compiled[layers].as_text(), (cache, runner.bank.arrays)) == []
    memory = compiled[layers].memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(cache) + x.size * x.dtype.itemsize
    assert memory.temp_size_in_bytes < cache[0].nbytes / 2


def test_a_step_writes_the_cache_in_place(
    programs: dict[str, Program], compiled: dict[str, Any]
) -> None:
    weights, cache, table, *rest = programs["mixed lora 32"].arguments
    cache, table = jax.tree.map(jnp.copy, (cache, table))
    before = [layer.unsafe_buffer_pointer() for layer in cache]
    _, _, after, *_ = compiled["mixed lora 32"](weights, cache, table, *rest)
    assert [layer.unsafe_buffer_pointer() for layer in after] == before
    assert all(layer.is_deleted() for layer in cache)


@pytest.mark.parametrize("name", ["write 16", "write 48"])
def test_a_slot_write_copies_no_other_slot(
    name: str, programs: dict[str, Program], compiled: dict[str, Any]
) -> None:
    layers, *_ = programs[name].arguments
    executable = compiled[name]
    assert copies_of(executable.as_text(), layers) == []
    memory = executable.memory_analysis()
    assert memory.alias_size_in_bytes == num_bytes(layers)
    assert memory.temp_size_in_bytes < num_bytes(layers) / 7


def test_another_shape_raises_instead_of_compiling(
    programs: dict[str, Program], compiled: dict[str, Any]
) -> None:
    compilations = CompilationCounter()
    arguments = programs["decode 4"].arguments
    with pytest.raises(TypeError, match="compiled"):
        compiled["mixed 32"](*arguments)
    with pytest.raises(TypeError, match="compiled"):
        compiled["write 16"](*programs["write 48"].arguments)
    assert compilations.total == 0


def test_compilations_are_counted_cached_or_not() -> None:
    x = jnp.arange(5.0)
    # Two functions of one program: the second compilation may be a hit of the persistent cache.
    functions = [jax.jit(lambda x: 3 * x + 1) for _ in range(2)]
    compilations = CompilationCounter()
    for count, function in enumerate(functions, start=1):
        for _ in range(2):
            function(x)
            assert compilations.total == count
    functions[0](x[None])
    assert compilations.total > 2


def test_a_program_that_fails_to_compile_is_not_passed_over() -> None:
    def broken(x: jax.Array) -> jax.Array:
        raise ValueError(f"no such shape {x.shape}")

    x = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"no such shape \(3,\)"):
        compile_all({"sound": Program(jnp.sin, (x,)), "broken": Program(broken, (x,))}, DEVICES)


# Where compiled programs are kept

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def configured(tmp_path: Path) -> Iterator[Path]:
    """A cache in use, as another library may have left it; afterwards all is as it was."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    directory = tmp_path / "configured"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compilation_cache.reset_cache()
    compile_something()
    assert list(directory.iterdir())
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_something() -> None:
    jax.jit(lambda x: 7 * x - 2).lower(np.zeros(3, np.float32)).compile()


def settings() -> list[Any]:
    return [jax.config.values[name] for name in SETTINGS]


@pytest.mark.parametrize("directory", ["auto", None])
def test_a_configured_cache_stays(directory: str | None, configured: Path) -> None:
    before = settings()
    use_compilation_cache(directory)
    assert settings() == before


def test_none_turns_nothing_on(configured: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache(None)
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_given_directory_holds_every_program_from_now_on(
    configured: Path, tmp_path: Path
) -> None:
    # Programs that compile fast, as a later start's do, are kept too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000)
    use_compilation_cache(str(tmp_path / "given"))
    compile_something()
    assert list((tmp_path / "given").iterdir())


def test_auto_is_a_folder_of_the_user(
    configured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "home" / name)
    jax.config.update("jax_compilation_cache_dir", None)
    use_compilation_cache("auto")
    compile_something()
    assert list((tmp_path / "home" / "jaxlora" / "xla").iterdir())
