"""The second start: what the first has compiled is loaded, unless it is damaged or out of date."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.numpy

from jaxlora import LLM
from jaxlora.engine.programs import CompilationCounter
from jaxlora.errors import ModelLoadError
from tests.jaxlora.peft_models import KINDS, Reference

ROOT = Path(__file__).parents[2]
ADAPTER = "r16-all"
# Sizes the kernels are written for, in layers that share them.
KERNEL_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
OURS = {"forward", "_sample_step", "write_row", "_score", "_write"}
"""Functions that programs are made of."""


class Start(NamedTuple):
    """What a process said of itself."""

    results: dict[str, dict[str, Any]]
    """By number of devices."""
    log: str

    @property
    def one(self) -> dict[str, Any]:
        """On one device."""
        return self.results["1"]


class Starts:
    """Processes that share a cache."""

    def __init__(
        self, folder: Path, platform: str = "cpu", dtype: str = "float32", **sizes: int
    ) -> None:
        self.cache = folder / "cache"
        self.platform, self.dtype = platform, dtype
        sizes = {"num_hidden_layers": 1, "vocab_size": 96} | sizes
        self.reference = Reference(folder, {ADAPTER: KINDS[ADAPTER]}, **sizes)

    @property
    def folder(self) -> Path:
        """Where executables are."""
        return self.cache / "executables"

    @property
    def executables(self) -> list[Path]:
        """What is kept, but for what leads there."""
        return sorted(self.folder.glob("*-lowered-*"))

    def start(
        self, sizes: list[int], root: Path = ROOT, cache: Path | None = None, workers: int = 0
    ) -> Start:
        """A process that runs the project as it is in ``root``."""
        asked = {
            "base": self.reference.base_path,
            "adapter": self.reference.paths[ADAPTER],
            "cache": str(cache or self.cache),
            "dtype": self.dtype,
            "sizes": sizes,
            "workers": workers,
        }
        environment = os.environ | {
            "JAX_PLATFORMS": self.platform,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "tests.jaxlora.start_run", json.dumps(asked)]
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return Start(json.loads(done.stdout), done.stderr)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    return Starts(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def cold(starts: Starts) -> Start:
    return starts.start([1, 2])


def test_a_first_start_compiles_and_keeps_everything(starts: Starts, cold: Start) -> None:
    kept = 0
    for result in cold.results.values():
        assert result["loaded"] == 0
        assert result["late"] == 0
        assert set(result["traced"]) >= OURS
        kept += result["compiled"]
    assert len(starts.executables) == kept
    assert starts.folder.stat().st_mode & 0o777 == 0o700


def test_a_second_start_loads_everything_and_says_the_same(starts: Starts, cold: Start) -> None:
    second = starts.start([1, 2])
    for size, result in second.results.items():
        first = cold.results[size]
        assert result["compiled"] == 0
        assert result["loaded"] == first["compiled"]
        assert not set(result["traced"]) & OURS
        # What is left are arrays made outside of programs.
        assert result["compilations"] == first["compilations"] - first["compiled"]
        assert result["late"] == 0
        for told in ("tokens", "logprobs"):
            assert result[told] == first[told]


def test_programs_lowered_in_other_processes_say_the_same(
    starts: Starts, cold: Start, tmp_path: Path
) -> None:
    elsewhere = starts.start([1], cache=tmp_path, workers=2).one
    assert elsewhere["worker_seconds"] > 0
    assert cold.one["worker_seconds"] == 0
    for told in ("compiled", "compilations", "late", "tokens", "logprobs"):
        assert elsewhere[told] == cold.one[told]
    assert starts.start([1], cache=tmp_path).one["loaded"] == cold.one["compiled"]


@pytest.mark.gpu
def test_what_a_gpu_keeps_has_its_kernels(tmp_path: Path) -> None:
    """Though they are compiled apart from the programs, which are kept without their modules."""
    starts = Starts(tmp_path, "cuda,cpu", "bfloat16", **KERNEL_SIZES)
    first = starts.start([1]).one
    assert first["kernels"] > 0
    assert first["compiled"] > 0
    second = starts.start([1]).one
    assert second["loaded"] == first["compiled"]
    assert second["kernels"] == 0
    for told in ("tokens", "logprobs"):
        assert second[told] == first[told]


def test_what_is_damaged_is_compiled_again(starts: Starts, cold: Start) -> None:
    damaged = starts.executables[:4]
    content = [path.read_bytes() for path in damaged]
    damaged[0].write_bytes(content[0][: len(content[0]) // 2])
    damaged[1].write_bytes(content[1][:-100] + bytes(100))
    damaged[2].write_bytes(content[3])
    damaged[3].write_bytes(b"")
    after = starts.start([1, 2])
    assert sum(result["compiled"] for result in after.results.values()) == 4
    assert after.log.count("is damaged; its program is compiled again") == 4
    for path in damaged:
        assert str(path) in after.log
    for size, result in after.results.items():
        assert result["tokens"] == cold.results[size]["tokens"]


def test_a_changed_source_is_lowered(starts: Starts, cold: Start, tmp_path: Path) -> None:
    """The programs are the same here, which only lowering tells."""
    for package in ("jaxlora", "kernels_pallas", "tests"):
        # But for what another process is about to write.
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.pyc.*")
        )
    with (tmp_path / "kernels_pallas" / "lora_matmul" / "reference.py").open("a") as file:
        file.write("# changed\n")
    changed = starts.start([1], root=tmp_path)
    assert changed.one["loaded"] == 0
    assert changed.one["recognized"] == cold.one["compiled"]
    assert set(changed.one["traced"]) >= OURS
    assert changed.one["tokens"] == cold.one["tokens"]
    assert starts.start([1], root=tmp_path).one["loaded"] == cold.one["compiled"]


def test_a_checkpoint_that_lacks_a_tensor_ends_the_start(starts: Starts, tmp_path: Path) -> None:
    """Though it is noticed while programs are compiled."""
    broken = tmp_path / "broken"
    shutil.copytree(starts.reference.base_path, broken)
    path = broken / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.norm.weight"]
    safetensors.numpy.save_file(tensors, path)
    compilations = CompilationCounter()
    with pytest.raises(ModelLoadError, match=r"lacks tensors model\.norm\.weight"):
        LLM(
            str(broken),
            max_num_seqs=2,
            max_num_batched_tokens=16,
            compilation_cache_dir=None,
            skip_tokenizer_init=True,
            use_tqdm=False,
        )
    assert not [thread for thread in threading.enumerate() if "weights" in thread.name]
    compiled = compilations.total
    time.sleep(0.5)
    assert compilations.total == compiled
