"""A pool in device memory as kvtransfer sees it: blocks are copied through host memory."""

from __future__ import annotations

from engine.block_pool import Generations
from engine.kv_cache import KVCache


class DeviceMemory:
    """A `kvtransfer.memory.PoolMemory`. Thread-safe as far as torch's copies are."""

    def __init__(self, cache: KVCache, generations: Generations) -> None:
        self._cache = cache
        self._generations = generations

    @property
    def num_blocks(self) -> int:
        return self._cache.num_blocks

    @property
    def block_bytes(self) -> int:
        return self._cache.layout.block_bytes

    def generation(self, index: int) -> int:
        return self._generations[index]

    def view(self, index: int, count: int = 1) -> None:
        """The host cannot reach these bytes."""
        return

    def read(self, index: int, count: int = 1) -> memoryview:
        size = self.block_bytes
        data = memoryview(bytearray(count * size))
        for offset in range(count):
            self._cache.read_block(index + offset, data[offset * size : (offset + 1) * size])
        return data

    def write(self, index: int, data: memoryview) -> None:
        size = self.block_bytes
        for offset in range(len(data) // size):
            self._cache.write_block(index + offset, data[offset * size : (offset + 1) * size])
