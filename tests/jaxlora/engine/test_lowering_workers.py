"""Programs traced in other processes: what they become, and what becomes of the processes."""

from __future__ import annotations

import functools
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora.adapters.bank import AdapterBank
from jaxlora.config import ModelConfig
from jaxlora.engine import lowering_workers, program_pipeline
from jaxlora.engine.lowering import Description, Program, lower, lower_exported
from jaxlora.engine.programs import compile_all
from jaxlora.engine.row_state import empty_state, write_row
from jaxlora.engine.runner import Runner
from jaxlora.models.cache import make_cache
from jaxlora.models.lora import MODULES, groups
from jaxlora.models.weights import weight_shapes
from jaxlora.parallel import Devices, ShapesOnly, sharded, specs_of
from kernels_pallas import dependent_launch
from kernels_pallas.dispatch import (
    choose_lora_linear,
    choose_lora_matmul,
    choose_paged_attention,
)
from kernels_pallas.lora_linear import gpu, gpu_norm, gpu_prompt_config
from kernels_pallas.lora_linear.gpu_config import SIZES
from kernels_pallas.lora_linear.op import EarlyKernels
from tests.jaxlora.patience import wait_until
from tests.jaxlora.tiny_config import TINY

DEVICES = Devices.first(1)
CONFIG = TINY | {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
H100 = "NVIDIA H100 80GB HBM3"


def engine_programs(
    kind: str,
    dtype: str,
    *,
    modules: Collection[str] = MODULES,
    extras: Collection[str] = (),
    rows: int = 8,
    most_tokens: int = 16,
    **model: Any,
) -> dict[str, Program]:
    """All that an engine on a device of this kind compiles, from shapes."""
    devices = ShapesOnly.of(DEVICES.all)
    config = ModelConfig.from_hf(CONFIG | model)
    number = jnp.dtype(dtype)
    attention, _ = choose_paged_attention(
        kind,
        number,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=16,
        sliding_window=None,
    )
    kernel, _ = choose_lora_matmul(kind, number, device_kind=H100)
    linear, _ = choose_lora_linear(
        kind,
        number,
        shapes=[(group.d_in, group.splits, group.gated) for group in groups(config)],
        num_slots=2,
        rank=16,
        device_kind=H100,
    )
    bank = AdapterBank(
        config,
        devices,
        kernel=kernel,
        num_slots=2,
        max_rank=16,
        dtype=number,
        modules=modules,
        extras=extras,
    )
    runner = Runner(
        config,
        weight_shapes(config, number, devices),
        make_cache(config, attention, devices, num_pages=8, page_size=16, dtype=number),
        devices=devices,
        bank=bank,
        attention=attention,
        linear=linear,
        max_num_seqs=rows,
        max_num_batched_tokens=most_tokens,
        pages_per_row=4,
    )
    return runner.programs()


# What they become


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, Program]:
    return engine_programs("cpu", "float32")


def without_names(hlo: str) -> tuple[str, Counter[str]]:
    """Compiled HLO as its first line (which has what is overwritten, and layouts) and the others,
    in any order, without names and what they came from."""
    tables = r"(?m)^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*"
    hlo = re.sub(tables, "", re.sub(r", metadata=\{[^}]*\}", "", hlo))
    first, *lines = hlo.splitlines()
    return first, Counter(re.sub(r"%[\w.\-]+|[\w.\-]+: ", "", line) for line in lines)


@pytest.mark.parametrize(
    "name",
    [
        "mixed lora 16",
        "sample 8",
        "prompt logprobs",
        "adapter write, rank 16 float32",
    ],
)
def test_a_program_from_elsewhere_is_the_same(name: str, on_cpu: dict[str, Program]) -> None:
    program = on_cpu[name]
    sent = pickle.loads(pickle.dumps(Description.of(program, "cpu")))
    elsewhere = lower_exported(sent.export(), program, DEVICES).compile()
    here = lower(program, DEVICES).compile()
    assert without_names(elsewhere.as_text()) == without_names(here.as_text())
    assert elsewhere.in_tree == here.in_tree
    assert elsewhere.out_tree == here.out_tree
    for bytes_of in ("alias_size_in_bytes", "temp_size_in_bytes", "argument_size_in_bytes"):
        assert getattr(elsewhere.memory_analysis(), bytes_of) == getattr(
            here.memory_analysis(), bytes_of
        )


