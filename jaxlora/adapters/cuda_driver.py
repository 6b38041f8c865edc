"""NVIDIA's driver, for what JAX has no call for."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, Final

from jaxlora.interrupts import uninterrupted

_LIBRARY: Final = "libcuda.so.1"


class CudaDriver:
    """The driver's calls in the context that XLA has on a GPU of this process; any thread may ask.

    ``ordinal`` is JAX's ``local_hardware_id``. Raises OSError where the driver is not to be had.
    See https://docs.nvidia.com/cuda/cuda-driver-api/ for the calls.
    """

    def __init__(self, ordinal: int) -> None:
        self._library = ctypes.CDLL(_LIBRARY)
        self._keeping_lock = ctypes.PyDLL(_LIBRARY)
        self._context = ctypes.c_void_p()
        try:
            device = ctypes.c_int()
            self.call("cuInit", 0)
            self.call("cuDeviceGet", ctypes.byref(device), ordinal)
            # For good: it is XLA's as well, and goes with the process.
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        except MemoryError as error:
            raise OSError(f"CUDA device {ordinal} cannot be used: {error}") from error

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What is called within is called in the GPU's context, and Ctrl-C waits for the end."""
        # The thread may be one of JAX's, whose context is to stay what it is.
        with uninterrupted():
            self.call_at_once("cuCtxPushCurrent_v2", self._context)
            try:
                yield
            finally:
                self.call_at_once("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def call(self, name: str, *arguments: Any) -> None:
        """Other threads run Python meanwhile. Raises MemoryError with the driver's name of the
        error."""
        self._check(name, getattr(self._library, name)(*arguments))

    def call_at_once(self, name: str, *arguments: Any) -> None:
        """The same for what takes microseconds: who gives Python's lock back waits to get it again,
        and then makes others wait."""
        self._check(name, getattr(self._keeping_lock, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise MemoryError(f"{name}: {(text.value or b'error %d' % code).decode()}")
