"""A pool's bytes in the simulator: eight of them a position, poisoned on every allocation.

They are a key of two float32, so that production can re-lay them; the values behind a block's keys are not used. As a
device's, the memory is reached by reading and writing whole blocks alone, so that every write is seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from baton.ids import BlockIndex
from baton.layout import KVLayout
from kvtransfer.checksum import ChecksumKind
from sim.model import mix

_POISON = 0xBAD0BAD0BAD0BAD0


class SimMemory:
    """Keeps the contract of kvtransfer's PoolMemory."""

    def __init__(self, num_blocks: int, layout: KVLayout, guard: Callable[[int], None] = lambda index: None) -> None:
        """`guard` is told of each block that a transfer is about to write."""
        self._guard = guard
        self.num_blocks = num_blocks
        self.block_bytes = layout.block_bytes
        self.generations = array("Q", bytes(8 * num_blocks))
        self._block_size = layout.block_size
        self._stride = layout.block_bytes // 8
        self._bytes = memoryview(bytearray(num_blocks * self.block_bytes))
        self._words = self._bytes.cast("Q")

    def on_take(self, block: BlockIndex) -> None:
        """What was there is void: whoever reads it before it is written again reads what nobody wrote."""
        poison = mix(_POISON ^ block, self.generations[block])
        for at in range(self._block_size):
            self[block, at] = poison

    def __getitem__(self, place: tuple[int, int]) -> int:
        """The number of one position of a block."""
        return self._words[place[0] * self._stride + place[1]]

    def __setitem__(self, place: tuple[int, int], number: int) -> None:
        self._words[place[0] * self._stride + place[1]] = number

    def generation(self, index: int) -> int:
        return self.generations[index]

    def view(self, index: int, count: int = 1) -> memoryview | None:
        return None

    def read(self, index: int, count: int = 1) -> memoryview:
        return self._bytes[index * self.block_bytes : (index + count) * self.block_bytes]

    def write(self, index: int, data: memoryview) -> None:
        self._guard(index)
        self.fill(index, data)

    @property
    def checksum_kind(self) -> ChecksumKind:
        return ChecksumKind.XXH3

    def checksums(self, indices: Sequence[int]) -> list[int]:
        return [self.checksum_kind.of(self.read(index)) for index in indices]

    def fill(self, index: int, data: memoryview) -> None:
        """A write of the worker's own."""
        start = index * self.block_bytes
        self._bytes[start : start + len(data)] = data