def test_kernels_are_exported_where_there_is_no_gpu() -> None:
    program = engine_programs("hopper", "bfloat16")["decode lora 8"]
    exported = pickle.loads(pickle.dumps(Description.of(program, "cuda"))).export()
    module = jax.export.deserialize(bytearray(exported.serialized)).mlir_module()
    # Four linears, attention and what turns its queries and keys and writes them.
    assert module.count("custom_call @mosaic_gpu") == 6


def traced(program: Program) -> jax.stages.Traced:
    arguments, specs = program.arguments, specs_of(program.arguments)
    function = sharded(program.function, DEVICES, specs, program.out_specs, program.donated)
    return function.trace(*arguments)


@pytest.mark.parametrize(
    ("asked", "early"),
    [
        # XLA multiplies a row that has no adapter. The last layer of the largest steps goes on like
        # a decode step, and is none.
        ({"most_tokens": 128}, {"decode 8", "decode lora 1", "decode lora 8"}),
        # Nor may it have one where it is not targeted.
        ({"modules": ("q", "v")}, {"decode 8", "decode lora 8"}),
        ({"extras": ("dora",)}, {"decode 8", "decode lora 1", "decode lora 8"}),
        (
            {"extras": ("lm_head",)},
            {
                "decode 8",
                *(f"decode lora {extras}{rows}" for extras in ("", "extras ") for rows in (1, 8)),
            },
        ),
        ({"mlp_bias": True}, set()),
    ],
    ids=["all", "qv", "dora", "lm_head", "bias"],
)
def test_decode_steps_without_a_linear_of_xlas_begin_their_kernels_early(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], early: set[str]
) -> None:
    """XLA is told of them, and norms are in them, and in no others."""
    options = {"some": "option"}
    programs = programs_with_early_kernels(monkeypatch, options, **asked)
    assert {name for name, program in programs.items() if program.options} == early
    assert all(programs[name].options == options for name in early)
    for name, program in programs.items():
        if name.startswith(("decode", "mixed")):
            assert ("rms_norm_kernel" in str(traced(program).jaxpr)) == (name in early)


def test_no_kernel_of_a_large_decode_step_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linears are one kernel each, too, but another, which waits for the one in front."""
    # So that four tiles of tokens are enough for so small a model.
    monkeypatch.setattr(gpu_prompt_config, "_LEAST_TILES", 8)
    programs = programs_with_early_kernels(monkeypatch, {"some": "option"}, rows=512)
    assert str(traced(programs["decode lora 512"]).jaxpr).count("prompt_linear") >= 4
    early = {int(name.split()[-1]) for name, program in programs.items() if program.options}
    assert early == set(SIZES)


def programs_with_early_kernels(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], **asked: Any
) -> dict[str, Program]:
    """An engine's, as if JAX launched kernels early and layers were large enough for it."""
    kernels = EarlyKernels(gpu_norm.rms_norm, options)
    monkeypatch.setattr(gpu, "IMPLEMENTATION", gpu.IMPLEMENTATION._replace(early=kernels))
    monkeypatch.setattr(dependent_launch, "LEAST_LAYER_BYTES", 1)
    monkeypatch.setattr(dependent_launch, "TAKES_EFFECT", True)
    return engine_programs("hopper", "bfloat16", **asked)


# What becomes of the processes


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One worker, which is waited for, and no program is on disk."""
    monkeypatch.setattr(program_pipeline, "num_workers", lambda *_: 1)
    monkeypatch.setattr(lowering_workers, "_MEANWHILE", 0)
    directory = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", directory)


def processes() -> list[str]:
    """Workers of this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode().replace("\0", " ")
            parent = int(re.findall(r"PPid:\t(\d+)", (path / "status").read_text())[0])
        except OSError:
            continue
        if parent == os.getpid() and lowering_workers.__name__ in command:
            found.append(command)
    return found


def fails_elsewhere(x: jax.Array, *, here: int) -> jax.Array:
    if os.getpid() != here:
        raise ValueError("not in this process")
    return x + 1


def dies_elsewhere(x: jax.Array, *, here: int) -> jax.Array:
    if os.getpid() != here:
        os.write(2, b"some last words")
        os.kill(os.getpid(), signal.SIGKILL)
    return x + 2


def waits_elsewhere(x: jax.Array, *, here: int, busy: str) -> jax.Array:
    if os.getpid() != here:
        written = Path(f"{busy}-")
        written.write_text(f"{os.getpid()}\n")
        written.rename(busy)
        time.sleep(600)
    return x + 3


def simple(function: Any, **bound: Any) -> Program:
    return Program(functools.partial(function, here=os.getpid(), **bound), (jnp.zeros(3),))


