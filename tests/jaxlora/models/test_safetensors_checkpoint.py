"""Directories written by transformers, read back; and every way such a directory can be broken."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora.errors import ModelLoadError
from jaxlora.models.safetensors_checkpoint import INDEX_FILE, SafetensorsCheckpoint

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}


def save_model(path: Path, dtype: torch.dtype, shard_size: str) -> dict[str, np.ndarray]:
    """Saves a random Llama; returns its tensors as float32, which every dtype fits into."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(path, max_shard_size=shard_size)
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tmp_path, torch.float32, "20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["single", "sharded"])
def test_tensors_are_what_transformers_saved(
    tmp_path: Path, dtype: torch.dtype, shard_size: str
) -> None:
    expected = save_model(tmp_path, dtype, shard_size)
    assert (tmp_path / INDEX_FILE).exists() == (shard_size == "20KB")

    tensors = list(SafetensorsCheckpoint(tmp_path).tensors())

    assert sorted(name for name, _ in tensors) == sorted(expected)
    for name, array in tensors:
        assert array.dtype == DTYPES[dtype]
        owner = array if array.base is None else array.base
        assert owner.flags.owndata
        np.testing.assert_array_equal(array.astype(np.float32), expected[name], err_msg=name)


def test_configs_are_the_files(tmp_path: Path) -> None:
    save_model(tmp_path, torch.float32, "1GB")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.hf_config() == json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "generation_config.json").unlink()
    assert checkpoint.generation_config() == {}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert checkpoint.generation_config() == {"eos_token_id": [2, 3]}


