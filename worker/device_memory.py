"""A pool in device memory as kvtransfer sees it: blocks are copied through pinned host memory, or, between two
processes that share the device, within it.

Its blocks are summed where they are, or as they are copied, by a kernel: their checksums are NH. Where there are no
kernels, XXH3 is taken of what is read back, block by block.

On a stream of its own, for a copy would otherwise wait for all steps that are queued. That is right because others see
to the order: what is read was sealed by a step that the host has waited for, and what is written belongs to no step
before it is committed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.errors import InternalError, TransferRefused
from engine.kernels.choice import block_kernels
from engine.kv_cache import KVCache
from kvtransfer.checksum import ChecksumKind, xxh3_checksum
from kvtransfer.memory import HostMemory, PoolShape
from kvtransfer.transports.base import runs
from kvtransfer.transports.cuda_ipc import DeviceHandle, DevicePool, PeerBlocks
from worker.cuda_driver import CudaError, Device

log = logging.getLogger(__name__)


class DeviceMemory(DevicePool):
    """A `kvtransfer.memory.PoolMemory`, of a CUDA device."""

    def __init__(self, cache: KVCache, generations: HostMemory) -> None:
        """`generations`: as `share_generations` makes it, of as many blocks as `cache` has. Compiles what it will
        launch, and returns when the device has nothing left to do."""
        self.cache = cache
        self._generations = generations
        self._kernels = block_kernels(cache)
        self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]  # torch gives it no types

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.cache.layout.block_bytes

    def generation(self, index: int) -> int:
        return self._generations.generation(index)

    def view(self, index: int, count: int = 1) -> None:
        """The host cannot reach these bytes."""
        return

    def read(self, index: int, count: int = 1) -> memoryview:
        host = torch.empty(count * self.block_bytes, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(self.cache.bytes_of(index, count), non_blocking=True)
        self._stream.synchronize()
        return _bytes(host)

    def write(self, index: int, data: memoryview) -> None:
        host = torch.empty(len(data), dtype=torch.uint8, pin_memory=True)
        _bytes(host)[:] = data
        with torch.cuda.stream(self._stream):
            self.cache.bytes_of(index, len(data) // self.block_bytes).copy_(host, non_blocking=True)
        self._stream.synchronize()

    @property
    def checksum_kind(self) -> ChecksumKind:
        return ChecksumKind.XXH3 if self._kernels is None else ChecksumKind.NH

    def checksums(self, indices: Sequence[int]) -> list[int]:
        if self._kernels is None:
            return [xxh3_checksum(self.read(index)) for index in indices]
        with torch.cuda.stream(self._stream):
            places = self._places(indices, self.num_blocks)
            sums = torch.empty_like(places)
            self._kernels.sum(self.cache.blocks, places, sums)
            return self._bring_out(sums)

    @property
    def shared_generations(self) -> HostMemory:
        return self._generations

    def export(self) -> DeviceHandle | None:
        try:
            device = self._device()
            return DeviceHandle(device.uuid(), *device.export(self.cache.tensor.data_ptr()))
        except CudaError as error:
            log.info("other processes can't map the KV pool: %s", error)
            return None

    def map_peer(self, handle: DeviceHandle, shape: PoolShape) -> PeerBlocks:
        try:
            device = self._device()
            if handle.device_uuid != device.uuid():
                raise TransferRefused("the source's pool is on another GPU")
            return _Mapped(self, device, handle, shape)
        except CudaError as error:
            raise TransferRefused(f"the source's pool can't be mapped: {error}") from None

    def copy_from(self, blocks: Tensor, pairs: Sequence[tuple[int, int]], *, summed: bool) -> list[int]:
        """Places in `blocks` `[n, block_bytes]` uint8 of this device, and in this pool. Returns when they are there:
        their checksums, where they are to be `summed`."""
        if self._kernels is None:
            with torch.cuda.stream(self._stream):
                for source, destination, count in runs(pairs):
                    of = blocks[source : source + count].view(-1)
                    self.cache.bytes_of(destination, count).copy_(of, non_blocking=True)
            self._stream.synchronize()
            return self.checksums([destination for _, destination in pairs]) if summed else []
        with torch.cuda.stream(self._stream):
            sources = self._places([source for source, _ in pairs], len(blocks))
            targets = self._places([destination for _, destination in pairs], self.num_blocks)
            sums = torch.empty_like(targets)
            self._kernels.copy(blocks, sources, self.cache.blocks, targets, sums)
            checksums = self._bring_out(sums)
        return checksums if summed else []

    def _places(self, indices: Sequence[int], num_blocks: int) -> Tensor:
        """`indices` on the device, for a kernel, which checks no bounds."""
        outside = [index for index in indices if not 0 <= index < num_blocks]
        if outside:
            raise InternalError(f"block {outside[0]} is not in a pool of {num_blocks}")
        return torch.tensor(indices, dtype=torch.int64, pin_memory=True).to(self.cache.device, non_blocking=True)

    def _bring_out(self, sums: Tensor) -> list[int]:
        """Waits for all that was queued."""
        host = torch.empty(len(sums), dtype=torch.int64, pin_memory=True)
        host.copy_(sums, non_blocking=True)
        self._stream.synchronize()
        unsigned: list[int] = host.numpy().view(np.uint64).tolist()
        return unsigned

    def _device(self) -> Device:
        index = self.cache.device.index
        return Device(torch.cuda.current_device() if index is None else index)


def share_generations(num_blocks: int) -> HostMemory:
    """Of a pool in device memory: shared memory that has generations, and a byte for each block that nobody uses."""
    return HostMemory.create(num_blocks, 1)


class _Mapped(PeerBlocks):
    """What `__cuda_array_interface__` says is how torch takes memory for a tensor that it did not allocate."""

    def __init__(self, memory: DeviceMemory, device: Device, handle: DeviceHandle, shape: PoolShape) -> None:
        """Raises CudaError, and TransferRefused where the allocation is smaller than the pool."""
        self._memory = memory
        self._device = device
        self._start = device.open(handle.handle)
        base, size = device.allocation(self._start)
        needed = handle.offset + shape.num_blocks * shape.block_bytes
        if base != self._start or needed > size:
            device.close(self._start)
            raise TransferRefused(f"the source's pool would take {needed} bytes of an allocation of {size}")
        self.__cuda_array_interface__ = {
            "shape": tuple(shape),
            "typestr": "|u1",
            "data": (self._start + handle.offset, False),
            "version": 3,
        }
        self._blocks: Tensor | None = torch.as_tensor(self, device=memory.cache.device)
        assert self._blocks.data_ptr() == self._start + handle.offset, "torch made a copy of the source's pool"

    def copy(self, pairs: Sequence[tuple[int, int]], *, summed: bool) -> list[int]:
        assert self._blocks is not None, "copied from a pool that was let go of"
        return self._memory.copy_from(self._blocks, pairs, summed=summed)

    def close(self) -> None:
        if self._blocks is None:
            return
        self._blocks = None
        try:
            self._device.close(self._start)
        except CudaError as error:
            log.warning("a peer's pool stays mapped: %s", error)


def _bytes(host: Tensor) -> memoryview:
    return memoryview(host.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, whatever their types say