@pytest.mark.usefixtures("workers")
def test_what_a_worker_cannot_do_is_done_here(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As people write who do not know that Python wants text there.
    monkeypatch.setattr(sys, "path", [*sys.path, Path("src")])
    state = DEVICES.put(empty_state(3, 64))
    row = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
    every = {
        "sound": Program(write_row, (state, np.asarray(0, np.int32), row), donated=(0,)),
        "unknown": Program(lambda x: x, (jnp.zeros(3),)),
        "fails": simple(fails_elsewhere),
    }
    compiled, report = compile_all(every, DEVICES, use_tqdm=False)
    assert report.compiled == len(every)
    assert report.worker_seconds > 0
    assert compiled["sound"].memory_analysis().alias_size_in_bytes > 0
    assert compiled["unknown"](jnp.zeros(3)).tolist() == [0] * 3
    assert compiled["fails"](jnp.zeros(3)).tolist() == [1] * 3
    told = {record.message.split()[0]: record.message for record in caplog.records}
    assert "it cannot be sent to another" in told.pop("unknown")
    assert "ValueError: not in this process" in told.pop("fails")
    assert "sound" not in told
    assert processes() == []


@pytest.mark.usefixtures("workers")
def test_a_worker_that_dies_is_done_without(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    others = {str(n): simple(fails_elsewhere) for n in range(4)}
    compiled, _ = compile_all({"dies": simple(dies_elsewhere), **others}, DEVICES, use_tqdm=False)
    assert compiled["dies"](jnp.zeros(3)).tolist() == [2] * 3
    assert all(compiled[name](jnp.zeros(3)).tolist() == [1] * 3 for name in others)
    assert "dies is lowered in this process: another has ended with status -9" in caplog.text
    assert "some last words" in caplog.text
    assert "some last words" not in capfd.readouterr().err
    assert processes() == []


@pytest.mark.usefixtures("workers")
def test_workers_that_cannot_be_configured_alike_are_done_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering_workers, "_config", lambda: {"jax_no_such_option": 1})
    compiled, report = compile_all({"a": simple(fails_elsewhere)}, DEVICES, use_tqdm=False)
    assert compiled["a"](jnp.zeros(3)).tolist() == [1] * 3
    assert report.worker_seconds == 0
    assert "did not start: another could not do it: AttributeError" in caplog.text
    assert "jax_no_such_option" in caplog.text
    assert processes() == []


@pytest.mark.usefixtures("workers")
def test_workers_of_other_source_are_done_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering_workers, "SOURCES", "as they were")
    _, report = compile_all({"a": simple(fails_elsewhere)}, DEVICES, use_tqdm=False)
    assert report.worker_seconds == 0
    assert "did not start: its source has changed" in caplog.text
    assert processes() == []


@pytest.mark.usefixtures("workers")
def test_an_interrupted_start_leaves_no_process(tmp_path: Path) -> None:
    busy, interrupted, found = tmp_path / "busy", Future[None](), []

    def interrupt() -> None:
        wait_until(busy.exists, 300)
        found.extend(processes())
        interrupted.set_exception(KeyboardInterrupt())

    thread = threading.Thread(target=interrupt)
    thread.start()
    program = simple(waits_elsewhere, busy=str(busy))
    with pytest.raises(KeyboardInterrupt):
        compile_all({"a": program}, DEVICES, use_tqdm=False, after=interrupted)
    thread.join()
    assert len(found) == 1
    assert processes() == []


def is_running(pid: int) -> bool:
    try:
        # Empty of one that ended and that nobody has asked for its status yet.
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def leave_while_busy(busy: str) -> None:
    """Ends this process while a worker traces, as Ctrl-C does on the command line."""
    with lowering_workers.LoweringWorkers(1, DEVICES) as others:
        lowering_workers._MEANWHILE = 0
        program = simple(waits_elsewhere, busy=busy)
        threading.Thread(target=others.lower, args=("a", program), daemon=True).start()
        wait_until(Path(busy).exists, 300)
        os._exit(3)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    script = f"from {__name__} import leave_while_busy; leave_while_busy({str(busy)!r})"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=600).returncode == 3
    worker = int(busy.read_text())
    wait_until(lambda: not is_running(worker))
    assert not is_running(worker)


def test_without_kernels_there_are_no_workers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    assert lowering_workers.num_workers(100, DEVICES) == 0
    assert "in this process alone: no program has kernels" in caplog.text
