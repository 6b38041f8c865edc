"""Blocks of tensors against what safetensors itself reads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from jaxlora.adapters import content
from jaxlora.adapters import tensors as tensors_module
from jaxlora.adapters.tensors import TensorFile, TensorsInMemory

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    shapes = [(3, 5), (7,), (1, 1), (4, 64), (9, 3)]
    return {
        f"{chr(122 - i)}.{j}": random.normal(size=shape).astype(dtype)
        for i, shape in enumerate(shapes)
        for j, dtype in enumerate(DTYPES)
    }


@pytest.fixture
def path(tensors: dict[str, np.ndarray[Any, Any]], tmp_path: Path) -> Path:
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("choose", [lambda i: True, lambda i: i % 4 != 1, lambda i: i == 7])
def test_tensors_are_as_saved(
    choose: Callable[[int], bool],
    in_memory: bool,
    tensors: dict[str, np.ndarray[Any, Any]],
    path: Path,
) -> None:
    source = TensorsInMemory(tensors) if in_memory else TensorFile(path)
    assert {k: h.shape for k, h in source.headers.items()} == {
        k: a.shape for k, a in tensors.items()
    }
    keys = [key for i, key in enumerate(tensors) if choose(i)]
    read = source.read(frozenset(keys))
    blocks = read.blocks
    assert read.places.keys() == set(keys)
    for key in keys:
        array = read[key]
        np.testing.assert_array_equal(array, tensors[key], strict=True)
        assert not array.flags.writeable
        assert array.flags.aligned
    assert sum(block.nbytes for block in blocks) == sum(tensors[key].nbytes for key in keys)
    assert len({block.dtype for block in blocks}) == len({tensors[key].dtype for key in keys})


def test_a_whole_file_is_one_block_for_each_dtype(path: Path) -> None:
    source = TensorFile(path)
    assert len(source.read(frozenset(source.headers)).blocks) == len(DTYPES)


def test_arrays_of_a_device_are_copied() -> None:
    given = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((4,), jnp.bfloat16)}
    read = TensorsInMemory(given).read(frozenset(given))
    for key, array in given.items():
        np.testing.assert_array_equal(read[key], np.asarray(array), strict=True)


def test_memory_has_the_order_of_a_file(
    path: Path, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    # So that equal tensors of several dtypes have one version, from wherever they come.
    backwards = dict(reversed(tensors.items()))
    assert list(TensorsInMemory(backwards).headers.items()) == list(
        TensorFile(path).headers.items()
    )


@pytest.mark.parametrize("change", ["shorter", "longer", "another", "in place"])
def test_a_file_that_changes_is_refused(change: str, path: Path) -> None:
    source = TensorFile(path)
    if change == "another":
        data = path.read_bytes()
        path.unlink()
        path.with_name("y").write_bytes(data)
        os.utime(path.with_name("y"), ns=(1, 1))
        path.with_name("y").rename(path)
    elif change == "in place":
        found = path.stat()
        time.sleep(0.02)  # What the kernel's clock of files may stand still.
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    else:
        os.truncate(path, path.stat().st_size + (1 if change == "longer" else -1))
    with pytest.raises(SafetensorError, match="was changed while it was read"):
        source.read(frozenset(source.headers))


def test_files_that_were_saved_alike_are_judged_once(
    path: Path, tensors: dict[str, np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TensorFile(path)
    other = path.with_name("other")
    changed = {key: (array * 2).astype(array.dtype) for key, array in tensors.items()}
    safetensors.numpy.save_file(changed, other, metadata={"format": "np"})
    monkeypatch.delattr(tensors_module, "safe_open")
    second = TensorFile(other)
    assert second.headers is first.headers
    read = second.read(frozenset(tensors))
    for key, array in changed.items():
        np.testing.assert_array_equal(read[key], array, strict=True)
    # A known header before other bytes.
    other.write_bytes(other.read_bytes() + b"x")
    with pytest.raises(SafetensorError, match="its size is not what its header says"):
        TensorFile(other)


def test_large_headers_are_not_kept(
    tmp_path: Path, tensors: dict[str, np.ndarray[Any, Any]]
) -> None:
    for size, are_kept in ((100, True), (tensors_module.MAX_KEPT_BYTES, False)):
        file = tmp_path / f"{size}.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata={"x": "y" * size})
        first, second = TensorFile(file), TensorFile(file)
        assert (first.headers is second.headers) is are_kept
        names = frozenset(tensors)
        read = first.read(names), second.read(names)
        assert (read[0].places is read[1].places) is are_kept
        for key, array in tensors.items():
            np.testing.assert_array_equal(read[1][key], array, strict=True)


@pytest.mark.parametrize("size", [10**4, 2**40, 2**64 - 1])
def test_a_header_that_is_not_all_there_is_refused(size: int, path: Path) -> None:
    TensorFile(path)
    data = path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little") + data[8:])
    with pytest.raises(SafetensorError, match=f"ends before its header of {size} bytes"):
        TensorFile(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_odd_value_is_found(dtype: Any) -> None:
    values = np.zeros(1001, dtype)
    values[:3] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, -0.0
    assert content.is_finite([values, np.zeros((0, 4), dtype)])
    for at in (3, 500, 1000):
        for odd in (np.inf, -np.inf, np.nan, -np.nan):
            values[at] = odd
            assert not content.is_finite([np.ones(2, dtype), values])
        values[at] = 0
    assert content.is_finite([values])


_FORK = """
import os, signal
import numpy as np
from jaxlora.adapters import content

os.cpu_count = lambda: 8
blocks = [np.zeros(2 * content._PIECE_BYTES, np.uint8)]
expected = content.digests(blocks)
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
signal.alarm(20)
os._exit(content.digests(blocks) != expected)
"""


def test_a_child_hashes_too() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], check=True, timeout=60)


def test_digests_are_the_same_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    blocks = [random.normal(size=(7, i)).astype(ml_dtypes.bfloat16) for i in (5, 100, 300)]
    monkeypatch.setattr(content, "_PIECE_BYTES", 512)
    found = []
    for cores in (1, 8, 64):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append(content.digests(blocks))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == sum(-(-block.nbytes // 512) for block in blocks)
