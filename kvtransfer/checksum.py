"""The checksums by which a landed block is compared with the one that was sent."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import numpy as np
import xxhash

from kvtransfer.nh import nh_checksum

PIECE_BYTES = 1 << 20
"""What is received before it is summed: little enough to be in a cache still, enough for calls to cost little."""


class ChecksumKind(Enum):
    """Which checksum the blocks of a pool are sealed with: the one that whatever holds the pool computes fast. Each is
    an unsigned 64-bit number and guards against mishaps, not against forgery."""

    XXH3 = "XXH3"
    """XXH3-64, of a pool in host memory."""
    NH = "NH"
    """Of a pool in device memory (baton/nh.py); of blocks of multiples of 8 bytes."""

    def of(self, block: bytes | memoryview) -> int:
        """Of a whole block that the host can read. XXH3 is as fast as memory, NH several times slower: for threads."""
        return xxh3_checksum(block) if self is ChecksumKind.XXH3 else nh_checksum(block)


class Xxh3:
    """XXH3-64 over one block's bytes as they come."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, data: bytes | memoryview) -> None:
        self._state.update(data)

    def result(self) -> int:
        return int(self._state.intdigest())


def xxh3_checksum(data: bytes | memoryview) -> int:
    """Of a whole block at once."""
    return int(xxhash.xxh3_64_intdigest(data))


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
        """Copies blocks from the first place, in `source`, to the second, in `target`. Returns the XXH3 checksum of
        each as it was written; without `summed`, nothing."""


def copy_blocks(
    source: memoryview, target: memoryview, block_bytes: int, pairs: Sequence[tuple[int, int]], *, summed: bool
) -> list[int]:
    """The Copier that needs no compiler. numpy copies as fast as memcpy and without the interpreter lock."""
    data, into, sums = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8), list[int]()
    for first, second in pairs:
        block = slice(second * block_bytes, (second + 1) * block_bytes)
        np.copyto(into[block], data[first * block_bytes : (first + 1) * block_bytes])
        if summed:
            sums.append(xxh3_checksum(target[block]))  # in a cache still, if only the one that cores share
    return sums
