"""Host memory that a GPU's copy engine reads by itself.

JAX has such memory, but of an allocator that asks CUDA for ever larger regions, and while CUDA
makes one nobody can launch a kernel: with the twelfth adapter of an 8B model no step began for
0.7 s, and the next regions are twice and four times as large. Memory that the process has already
is pinned in 3 ms, and XLA sends what lies there as fast.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from typing import Any, Final

import numpy as np

from jaxlora.interrupts import uninterrupted

_LIBRARY: Final = "libcuda.so.1"
_FOR_ALL_GPUS: Final = 1
"""CU_MEMHOSTREGISTER_PORTABLE."""


class OwnedMemory:
    """Makes numpy arrays of memory that belongs to something else, which they keep alive.

    Of an array that is a part of another one numpy keeps the last that is no such part: it is this
    that all have in common.
    """

    def __init__(self, address: int, num_bytes: int, owner: Any) -> None:
        self._owner = owner
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (num_bytes,),
            "data": (address, False),
        }


class PinnedMemory:
    """Memory for a GPU of this process, in the context that XLA has there; any thread may ask.

    ``ordinal`` is JAX's ``local_hardware_id``. Raises OSError where NVIDIA's driver is not to be
    had. See https://docs.nvidia.com/cuda/cuda-driver-api/ for the calls.
    """

    def __init__(self, ordinal: int) -> None:
        self._driver = ctypes.CDLL(_LIBRARY)
        self._context = ctypes.c_void_p()
        try:
            device = ctypes.c_int()
            self._call("cuInit", 0)
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            # For good: it is XLA's as well, and goes with the process.
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        except MemoryError as error:
            raise OSError(f"CUDA device {ordinal} cannot be used: {error}") from error

    def __call__(self, num_bytes: int) -> np.ndarray:
        """So many bytes, as a flat uint8 array. Raises MemoryError if they cannot be pinned."""
        try:
            # Of whole pages, which no neighbour shares.
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{num_bytes} bytes of memory: {error}") from error
        # In large pages, which takes a third of the time, if the system has them.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(mapping, np.uint8)
        # The system gives the pages now, while kernels are launched as ever: CUDA would have it
        # done while they wait.
        array.fill(0)
        return np.asarray(_Pinned(self, array))

    def pin(self, array: np.ndarray) -> None:
        """Lets GPUs read an array's pages until :meth:`unpin`. Raises MemoryError."""
        address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call_in_context("cuMemHostRegister_v2", address, size, _FOR_ALL_GPUS)

    def unpin(self, array: np.ndarray) -> None:
        """Ends what :meth:`pin` began."""
        self._call_in_context("cuMemHostUnregister", ctypes.c_void_p(array.ctypes.data))

    def _call_in_context(self, name: str, *arguments: Any) -> None:
        # The thread may be one of JAX's, whose context is to stay what it is.
        with uninterrupted():
            self._call("cuCtxPushCurrent_v2", self._context)
            try:
                self._call(name, *arguments)
            finally:
                self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(text))
            raise MemoryError(f"{name}: {(text.value or b'error %d' % code).decode()}")


class _Pinned(OwnedMemory):
    """Is unpinned when no array needs it any more."""

    def __init__(self, memory: PinnedMemory, array: np.ndarray) -> None:
        self._memory: PinnedMemory | None = None
        super().__init__(array.ctypes.data, array.nbytes, array)
        with uninterrupted():
            memory.pin(array)
            self._memory, self._process = memory, os.getpid()

    def __del__(self) -> None:
        # A child has the memory, but not the driver; and with the process all of it goes.
        if self._memory is not None and os.getpid() == self._process and not sys.is_finalizing():
            self._memory.unpin(self._owner)
