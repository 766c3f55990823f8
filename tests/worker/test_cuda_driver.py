"""How the driver is called, seen without one: a stand-in keeps its allocations, handles and contexts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from worker import cuda_driver
from worker.cuda_driver import CudaError, Device

BASE, SIZE = 0x7F00_0000_0000, 64 << 20


class Driver:
    """Of one device. What it is called with is checked as C would take it."""

    def __init__(self) -> None:
        self.contexts: list[int] = []
        self.opened: dict[int, bytes] = {}
        self.fails = ""

    def cuInit(self, flags: ctypes.c_uint) -> int:
        return 0

    def cuDeviceGet(self, device: Any, number: ctypes.c_int) -> int:
        device._obj.value = number.value
        return 0 if number.value == 0 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, device: ctypes.c_int) -> int:
        context._obj.value = 0xC0
        return 0

    def cuCtxPushCurrent_v2(self, context: ctypes.c_void_p) -> int:
        assert context.value == 0xC0
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context._obj.value = self.contexts.pop()
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: ctypes.c_int) -> int:
        uuid._obj.bytes[:] = range(16)
        return 0

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: ctypes.c_uint64) -> int:
        assert self.contexts, "no context is current"
        base._obj.value, size._obj.value = BASE, SIZE
        return 0 if BASE <= address.value < BASE + SIZE else 1

    def cuIpcGetMemHandle(self, handle: Any, address: ctypes.c_uint64) -> int:
        assert self.contexts, "no context is current"
        if self.fails == "cuIpcGetMemHandle":
            return 801
        handle._obj.bytes[:] = b"\0handle\0".ljust(64, b"\7")
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: ctypes.c_uint) -> int:
        assert self.contexts, "no context is current"
        assert isinstance(handle, ctypes.Structure)  # by value, not by reference
        assert ctypes.sizeof(handle) == 64
        assert flags.value == 1
        address._obj.value = BASE
        self.opened[BASE] = bytes(handle)
        return 0

    def cuIpcCloseMemHandle(self, address: ctypes.c_uint64) -> int:
        assert self.contexts, "no context is current"
        return 0 if self.opened.pop(address.value, None) else 1

    def cuGetErrorName(self, status: ctypes.c_int, text: Any) -> int:
        text._obj.value = {101: b"CUDA_ERROR_INVALID_DEVICE", 801: b"CUDA_ERROR_NOT_SUPPORTED"}.get(status.value)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    yield driver
    assert driver.contexts == []  # a thread is left as it was found


def test_what_one_exports_another_opens_and_closes(driver: Driver) -> None:
    device = Device(0)
    handle, offset = device.export(BASE + 4096)
    assert (len(handle), offset) == (64, 4096)
    assert handle.startswith(b"\0handle\0")  # nothing is taken for the end of a string
    assert device.open(handle) == BASE
    assert driver.opened == {BASE: handle}
    assert device.allocation(BASE + 1) == (BASE, SIZE)
    device.close(BASE)
    assert driver.opened == {}
    assert device.uuid() == bytes(range(16))


def test_a_failure_says_which_call_and_by_what_name(driver: Driver) -> None:
    with pytest.raises(CudaError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        Device(3)
    driver.fails = "cuIpcGetMemHandle"
    with pytest.raises(CudaError, match="cuIpcGetMemHandle failed: CUDA_ERROR_NOT_SUPPORTED"):
        Device(0).export(BASE)
    with pytest.raises(CudaError, match="cuIpcCloseMemHandle failed: 1"):
        Device(0).close(BASE)


def test_a_machine_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libcuda.so.none")
    cuda_driver._driver.cache_clear()
    try:
        with pytest.raises(CudaError, match="there is no CUDA driver"):
            Device(0)
    finally:
        cuda_driver._driver.cache_clear()
