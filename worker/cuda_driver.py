"""What the CUDA driver alone can tell and do: handles of device memory for other processes, and mapping theirs.

Not torch's sharing of tensors: that counts readers in a file of `/dev/shm`, which a killed worker would leave behind,
and is made for one reader a handle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_LIBRARY = "libcuda.so.1"
_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the one flag there is
HANDLE_BYTES = 64


class CudaError(Exception):
    """A call of the driver failed, or there is none."""


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE_BYTES),)


class _Uuid(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class Device:
    """One device, by the number that torch has for it too."""

    def __init__(self, number: int) -> None:
        """Raises CudaError where there is none."""
        _call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(number))
        self._context = ctypes.c_void_p()
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def uuid(self) -> bytes:
        uuid = _Uuid()
        _call("cuDeviceGetUuid_v2", ctypes.byref(uuid), self._device)
        return bytes(uuid.bytes)

    def export(self, address: int) -> tuple[bytes, int]:
        """A handle of the allocation that `address` lies in, and how far in. Raises CudaError where it has none, as
        memory of an allocator with expandable segments."""
        handle = _Handle()
        with self._current():
            _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        base, _ = self.allocation(address)
        return bytes(handle.bytes), address - base

    def open(self, handle: bytes) -> int:
        """The address of another process's allocation, mapped here until `close`."""
        address = ctypes.c_uint64()
        whole = _Handle((ctypes.c_ubyte * HANDLE_BYTES)(*handle))
        with self._current():
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), whole, ctypes.c_uint(_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        with self._current():
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def allocation(self, address: int) -> tuple[int, int]:
        """Where the allocation that `address` lies in begins, and its size in bytes."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._current():
            _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value, size.value

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Of the calling thread, which may be one that CUDA has not seen."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise CudaError(f"there is no CUDA driver: {error}") from None


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
        raise CudaError(f"{name} failed: {(text.value or b'').decode() or status}")
