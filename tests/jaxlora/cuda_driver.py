"""A driver that pins nothing, but knows what CUDA's would have been asked."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

CONTEXT = 0x1234
OUT_OF_MEMORY = 2


class FakeDriver:
    """The calls of libcuda.so.1 that pinning needs. ``fail`` has the code a call is to return."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail: dict[str, int] = {}
        self.pinned: dict[int, int] = {}
        """Address -> bytes."""
        self.num_pinned = 0
        """How often."""
        self._current = threading.local()
        self._lock = threading.Lock()
        monkeypatch.setattr(ctypes, "CDLL", self._load)

    def __getattr__(self, name: str) -> Any:
        call = getattr(type(self), f"_{name.removesuffix('_v2')}")
        return lambda *arguments: self.fail.get(name) or call(self, *arguments) or 0

    @property
    def contexts(self) -> list[int | None]:
        """Of the calling thread, the current one last."""
        found: list[int | None] = self._current.__dict__.setdefault("stack", [])
        return found

    def _load(self, name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        return self

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device._obj.value = 10 + ordinal

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> None:
        context._obj.value = CONTEXT + device.value

    def _cuCtxPushCurrent(self, context: ctypes.c_void_p) -> None:
        self.contexts.append(context.value)

    def _cuCtxPopCurrent(self, context: Any) -> None:
        context._obj.value = self.contexts.pop()

    def _cuMemHostRegister(
        self, address: ctypes.c_void_p, num_bytes: ctypes.c_size_t, flags: int
    ) -> None:
        assert self.contexts[-1] == CONTEXT + 10
        assert flags == 1
        assert address.value is not None
        # Whole pages, of which no other array has any.
        assert address.value % 4096 == 0
        # They are there already.
        assert not ctypes.string_at(address.value, num_bytes.value).strip(b"\0")
        with self._lock:
            assert address.value not in self.pinned
            self.pinned[address.value] = num_bytes.value
            self.num_pinned += 1

    def _cuMemHostUnregister(self, address: ctypes.c_void_p) -> None:
        assert self.contexts[-1] == CONTEXT + 10
        assert address.value is not None
        with self._lock:
            del self.pinned[address.value]

    def _cuGetErrorName(self, code: int, text: Any) -> int:
        if code != OUT_OF_MEMORY:
            return 1
        text._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
        return 0
