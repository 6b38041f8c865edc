"""Copies beside what XLA does: all of it arrives, in pieces, and nothing else changes."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from jaxlora.adapters import copy_stream
from jaxlora.adapters.copy_stream import CopyStream, open_streams
from tests.jaxlora.cuda_driver import CONTEXT, OUT_OF_MEMORY, FakeDriver

CPU = jax.devices("cpu")[0]


class Gpu:
    """What JAX would say of one."""

    platform = "gpu"

    def __init__(self, ordinal: int) -> None:
        self.local_hardware_id = ordinal


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 10_000])
def test_all_of_it_arrives_in_pieces(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    monkeypatch.setattr(copy_stream, "_PIECE_BYTES", 4096)
    source = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    room = np.zeros(size + 1, np.uint8)
    CopyStream(2).copy(source, room.ctypes.data)
    np.testing.assert_array_equal(room, [*source, 0])
    pieces = [num_bytes for _, num_bytes in driver.copied]
    assert sum(pieces) == size
    assert len(pieces) == -(-size // 4096)
    assert max(pieces, default=0) <= 4096
    # On the GPU that was asked for, and what the thread had before is as it was.
    assert driver.streams == [CONTEXT + 12]
    assert driver.contexts == []


def test_any_dtype_and_any_part_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    source = np.arange(100, dtype=np.float32)[30:70]
    room = np.zeros(40, np.float32)
    CopyStream(0).copy(source, room.ctypes.data)
    np.testing.assert_array_equal(room, source)


def test_many_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    monkeypatch.setattr(copy_stream, "_PIECE_BYTES", 512)
    stream, start = CopyStream(0), threading.Barrier(4)
    sources = [np.full(50_000, i + 1, np.uint8) for i in range(4)]
    rooms = [np.zeros(50_000, np.uint8) for _ in sources]

    def copy(i: int) -> bool:
        start.wait()
        stream.copy(sources[i], rooms[i].ctypes.data)
        return bool((rooms[i] == sources[i]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(copy, range(4)))


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"])
def test_what_the_driver_refuses_is_told(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    stream, source, room = CopyStream(0), np.ones(10, np.uint8), np.zeros(10, np.uint8)
    driver.fail[call] = OUT_OF_MEMORY
    with pytest.raises(MemoryError, match=f"{call}: CUDA_ERROR_OUT_OF_MEMORY"):
        stream.copy(source, room.ctypes.data)
    assert driver.contexts == []
    # Nobody else waits for ever.
    driver.fail.clear()
    stream.copy(source, room.ctypes.data)
    assert room.all()


def test_each_gpu_has_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    streams, way = open_streams([Gpu(1), Gpu(3)])
    assert len(streams) == 2
    assert driver.streams == [CONTEXT + 11, CONTEXT + 13]
    assert way == "on a stream of their own"


def test_a_stream_ends_with_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    stream, other = CopyStream(0), CopyStream(1)
    assert driver.num_streams == 2
    del stream
    gc.collect()
    assert driver.num_streams == 1
    # In a child it is the parent's.
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        del other
        gc.collect()
    assert driver.num_streams == 1
    assert driver.contexts == []


def test_where_there_are_none_jax_sends_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_streams([CPU]) == ([], "by JAX (cpu: there are no streams)")
    driver = FakeDriver(monkeypatch)
    driver.fail["cuStreamCreate"] = OUT_OF_MEMORY
    streams, way = open_streams([Gpu(0)])
    assert streams == []
    assert "by JAX (CUDA device 0 has no further stream: cuStreamCreate: CUDA_ERROR_OUT" in way


def test_a_computer_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with GPUs of another maker."""

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert open_streams([Gpu(0)]) == ([], "by JAX (libcuda.so.1: cannot open shared object file)")