def test_scalars_and_empty_tensors_have_their_shapes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors: dict[str, np.ndarray] = {
        "scalar": np.full((), 3.0, np.float32),
        "empty": np.zeros((0, 4), np.float64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    read = dict(SafetensorsCheckpoint(tmp_path).tensors())
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_without_weights_only_the_config_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = SafetensorsCheckpoint(tmp_path, with_weights=False)
    assert checkpoint.hf_config() == {"model_type": "llama"}
    assert list(checkpoint.tensors()) == []


def write_shards(path: Path, num_shards: int, per_shard: int, rows: int) -> int:
    """Shards of equal tensors [rows, 1024] in float32; returns the bytes of one shard."""
    (path / "config.json").write_text("{}")
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        tensors = {f"t{shard}.{i}": np.ones((rows, 1024), np.float32) for i in range(per_shard)}
        save_file(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    return (path / file).stat().st_size


def test_host_memory_holds_one_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path, num_shards=3, per_shard=8, rows=512)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    tracemalloc.start()
    for _, array in checkpoint.tensors():
        size = array.nbytes
        del array
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * size


def test_resident_memory_grows_by_less_than_a_shard(tmp_path: Path) -> None:
    # tracemalloc does not see what a memory map would add, the operating system does.
    shard = write_shards(tmp_path, num_shards=3, per_shard=8, rows=2048)
    # Nor is it ru_maxrss that says so: a process has its parent's until it has more.
    code = """
import re, sys
from pathlib import Path
from jaxlora.models.safetensors_checkpoint import SafetensorsCheckpoint

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

checkpoint = SafetensorsCheckpoint(Path(sys.argv[1]))
before = most()
for _, array in checkpoint.tensors():
    array.sum()
    del array
print(most() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=Path(jaxlora.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 0.5 * shard


def rename_tensor(file: Path, name: str, new: str) -> None:
    tensors = load_file(file)
    tensors[new] = tensors.pop(name)
    save_file(tensors, file)


def shards_of(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def first_name(file: Path) -> str:
    return sorted(load_file(file))[0]


def lose_a_shard(path: Path) -> str:
    shards_of(path)[1].unlink()
    return r"lacks model-00002-of-\d+.safetensors, which model.safetensors.index.json names"


def add_a_shard(path: Path) -> str:
    save_file({"x": np.zeros(1, np.float32)}, path / "model-00099-of-00099.safetensors")
    return "has model-00099-of-00099.safetensors, which .* does not name"


def add_a_single_file(path: Path) -> str:
    save_file({"x": np.zeros(1, np.float32)}, path / "model.safetensors")
    return r"has model\.safetensors, which .* does not name"


def cut_a_shard(path: Path) -> str:
    file = shards_of(path)[1]
    file.write_bytes(file.read_bytes()[:-10])
    return f"{file.name} is truncated"


def cut_a_header(path: Path) -> str:
    file = shards_of(path)[1]
    file.write_bytes(file.read_bytes()[:4])
    return f"{file.name} is truncated"


def lose_a_tensor(path: Path) -> str:
    file = shards_of(path)[0]
    name = first_name(file)
    rename_tensor(file, name, "renamed")
    return f"{file.name} lacks {name}, which"


def add_a_tensor(path: Path) -> str:
    file = shards_of(path)[0]
    save_file(load_file(file) | {"stray": np.zeros(1, np.float32)}, file)
    return f"{file.name} has stray, but .* places stray nowhere"


def repeat_a_tensor(path: Path) -> str:
    one, other = shards_of(path)[:2]
    name = first_name(one)
    save_file(load_file(other) | {name: np.zeros(1, np.float32)}, other)
    return f"{other.name} has {name}, but .* places {name} in {one.name} too"


def empty_the_index(path: Path) -> str:
    (path / INDEX_FILE).write_text("{}")
    return "has no weight_map"


def break_the_index(path: Path) -> str:
    (path / INDEX_FILE).write_text('{"weight_map": {"a":')
    return "index.json is not valid JSON"


def leave_the_directory(path: Path) -> str:
    (path / INDEX_FILE).write_text('{"weight_map": {"a": "../other/model.safetensors"}}')
    return "places a in '../other/model.safetensors', which is not a file name"


def lose_the_index(path: Path) -> str:
    (path / INDEX_FILE).unlink()
    return f"has the shards model-00001-of-.* but no {INDEX_FILE}"


def lose_the_config(path: Path) -> str:
    (path / "config.json").unlink()
    return "has no config.json"


def quantize_a_tensor(path: Path) -> str:
    file = shards_of(path)[0]
    name = first_name(file)
    save_file(load_file(file) | {name: np.zeros((4, 4), np.int8)}, file)
    return f"stores {name} as I8; served are"


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_shard,
        add_a_shard,
        add_a_single_file,
        cut_a_shard,
        cut_a_header,
        lose_a_tensor,
        add_a_tensor,
        repeat_a_tensor,
        empty_the_index,
        break_the_index,
        leave_the_directory,
        lose_the_index,
        lose_the_config,
        quantize_a_tensor,
    ],
)
def test_damage_is_named(sharded: Path, damage: Callable[[Path], str]) -> None:
    message = damage(sharded)
    with pytest.raises(ModelLoadError, match=message):
        SafetensorsCheckpoint(sharded)


def test_a_name_that_occurs_twice_in_one_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    member = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f'{{"a":{member},"a":{member}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelLoadError, match="has the tensor a twice"):
        SafetensorsCheckpoint(tmp_path)


def test_other_weight_files_are_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"has neither model\.safetensors nor"):
        SafetensorsCheckpoint(tmp_path)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelLoadError, match=r"it has weights\.safetensors"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin only, which are pickles"):
        SafetensorsCheckpoint(tmp_path)


def test_the_weights_of_others_in_the_directory_do_not_count(tmp_path: Path) -> None:
    save_model(tmp_path, torch.float32, "1GB")
    names = list(dict(SafetensorsCheckpoint(tmp_path).tensors()))
    for other in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"x": np.zeros(1, np.float32)}, tmp_path / other)
    assert list(dict(SafetensorsCheckpoint(tmp_path).tensors())) == names


@pytest.mark.parametrize("text", ["[1]", "3"])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match="not a JSON object"):
        SafetensorsCheckpoint(tmp_path, with_weights=False).hf_config()
