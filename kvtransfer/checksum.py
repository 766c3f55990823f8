"""The checksum by which a landed block is compared with the one that was sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import xxhash

from kvtransfer.memory import PoolMemory

PIECE_BYTES = 1 << 20
"""What is received before it is summed: little enough to be in a cache still, enough for calls to cost little."""


class Checksum:
    """XXH3-64 over one block's bytes as they come, an unsigned 64-bit number. It guards against mishaps, not against
    forgery."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, data: bytes | memoryview) -> None:
        self._state.update(data)

    def result(self) -> int:
        return int(self._state.intdigest())


def block_checksum(data: bytes | memoryview) -> int:
    """Of a whole block at once."""
    return int(xxhash.xxh3_64_intdigest(data))


def pool_checksums(memory: PoolMemory, indices: Sequence[int]) -> list[int]:
    """Checksums of the blocks at `indices`, in their order. Reads the memory: for threads, inside a gate."""
    return [block_checksum(memory.read(index)) for index in indices]


class Copier(Protocol):
    """A way to copy blocks from one pool in host memory to another. May be used by several threads at once."""

    def __call__(
        self,
        source: memoryview,
        target: memoryview,
        block_bytes: int,
        pairs: Sequence[tuple[int, int]],
        *,
        summed: bool,
    ) -> list[int]:
        """Copies blocks from the first place, in `source`, to the second, in `target`. Returns the checksum of each as
        it was written; without `summed`, nothing."""


def copy_blocks(
    source: memoryview, target: memoryview, block_bytes: int, pairs: Sequence[tuple[int, int]], *, summed: bool
) -> list[int]:
    """The Copier that needs no compiler. numpy copies as fast as memcpy and without the interpreter lock."""
    data, into, sums = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8), list[int]()
    for first, second in pairs:
        block = slice(second * block_bytes, (second + 1) * block_bytes)
        np.copyto(into[block], data[first * block_bytes : (first + 1) * block_bytes])
        if summed:
            sums.append(block_checksum(target[block]))  # in a cache still, if only the one that cores share
    return sums
