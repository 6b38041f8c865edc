"""Copies to a GPU beside what XLA does there.

XLA lets a transfer wait for the steps that were dispatched before it, and what the next step needs
from the host waits behind it: with an adapter of 84 MB on its way a step begins 2 ms late. On a
stream of its own a copy waits for nothing, and in pieces it lets small ones pass.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from jaxlora.adapters.cuda_driver import CudaDriver

_PIECE_BYTES: Final = 4 << 20
_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING: not even the stream without a name waits for it."""


def open_streams(devices: Iterable[Any]) -> tuple[list[CopyStream], str]:
    """One for each device, if JAX runs on GPUs of NVIDIA's, and for the log how adapters come
    there."""
    devices = list(devices)
    if devices[0].platform != "gpu":
        return [], f"by JAX ({devices[0].platform}: there are no streams)"
    try:
        streams = [CopyStream(device.local_hardware_id) for device in devices]
    except OSError as error:
        return [], f"by JAX ({error})"
    return streams, "on a stream of their own"


class CopyStream:
    """A stream of one GPU. Takes and raises what :class:`CudaDriver` does."""

    def __init__(self, ordinal: int) -> None:
        self._driver = CudaDriver(ordinal)
        self._stream = ctypes.c_void_p()
        self._lock = threading.Lock()
        try:
            with self._driver.context():
                self._driver.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        except MemoryError as error:
            raise OSError(f"CUDA device {ordinal} has no further stream: {error}") from error
        # With the process all of it goes.
        weakref.finalize(self, _end, self._driver, self._stream, os.getpid()).atexit = False

    def copy(self, source: np.ndarray, address: int) -> None:
        """Copies an array that lies in one piece to where nobody reads or writes on the device, and
        returns when all of it is there; any thread may. Raises MemoryError."""
        begin, driver = source.ctypes.data, self._driver
        with self._lock, driver.context():
            for at in range(0, source.nbytes, _PIECE_BYTES):
                piece = ctypes.c_size_t(min(_PIECE_BYTES, source.nbytes - at))
                to, here = ctypes.c_uint64(address + at), ctypes.c_void_p(begin + at)
                driver.call_at_once("cuMemcpyHtoDAsync_v2", to, here, piece, self._stream)
                driver.call("cuStreamSynchronize", self._stream)


def _end(driver: CudaDriver, stream: ctypes.c_void_p, process: int) -> None:
    # A child has the number, but not the driver.
    if os.getpid() == process:
        with driver.context():
            driver.call("cuStreamDestroy_v2", stream)
