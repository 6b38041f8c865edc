"""Memory that is pinned while anybody has it, and no longer."""

from __future__ import annotations

import errno
import gc
import mmap
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

import jax
import numpy as np
import pytest

from jaxlora.adapters.pinned_memory import PinnedMemory
from tests.jaxlora.cuda_driver import OUT_OF_MEMORY, FakeDriver
from tests.jaxlora.patience import SECONDS


def test_it_is_pinned_as_long_as_any_part_of_it_is_had(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    memory = PinnedMemory(0)
    array = memory(10_000)
    assert (array.shape, array.dtype, array.flags.writeable) == ((10_000,), np.uint8, True)
    assert driver.pinned == {array.ctypes.data: 10_000}
    other = memory(5000)
    assert sorted(driver.pinned.values()) == [5000, 10_000]
    part = array.view(np.float16)[100:].reshape(2, -1)[1]
    del array
    gc.collect()
    part[:] = 3
    assert sorted(driver.pinned.values()) == [5000, 10_000]
    del part
    assert driver.pinned == {other.ctypes.data: 5000}
    del other
    assert not driver.pinned
    assert driver.contexts == []


def test_it_is_written_and_read_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    array = PinnedMemory(0)(1 << 20)
    values = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    array[:] = values
    gc.collect()
    np.testing.assert_array_equal(array, values)
    sent = jax.device_put(array.view(np.float16))
    np.testing.assert_array_equal(np.asarray(sent).view(np.uint8), values)


def test_the_context_of_the_thread_stays_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    memory = PinnedMemory(0)
    driver.contexts.append(7)
    array = memory(100)
    assert driver.contexts == [7]
    driver.fail["cuMemHostRegister_v2"] = OUT_OF_MEMORY
    with pytest.raises(MemoryError):
        memory(100)
    assert driver.contexts == [7]
    # Whoever has it last may be on another thread, which has none.
    held = [array]
    del array
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(SECONDS)
    assert not driver.pinned
    assert driver.contexts == [7]


@pytest.mark.parametrize(
    ("code", "name"), [(OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"), (801, "error 801")]
)
def test_what_the_driver_refuses_is_told_and_kept_by_nobody(
    code: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(monkeypatch)
    memory = PinnedMemory(0)
    driver.fail["cuMemHostRegister_v2"] = code
    made: list[weakref.ref[Any]] = []

    class Mapping(mmap.mmap):
        def __new__(cls, *args: Any, **kwargs: Any) -> Mapping:
            mapping = super().__new__(cls, *args, **kwargs)
            made.append(weakref.ref(mapping))
            return mapping

    monkeypatch.setattr(mmap, "mmap", Mapping)
    with pytest.raises(MemoryError, match=f"cuMemHostRegister_v2: {name}"):
        memory(4096)
    gc.collect()
    assert [ref() for ref in made] == [None]
    assert not driver.pinned
    driver.fail.clear()
    assert memory(4096).nbytes == 4096


@pytest.mark.parametrize("call", ["cuCtxPushCurrent_v2", "cuMemHostRegister_v2"])
def test_ctrl_c_while_it_is_pinned_leaves_nothing_behind(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = FakeDriver(monkeypatch)
    memory = PinnedMemory(0)
    original = getattr(driver, call)

    def press(*arguments: Any) -> int:
        code = int(original(*arguments))
        setattr(driver, call, original)
        signal.raise_signal(signal.SIGINT)
        return code

    setattr(driver, call, press)
    with pytest.raises(KeyboardInterrupt):
        memory(10_000)
    gc.collect()
    assert (driver.pinned, driver.contexts) == ({}, [])


def test_memory_that_the_system_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeDriver(monkeypatch)
    memory = PinnedMemory(0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(MemoryError, match=r"4096 bytes of memory: .*Cannot allocate"):
        memory(4096)


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_device_that_cannot_be_used(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    driver.fail[call] = 101
    with pytest.raises(OSError, match=f"CUDA device 3 cannot be used: {call}: error 101"):
        PinnedMemory(3)


def test_nothing_is_unpinned_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    array = PinnedMemory(0)(100)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    del array
    assert list(driver.pinned.values()) == [100]


_ENDS = """
import ctypes, os, pytest, sys
import numpy as np
from jaxlora.adapters.pinned_memory import PinnedMemory
from tests.jaxlora.cuda_driver import FakeDriver

driver = FakeDriver(pytest.MonkeyPatch())
memory = PinnedMemory(0)
array, other = memory(10_000), memory(5000)
array[:] = 3
sys.stdout.flush()
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert len(driver.pinned) == 2 and (array == 3).all()
    raise SystemExit(status)
# What is the parent's to unpin may still be read, and given up.
assert (array == 3).all()
del array
assert len(driver.pinned) == 2
"""


def test_neither_a_child_nor_a_process_that_ends_unpins_anything() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _ENDS],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert (ended.stdout, ended.stderr) == ("", "")
