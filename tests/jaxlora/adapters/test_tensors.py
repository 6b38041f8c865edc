"""Blocks of tensors against what safetensors itself reads."""

from __future__ import annotations

import errno
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from jaxlora.adapters import content, pieces
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
    read, seen = source.read(frozenset(keys), content.largest)
    blocks = read.blocks
    # Small as they are, each block is one piece.
    assert seen == [content.largest(block) for block in blocks]
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
    read, _ = source.read(frozenset(source.headers), content.largest)
    assert len(read.blocks) == len(DTYPES)


def test_arrays_of_a_device_are_copied() -> None:
    given = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones((4,), jnp.bfloat16)}
    read, _ = TensorsInMemory(given).read(frozenset(given), content.largest)
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
        source.read(frozenset(source.headers), content.largest)


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
    read, _ = second.read(frozenset(tensors), content.largest)
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
        (one, _), (other, _) = (file.read(names, content.largest) for file in (first, second))
        assert (one.places is other.places) is are_kept
        for key, array in tensors.items():
            np.testing.assert_array_equal(other[key], array, strict=True)


@pytest.mark.parametrize("size", [10**4, 2**40, 2**64 - 1])
def test_a_header_that_is_not_all_there_is_refused(size: int, path: Path) -> None:
    TensorFile(path)
    data = path.read_bytes()
    path.write_bytes(size.to_bytes(8, "little") + data[8:])
    with pytest.raises(SafetensorError, match=f"ends before its header of {size} bytes"):
        TensorFile(path)


PIECE = 32
"""Bytes, in the tests of files that are read in many pieces."""


@pytest.fixture(params=[2, 16])
def in_many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cuts blocks of a few hundred bytes, for one thread and for eight."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(os, "cpu_count", lambda: request.param)
    return int(request.param)


def offsets_of(path: Path) -> list[int]:
    """Where in the file the pieces of all its tensors begin."""
    source, found = TensorFile(path), []
    at = path.stat().st_size - sum(header.num_bytes for header in source.headers.values())
    for dtype in ("float32", "bfloat16", "float16"):
        size = sum(h.num_bytes for h in source.headers.values() if h.dtype == dtype)
        found += range(at, at + size, PIECE)
        at += size
    return found


def read_all(path: Path) -> list[bytes]:
    source = TensorFile(path)
    return source.read(frozenset(source.headers), np.ndarray.tobytes)[1]


def test_what_is_seen_is_of_the_bytes_of_the_file(path: Path, in_many: int) -> None:
    data, starts = path.read_bytes(), offsets_of(path)
    ends = [*starts[1:], len(data)]
    right = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    assert len(right) > 20
    assert read_all(path) == right


