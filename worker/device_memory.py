"""A pool in device memory as kvtransfer sees it: blocks are copied through pinned host memory.

On a stream of its own, for a copy would otherwise wait for all steps that are queued. That is right because others see
to the order: what is read was sealed by a step that the host has waited for, and what is written belongs to no step
before it is committed.
"""

from __future__ import annotations

import torch

from engine.block_pool import Generations
from engine.kv_cache import KVCache


class DeviceMemory:
    """A `kvtransfer.memory.PoolMemory`, of a CUDA device."""

    def __init__(self, cache: KVCache, generations: Generations) -> None:
        self.cache = cache
        self._generations = generations
        self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]  # torch gives it no types

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.cache.layout.block_bytes

    def generation(self, index: int) -> int:
        return self._generations[index]

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


def _bytes(host: torch.Tensor) -> memoryview:
    return memoryview(host.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, whatever their types say
