"""A pool's bytes in the simulator: eight of them a position, poisoned on every allocation."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from baton.ids import BlockIndex
from sim.model import mix

_POISON = 0xBAD0BAD0BAD0BAD0


class SimMemory:
    """Keeps the contract of kvtransfer's PoolMemory."""

    def __init__(self, num_blocks: int, block_size: int, guard: Callable[[int], None] = lambda index: None) -> None:
        """`guard` is told of each block that a transfer is about to write."""
        self._guard = guard
        self.num_blocks = num_blocks
        self.block_bytes = 8 * block_size
        self.generations = array("Q", bytes(8 * num_blocks))
        self._block_size = block_size
        self._bytes = memoryview(bytearray(num_blocks * self.block_bytes))
        self.words = self._bytes.cast("Q")
        """One number a position, block by block."""

    def on_take(self, block: BlockIndex) -> None:
        """What was there is void: whoever reads it before it is written again reads what nobody wrote."""
        poison = mix(_POISON ^ block, self.generations[block])
        for at in range(block * self._block_size, (block + 1) * self._block_size):
            self.words[at] = poison

    def generation(self, index: int) -> int:
        return self.generations[index]

    def view(self, index: int, count: int = 1) -> memoryview | None:
        return self._bytes[index * self.block_bytes : (index + count) * self.block_bytes]

    def read(self, index: int, count: int = 1) -> memoryview:
        return self._bytes[index * self.block_bytes : (index + count) * self.block_bytes]

    def write(self, index: int, data: memoryview) -> None:
        self._guard(index)
        self.fill(index, data)

    def fill(self, index: int, data: memoryview) -> None:
        """A write of the worker's own."""
        start = index * self.block_bytes
        self._bytes[start : start + len(data)] = data