def test_reads_may_come_up_short(path: Path, in_many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right, preadv = read_all(path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: preadv(file, [into[0][:7]], at))
    assert read_all(path) == right


@pytest.mark.parametrize("fault", ["disk", "end", "change"])
def test_a_fault_in_any_piece_is_told(
    fault: str, path: Path, in_many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, preadv, opened = offsets_of(path), os.preadv, set()

    def broken(bad: int, file: int, into: Any, at: int) -> int:
        opened.add(file)
        if at == bad and fault == "disk":
            raise OSError(errno.EIO, "bad sector")
        if at >= bad and fault == "end":
            return 0
        if at == bad and fault == "change":
            os.utime(path, ns=(bad, bad))
        return preadv(file, into, at)

    right = read_all(path)
    for bad in starts:
        match = {"disk": "bad sector", "end": "ends before its last", "change": "was changed"}
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", functools.partial(broken, bad))
            with pytest.raises((OSError, SafetensorError), match=match[fault]):
                read_all(path)
    assert read_all(path) == right
    # And nobody reads from a number that may be another file's by then.
    for file in opened:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(file)


def test_damage_is_told_before_what_is_not_finite(
    path: Path, in_many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As what is not all there, or is another file's, cannot be told from what was saved.
    last, preadv = offsets_of(path)[-1], os.preadv
    data = path.read_bytes()
    path.write_bytes(data[: -2 * PIECE] + b"\xff" * 2 * PIECE)
    source = TensorFile(path)
    _, seen = source.read(frozenset(source.headers), content.largest)
    assert not all(map(math.isfinite, seen))

    def broken(file: int, into: Any, at: int) -> int:
        if at == last:
            os.truncate(path, last)
        return preadv(file, into, at)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(SafetensorError, match="ends before its last tensor does"):
        read_all(path)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_odd_value_is_found_wherever_it_is(
    dtype: Any, in_memory: bool, in_many: int, tmp_path: Path
) -> None:
    values = np.zeros((3, 3 * PIECE + 1), dtype)
    flat, count = values.reshape(-1), PIECE // np.dtype(dtype).itemsize
    for at in (0, 1, count - 1, count, 2 * count - 1, 2 * count, flat.size - 2, flat.size - 1):
        flat[:] = 0
        flat[at] = np.nan if at % 2 else -np.inf
        if not in_memory:
            safetensors.numpy.save_file({"x": values}, tmp_path / "x")
        source = TensorsInMemory({"x": values}) if in_memory else TensorFile(tmp_path / "x")
        read, seen = source.read(frozenset(["x"]), content.largest)
        odd = [i for i, each in enumerate(seen) if not math.isfinite(each)]
        assert odd == [at // count]
        assert not math.isfinite(content.largest(read["x"]))


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.integers(0, 40), st.integers(1, 3), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(0, 2**12),
    st.sampled_from([2, 16]),
)
def test_what_is_copied_is_what_would_be_read(
    kinds: list[tuple[Any, int, int, bool]], chosen: int, cores: int
) -> None:
    random = np.random.default_rng(len(kinds))
    tensors = {}
    for i, (dtype, rows, columns, is_strided) in enumerate(kinds):
        array = random.normal(size=(rows, columns)).astype(dtype)
        tensors[f"{i % 3}.{i}"] = array[::2].T if is_strided else array
    names = frozenset(name for i, name in enumerate(tensors) if chosen >> i & 1)
    saved = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with (
        mock.patch.object(pieces, "PIECE_BYTES", PIECE),
        mock.patch.object(os, "cpu_count", return_value=cores),
        tempfile.TemporaryDirectory() as folder,
    ):
        safetensors.numpy.save_file(saved, Path(folder) / "x")
        read, seen = TensorFile(Path(folder) / "x").read(names, content.largest)
        copied, seen_too = TensorsInMemory(tensors).read(names, content.largest)
    assert (copied.places, seen_too) == (read.places, seen)
    for name in names:
        np.testing.assert_array_equal(copied[name], tensors[name], strict=True)
        np.testing.assert_array_equal(read[name], tensors[name], strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_odd_is_odd(dtype: Any) -> None:
    values = np.zeros(1001, dtype)
    values[:3] = 1, ml_dtypes.finfo(dtype).min, -0.0
    most = float(ml_dtypes.finfo(dtype).max)
    assert content.largest(values) == most
    assert content.largest(-values) == most
    assert content.largest(np.zeros((0, 4), dtype)) == 0
    for at in (3, 500, 1000):
        for odd in (np.inf, -np.inf, np.nan, -np.nan):
            values[at] = odd
            assert content.largest(values) == np.inf
        values[at] = 0
    assert content.largest(values) == most


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [-1, 0, 1])
def test_the_largest_is_that_of_numpy(dtype: Any, sign: int) -> None:
    """Of both signs, or of one."""
    values = np.random.default_rng(0).normal(size=99).astype(dtype)
    values = values if not sign else (sign * np.abs(values)).astype(dtype)
    assert content.largest(values) == float(np.abs(values).max())


@given(
    st.lists(st.integers(0, 100_000), max_size=4),
    st.sampled_from([np.uint8, *DTYPES]),
    st.sampled_from([1, 4, 64]),
)
def test_a_digest_is_that_of_the_text_and_all_bytes(
    sizes: list[int], dtype: Any, cores: int
) -> None:
    """Whoever computes it, and however many of them."""
    random = np.random.default_rng(sum(sizes))
    arrays = [random.normal(size=size).astype(dtype) for size in sizes]
    whole = "wörter\0".encode() + b"".join(array.tobytes() for array in arrays)
    with (
        mock.patch.object(content, "PIECE_BYTES", 1 << 17),
        mock.patch.object(os, "cpu_count", return_value=cores),
    ):
        assert content.digest("wörter", arrays) == blake3(whole).hexdigest()
